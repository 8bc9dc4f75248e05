"""Run under the preloaded faults: for each system call in a run's folder, fail or die there, resume, and compare.

Arguments: the library, a folder to work in, model, text, n to take each n-th write, and the cases: what the folder
contains before the run, a colon, and the faults with commas between them.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

import torch

from saetrain import cli
from saetrain.interop.formats import load_sae
from saetrain.runs.train import checkpointing, resume
from saetrain.runs.train import run as run_command
from tests.integration.test_resume import fingerprint, records

LIBRARY, WORK, MODEL, TEXT, STRIDE, *CASES = sys.argv[1:]
WORDS = (
    f"{MODEL} {TEXT} --k 4 --num_latents 64 --batch_size 2 --ctx_len 32 --eval_tokens 200 --eval_every 4 --log_every 1 "
    "--assess false "
    "--max_tokens 512 --save_every 3 --buffer_tokens 256 --data_shards 4 --run_name run"
)
MODES = {"once": 0, "killed": 1, "full": 2}
OLDEST, SECOND = "checkpoints/step_000000003", "checkpoints/.writing_step_000000006"
NAMES = {"rename", "unlink", "rmdir", "mkdir"}
NAMES_PER_WRITE = 4
"""Of the calls that change names this many times as many are taken as of the others, because each is different."""
faults = ctypes.CDLL(LIBRARY)
work = Path(WORK)
out = work / "out"
run = out / "run"


def prepare_once() -> None:
    """Load model and text here, so that each child begins where its run begins to write."""
    config = cli.parse_train(WORDS.split())
    prepared = run_command.prepare_run(config)
    run_command.prepare_run = lambda config, kept=None: dataclasses.replace(prepared, config=config)
    # Without these two, a child would take three times as long.
    hashes = resume.content_hashes(prepared)
    resume.content_hashes = checkpointing.content_hashes = lambda run: hashes
    cli.parse_train = lambda words: dataclasses.replace(
        config,
        sae=dataclasses.replace(config.sae, k=3 if "--k" in words else 4),
        output=dataclasses.replace(
            config.output, save_dir=words[0], resume="--resume" in words, overwrite="--overwrite" in words
        ),
    )


def start(folder: Path, *words: str, fault: tuple[int, str] | None = None) -> tuple[int, str]:
    """The run in a child, with a fault at its n-th call, or its calls listed for 0: (exit code or -signal, output)."""
    said = work / "said"
    pid = os.fork()
    if pid == 0:
        code = 0
        try:
            for stream in (1, 2):
                os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_APPEND), stream)
            if fault is not None:
                call, kind = fault
                if call == 0:
                    faults.fault_list(os.open(work / "calls", os.O_CREAT | os.O_WRONLY | os.O_TRUNC))
                faults.fault_arm(str(folder).encode(), ctypes.c_long(call), MODES[kind])
            cli.main([str(folder), *words])
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), said.read_text()


def succeed(folder: Path, *words: str) -> str:
    code, said = start(folder, *words)
    assert code == 0, said
    return said


def calls_of(folder: Path, *words: str) -> list[str]:
    """The name and path of each call of a run without a fault."""
    code, said = start(folder, *words, fault=(0, "once"))
    assert code == 0, said
    return [line.replace(str(folder), "") for line in (work / "calls").read_text().splitlines()]


def chosen(calls: list[str], before: str, fault: str) -> list[int]:
    """The numbers of the calls that meet the fault; each fault takes other ones."""
    numbers = list(range(1, len(calls) + 1))
    if before != "nothing":
        # Behind the start it is the same run again.
        numbers = numbers[: calls.index("write /run/metrics.jsonl") + 1]
    numbers = [n for n in numbers if SECOND not in calls[n - 1]]
    names = [n for n in numbers if calls[n - 1].split()[0] in NAMES]
    stride = max(1, int(STRIDE) // NAMES_PER_WRITE)
    taken = names[MODES[fault] % stride :: stride]
    if fault == "once":
        return taken
    # Writes and syncs follow one another, so a part of them stands for the others.
    others = [n for n in numbers if n not in names]
    return sorted({*taken, *others[:: int(STRIDE)]})


def build_before(before: str, whole: Path) -> tuple[Path, list[str]]:
    """(what lies in the folder before the run, the run's flags)."""
    template = work / before
    if before == "nothing":
        template.mkdir()
        return template, []
    if before == "other run":
        succeed(template, "--k", "3")
        return template, ["--overwrite"]
    shutil.copytree(whole, template)
    checkpoints = template / "run" / "checkpoints"
    if before == "no checkpoints":
        shutil.rmtree(checkpoints)
    else:
        # The newest is damaged, so that it is renamed, and the metrics are cut back to the one before.
        (checkpoints / "step_000000008" / "state.json").write_text("{")
    return template, ["--resume"]


def files(folder: Path) -> set[str]:
    """All files, but for what was set aside, and the oldest checkpoint, whose removal may have been cut short."""
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    return {name for name in found if not name.startswith(("metrics.jsonl.", "checkpoints/damaged_", OLDEST))}


def check_left(fault: str, code: int, said: str, allowed: list[dict[str, str]]) -> None:
    """What the run said, and that an SAE that can be loaded is a whole one."""
    if fault == "killed":
        assert code == -signal.SIGKILL, (code, said)
    else:
        assert code in (0, 2), (code, said)
        assert "Traceback" not in said, said
        assert code == 0 or f"saetrain: error: writing to {run} failed" in said or "can't write to" in said, said
    for config in run.glob("sae/**/cfg.json"):
        load_sae(config.parent)
        assert fingerprint(run) in allowed, "an SAE that is not whole has a cfg.json"


def check_resumed(before: str, whole: Path) -> None:
    assert fingerprint(run) == fingerprint(whole / "run"), "other weights"
    assert records(run) == records(whole / "run"), "other metrics"
    assert files(run) == files(whole / "run"), files(run) ^ files(whole / "run")
    if before == "no checkpoints":
        kept = [path.read_text() for path in run.glob("metrics.jsonl.*")]
        assert (whole / "run" / "metrics.jsonl").read_text() in kept, "the older metrics are lost"


def attempt(fault: tuple[int, str], before: str, template: Path, words: list[str], whole: Path) -> int:
    """One fault, and the resume: the exit code of the first."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(template, out)
    allowed = [fingerprint(path / "run") for path in (whole, template) if (path / "run" / "sae").exists()]
    code, said = start(out, *words, fault=fault)
    check_left(fault[1], code, said, allowed)
    resumed, said = start(out, "--resume")
    if before == "other run" and resumed == 2:
        # What is left is the older run, whose settings are others.
        assert "--resume:" in said, said
        said = succeed(out, "--overwrite")
        resumed = 0
    assert resumed == 0, said
    check_resumed(before, whole)
    return code


def check_case(before: str, kinds: list[str], whole: Path) -> list[str]:
    """Run into the faults over what the folder contains before; return what was wrong."""
    template, words = build_before(before, whole)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(template, out)
    calls = calls_of(out, *words)
    check_resumed(before, whole)
    assert len(calls) > 50, f"only {len(calls)} calls were seen: the faults are not in the way"
    wrong = []
    for fault in kinds:
        numbers, ended = chosen(calls, before, fault), 0
        for call in numbers:
            try:
                ended += attempt((call, fault), before, template, words, whole) != 0
            except AssertionError as error:
                wrong.append(f"{fault} at call {call}, {calls[call - 1]}: {error}")
        # Cleaning up may fail without harm.
        assert ended > len(numbers) / 2, (ended, len(numbers))
        print(f"{fault} at {len(numbers)} calls over {before}")
    return wrong


def main() -> None:
    torch.set_num_threads(1)
    prepare_once()
    # A child then copies fewer of the pages that it shares with this process.
    gc.freeze()
    whole = work / "whole"
    succeed(whole)
    wrong = []
    for case in CASES:
        before, kinds = case.split(":")
        wrong += check_case(before, kinds.split(","), whole)
    assert not wrong, "\n".join(wrong)
    print("resumable")


main()
