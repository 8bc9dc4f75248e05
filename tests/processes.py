"""Command lines in real processes, forked from one that has imported everything.

A new interpreter takes 5 to 8 s of CPU to import torch, transformers, datasets and saetrain. Python's fork server
imports them once per pytest worker. Each process that it forks has its own environment, working directory, output and
exit code, and inherits neither pytest's files nor its signal handlers.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

import torch

POLL_INTERVAL_S = 0.01
_context = multiprocessing.get_context("forkserver")
_running: list[ForkedCommand] = []


def start_fork_server() -> None:
    """Start the process that imports the libraries, unless it runs already."""
    _context.set_forkserver_preload(["tests.preloaded"])
    # OpenMP reads this variable when it is loaded.
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


class ForkedCommand:
    """``saetrain WORDS`` in a process of its own, with one thread per operation.

    ``environment`` is added to this process's; ``prepare`` is called in the new process before the command.
    """

    def __init__(
        self,
        words: Sequence[str],
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        prepare: Callable[[], object] | None = None,
    ) -> None:
        start_fork_server()
        descriptor, self._output = tempfile.mkstemp(prefix="saetrain-test-", suffix=".out")
        os.close(descriptor)
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        arguments = (list(words), variables, str(folder or Path.cwd()), self._output, prepare)
        self._process = _context.Process(target=_run_command, args=arguments)
        self._process.start()
        _running.append(self)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, minus the signal's number after a kill, or None while the process runs."""
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout_s: float = 300) -> int:
        """Wait for the end and return the exit code."""
        self._process.join(timeout_s)
        code = self.poll()
        if code is None:
            self.kill()
            raise AssertionError(f"the process still runs after {timeout_s} s:\n{self.read_output()}")
        return code

    def read_output(self) -> str:
        """Return what the process has written to stdout and stderr so far."""
        return Path(self._output).read_text(errors="replace")

    def wait_for_match(self, pattern: str) -> re.Match[str]:
        """Wait until the output matches ``pattern``."""
        while True:
            code = self.poll()
            found = re.search(pattern, self.read_output(), re.MULTILINE)
            if found is not None:
                return found
            assert code is None, self.read_output()
            time.sleep(POLL_INTERVAL_S)


def finish(process: ForkedCommand, code: int | None = 0, timeout_s: float = 300) -> str:
    """Wait for the end, check the exit code (None: any but 0), and return the output."""
    found = process.wait(timeout_s)
    assert found == code if code is not None else found, process.read_output()
    return process.read_output()


def kill_running_processes() -> None:
    """Kill the processes that a test has left, and delete their outputs."""
    while _running:
        command = _running.pop()
        command.kill()
        command.wait(60)
        os.unlink(command._output)


def _run_command(
    words: list[str], environment: dict[str, str], folder: str, output: str, prepare: Callable[[], object] | None
) -> None:
    """Turn a forked process into ``saetrain WORDS``."""
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["saetrain", *words]
    torch.set_num_threads(1)

    import datasets

    if "HF_DATASETS_CACHE" in environment:
        datasets.config.HF_DATASETS_CACHE = environment["HF_DATASETS_CACHE"]
    if prepare is not None:
        prepare()
    from saetrain.cli import main

    try:
        main(words)
    finally:
        # multiprocessing skips these, which an interpreter runs at its end.
        atexit._run_exitfuncs()
