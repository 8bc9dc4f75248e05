"""Run under the preloaded faults: for each system call of a save, fail or die there, and check what is left."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from pathlib import Path

import torch

from saetrain.training.checkpoint import find_newest_valid, load_checkpoint, save_checkpoint

faults = ctypes.CDLL(sys.argv[1])
faults.fault_seen.restype = ctypes.c_long


def state(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {name: {"w": torch.full((300, 50), float(step)), "b": torch.arange(9) + step} for name in ("a", "b")}


def save(folder: Path, step: int) -> None:
    save_checkpoint(folder, step, state(step), {"note": step})


def check(folder: Path, allowed: set[int]) -> None:
    """The newest whole checkpoint is one of ``allowed``, and holds exactly what was saved."""
    path, _ = find_newest_valid(folder)
    assert path is not None, "nothing to resume from"
    found = load_checkpoint(path)
    step = found.values["step"]
    assert step in allowed, (step, allowed)
    assert found.values["note"] == step
    for name, tensors in state(step).items():
        assert all(torch.equal(value, found.tensors[name][key]) for key, value in tensors.items())


def attempt(folder: Path, call: int, kill: bool, again: bool) -> tuple[int, int]:
    """Save step 3 over 1 and 2 in a child with a fault at its ``call``-th system call: (exit status, calls seen)."""
    shutil.rmtree(folder, ignore_errors=True)
    for step in (1, 2, *([3] if again else [])):
        save(folder, step)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        faults.fault_arm(str(folder).encode(), ctypes.c_long(call), int(kill))
        status = 0
        try:
            save(folder, 3)
        except Exception:
            status = 7
        os.write(write, str(faults.fault_seen()).encode())
        os._exit(status)
    os.close(write)
    _, status = os.waitpid(pid, 0)
    seen = os.read(read, 20)
    os.close(read)
    return status, int(seen or b"0")


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[2]) / "checkpoints"
    for again in (False, True):
        status, calls = attempt(folder, 0, False, again)
        assert status == 0
        assert calls > 15, f"only {calls} calls were seen: the faults are not in the way"
        for kill in (False, True):
            failed = 0
            for call in range(1, calls + 1):
                status, _ = attempt(folder, call, kill, again)
                failed += status != 0
                check(folder, {2, 3})
                save(folder, 4)
                check(folder, {4})
                assert not list(folder.glob(".writing*")), "a half-written folder stays"
            # Clean-up of old checkpoints may fail without harm, so not every failing call fails the save.
            assert failed > calls / 2, (failed, calls)
            print(
                f"{'killed' if kill else 'failed'} at {calls} calls, {'over' if again else 'beside'} step 3: resumable"
            )


main()
