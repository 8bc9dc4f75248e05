"""The process of one tool: builds a workload, runs steps on request, and replies with their times.

Requests are JSON lines on stdin: ``{"do": "build", "work": …, "options": …}`` and ``{"do": "run", "steps": n}``.
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
    """A workload that is ready to run."""

    period: int
    """Steps after which the cost repeats: those between two refills of a buffer, else 1."""

    def run(self, steps: int) -> list[float]:
        """Run the next ``steps`` training steps and return the seconds of each."""


def read_memory(field: str) -> int:
    """Bytes of ``VmRSS`` or ``VmHWM`` of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def read_busy_seconds() -> float:
    """CPU seconds that all processes of the machine have used so far, including time stolen by the host."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(
        int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect the results."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def take_sample(runner: Runner, steps: int, import_bytes: int) -> dict[str, Any]:
    """Seconds per step, peak memory less ``import_bytes``, and the share of the CPU that other processes used."""
    busy, own, start = read_busy_seconds(), time.process_time(), time.perf_counter()
    seconds = runner.run(steps)
    wall = time.perf_counter() - start
    own = time.process_time() - own
    others = max(0.0, read_busy_seconds() - busy - own) / (wall * (os.cpu_count() or 1))
    assert len(seconds) == steps, (len(seconds), steps)
    return {
        "seconds": seconds,
        "wall": wall,
        "others_cpu": others,
        "peak_bytes": read_memory("VmHWM") - import_bytes,
    }


class RequestHandler:
    """Handles the requests for one tool."""

    def __init__(self, module: str) -> None:
        # torch.optim imports dynamo at its first step; that memory must not count as memory of the training.
        importlib.import_module("torch._dynamo")
        self.tool = importlib.import_module(module)
        self.import_bytes = read_memory("VmRSS")
        self.runner: Runner | None = None

    def handle_request(self, request: dict[str, Any]) -> dict[str, Any]:
        """Build or run, and return the reply."""
        if request["do"] == "build":
            self.runner = None
            gc.collect()
            # Resets the high-water mark of the process's memory.
            Path("/proc/self/clear_refs").write_text("5")
            work = request["work"]
            work["layers"] = tuple(work["layers"])
            runner: Runner = self.tool.build(Work(**work), **request["options"])
            self.runner = runner
            return {"period": runner.period}
        assert self.runner is not None
        return take_sample(self.runner, request["steps"], self.import_bytes)


def main() -> None:
    """Handle requests until the input ends."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    # Libraries print to stdout, which would break the protocol.
    os.dup2(2, 1)
    handler = RequestHandler(sys.argv[1])
    print(json.dumps({"versions": package_versions()}), file=channel)
    for line in sys.stdin:
        try:
            reply = handler.handle_request(json.loads(line))
        except Exception as error:  # a tool may fail in any way, and its row shows the error
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        print(json.dumps(reply), file=channel)


if __name__ == "__main__":
    main()
