"""The process of one tool: builds its work, runs steps when it is told to, and says what they took.

Spoken to by JSON lines: ``{"do": "build", "work": …, "options": …}`` and ``{"do": "run", "steps": n}``.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Protocol

from benchmarks.cases import Work

PACKAGES = ("torch", "transformers", "sae-lens", "transformer-lens", "eai-sparsify", "dictionary-learning", "nnsight")


class Runner(Protocol):
    """Work that is ready to run."""

    period: int
    """Steps after which its cost repeats: those between two refills of a buffer, else 1."""

    def run(self, steps: int) -> list[float]:
        """Seconds of each of the next ``steps`` training steps."""


def memory(field: str) -> int:
    """Bytes of ``VmRSS`` or ``VmHWM`` of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def busy_seconds() -> float:
    """CPU seconds that anything on the machine has used so far, time stolen from it included."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def versions() -> dict[str, str]:
    """Python's and those of the packages that decide the figures."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def timed_run(runner: Runner, steps: int, baseline: int) -> dict[str, Any]:
    """One sample: seconds per step, and what the machine did meanwhile."""
    busy, own, start = busy_seconds(), time.process_time(), time.perf_counter()
    seconds = runner.run(steps)
    wall = time.perf_counter() - start
    own = time.process_time() - own
    others = max(0.0, busy_seconds() - busy - own) / (wall * (os.cpu_count() or 1))
    assert len(seconds) == steps, (len(seconds), steps)
    return {
        "seconds": seconds,
        "wall": wall,
        "own_cpu": own,
        "others_cpu": others,
        "peak_bytes": memory("VmHWM") - baseline,
    }


class Server:
    """Answers the requests of one tool."""

    def __init__(self, module: str) -> None:
        # torch.optim imports dynamo at its first step, and that is no memory of anyone's training.
        importlib.import_module("torch._dynamo")
        self.tool = importlib.import_module(module)
        self.baseline = memory("VmRSS")
        self.runner: Runner | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the request asked for."""
        if request["do"] == "build":
            self.runner = None
            gc.collect()
            # A high-water mark counts from here on only when it is set back.
            Path("/proc/self/clear_refs").write_text("5")
            work = request["work"]
            work["layers"] = tuple(work["layers"])
            runner: Runner = self.tool.build(Work(**work), **request["options"])
            self.runner = runner
            return {"period": runner.period, "imports_bytes": self.baseline}
        assert self.runner is not None
        return timed_run(self.runner, request["steps"], self.baseline)


def main() -> None:
    """Serve until the input ends."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    # Libraries print, and a line of theirs would break the protocol.
    os.dup2(2, 1)
    server = Server(sys.argv[1])
    print(json.dumps({"versions": versions()}), file=channel)
    for line in sys.stdin:
        try:
            answer = server.answer(json.loads(line))
        except Exception as error:  # a tool may fail in any way, and its row has to say how
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        print(json.dumps(answer), file=channel)


if __name__ == "__main__":
    main()
