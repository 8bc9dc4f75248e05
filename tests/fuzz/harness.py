"""Command lines in forked processes, with limits on memory and time, and what must hold for each of them."""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, seed, settings

from saetrain.cli import main

TIMEOUT_S = 180
MAX_EXTRA_RSS_KB = 1_500_000
ALLOWED_CODES = (0, 2, 3, 130)
ERROR = "saetrain: error: "
SECONDS_VARIABLE = "SAETRAIN_FUZZ_SECONDS"
cases: list[None] = []
"""One item per case of this process."""


@dataclass(frozen=True)
class Outcome:
    """End of a command: its exit code (negative: a signal), output and largest memory."""

    code: int
    output: str
    max_rss_kb: int


def run_forked(words: Sequence[str], folder: Path) -> Outcome:
    """Run ``saetrain WORDS`` in ``folder`` in a fork of this process."""
    with tempfile.TemporaryFile() as output:
        process = os.fork()
        if not process:
            _run_in_child(words, folder, output.fileno())
        end = time.monotonic() + TIMEOUT_S
        while not (ended := os.wait4(process, os.WNOHANG))[0]:
            if time.monotonic() > end:
                # The stacks of its threads show where it hangs.
                os.kill(process, signal.SIGUSR1)
                time.sleep(1)
                os.kill(process, signal.SIGKILL)
            time.sleep(0.002)
        output.seek(0)
        text = output.read().decode(errors="surrogateescape")
        return Outcome(os.waitstatus_to_exitcode(ended[1]), text, ended[2].ru_maxrss)


def _run_in_child(words: Sequence[str], folder: Path, output: int) -> None:
    code = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = os.fdopen(1, "w", errors="backslashreplace", closefd=False)
        sys.stderr = os.fdopen(2, "w", errors="backslashreplace", closefd=False)
        faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(folder)
        main(words)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def list_files(folder: Path) -> dict[str, tuple[int, int]]:
    """{path: (size, time of change)} of everything below ``folder``."""
    out = {}
    for path in folder.rglob("*"):
        stat = path.lstat()
        out[str(path.relative_to(folder))] = (0, 0) if path.is_dir() else (stat.st_size, stat.st_mtime_ns)
    return out


def check_command(words: Sequence[str], folder: Path, may_write: Sequence[str] = ()) -> Outcome:
    """Run a command in ``folder``, and assert what must hold for any input.

    ``may_write``: the entries of ``folder`` that the command may create or change.
    """
    before = list_files(folder)
    outcome = run_forked(words, folder)
    errors = [line for line in outcome.output.splitlines() if line.startswith(ERROR)]
    shown = f"{list(words)!r:.1500} ended with {outcome.code}: {outcome.output[-3000:]}"
    assert outcome.code in ALLOWED_CODES, shown
    assert "Traceback" not in outcome.output or any("--debug" in word for word in words), shown
    assert len(errors) == (outcome.code in (2, 3)) or not words, shown
    assert all(line.isprintable() and len(line) < 1000 for line in errors), shown
    assert "\x1b[31m" not in outcome.output, shown
    assert not any(line.startswith("FORGED") for line in outcome.output.splitlines()), shown
    own_rss_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert outcome.max_rss_kb < own_rss_kb + MAX_EXTRA_RSS_KB, shown
    after = list_files(folder)
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    stray = [path for path in changed if path.split("/")[0] not in may_write]
    assert not stray, f"wrote {stray}: {shown}"
    return outcome


def fuzz(strategy: Any, check: Callable[[Any], object], examples: int) -> None:
    """Check ``examples`` cases, always the same; with SECONDS_VARIABLE, then new ones for that many seconds."""
    end = time.monotonic() + float(os.environ.get(SECONDS_VARIABLE, "0"))

    def check_counted(case: Any) -> None:
        cases.append(None)
        check(case)

    options = settings(
        max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False
    )
    number = 0
    while not number or time.monotonic() < end:
        seed(number)(options(given(strategy)(check_counted)))()
        number = time.time_ns()
