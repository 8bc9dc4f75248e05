"""The conductor: one process per tool, told in turn to run, so that a change of the machine's speed hits all alike."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.cases import SHARED_WORKERS, Case, Tool
from benchmarks.machine import ROOT

JUDGED_SECONDS = 0.25
"""Length of a sample from which the kernel's clock of 10 ms says anything about the others."""
MAX_STEPS = 200
TIMEOUT = 900.0
"""Seconds that one request may take, the build of a kernel included."""

Say = Callable[[str], None]


class WorkerError(Exception):
    """A tool that could not start, build or run."""


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int = 5
    seconds: float = 1.0
    """Aimed length of a sample."""
    warmup: int = 2
    """Steps before the first sample, at least one period."""
    others_limit: float = 0.15
    """Share of the CPU used by others above which a sample is dropped."""
    threads: int = os.cpu_count() or 1


class Worker:
    """The process of one tool."""

    def __init__(self, tool: Tool, threads: int) -> None:
        python = str(ROOT / ".bench" / tool.environment / "bin" / "python") if tool.environment else sys.executable
        if not Path(python).exists():
            raise WorkerError("its environment is not there: make bench-peers makes it")
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - close() ends it
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.worker", tool.module],
            cwd=ROOT,
            env=environment(threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._versions: dict[str, str] | None = None

    @property
    def versions(self) -> dict[str, str]:
        """Of Python and the tool's packages; waits until the tool is imported."""
        if self._versions is None:
            self._versions = self._read()["versions"]
        assert self._versions is not None
        return self._versions

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request."""
        assert self.versions
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerError(self._last_words()) from error
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        timer = threading.Timer(TIMEOUT, self._process.kill)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if not line:
            raise WorkerError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _last_words(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().splitlines()
        return f"exit code {self._process.returncode}: {lines[-1] if lines else ''}"

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._errors.close()


def environment(threads: int) -> dict[str, str]:
    """Variables of a worker: no network, no trackers, all cores."""
    # OpenMP's wait policy stays as it is: idle threads spin for some milliseconds in all, and making them sleep at
    # once slowed small operations several times.
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "TOKENIZERS_PARALLELISM": "false",
    }


class Seat:
    """A tool in a case: its worker and what was recorded of it."""

    def __init__(self, tool: Tool, worker: Worker | None, error: str | None) -> None:
        self.tool, self.worker = tool, worker
        self.record: dict[str, Any] = {
            "name": tool.name,
            "peer": tool.peer,
            "options": tool.options,
            "changes": tool.changes,
            "samples": [],
        }
        self.steps = 0
        if error is not None:
            self.fail(error)

    def fail(self, error: str) -> None:
        """The tool is out of this case, and its row says why."""
        self.record["error"] = error
        self.worker = None

    def build(self, case: Case, plan: Plan) -> None:
        """Build and warm up; fixes how many steps a sample has."""
        assert self.worker is not None
        work = dataclasses.asdict(dataclasses.replace(case.work, **self.tool.changes))
        self.record["versions"] = self.worker.versions
        built = self.worker.ask(do="build", work=work, options=self.tool.options)
        self.record["imports_bytes"] = built["imports_bytes"]
        period = built["period"]
        warm = self.worker.ask(do="run", steps=max(plan.warmup, period))
        self.record["warmup_seconds"] = warm["seconds"]
        # A first step pays for allocations, and a first period for filling a buffer.
        last = min(warm["seconds"]) if period == 1 else sum(warm["seconds"][-period:]) / period
        self.steps = min(MAX_STEPS, max(1, math.ceil(plan.seconds / last / period)) * period)
        self.record["steps_per_sample"] = self.steps

    def sample(self, number: int, steps: int, others_limit: float) -> bool:
        """Take a sample; whether the machine was quiet."""
        assert self.worker is not None
        answer = self.worker.ask(do="run", steps=steps)
        dropped = answer["others_cpu"] > others_limit and answer["wall"] > JUDGED_SECONDS
        self.record["samples"].append({"round": number, "dropped": dropped, **answer})
        return not dropped


def attempt(seat: Seat, action: Callable[[], Any]) -> Any:
    """What the action gives; a failing tool is out, and the others go on."""
    if seat.worker is None:
        return None
    try:
        return action()
    except WorkerError as error:
        seat.fail(str(error))
        return None


def run_case(case: Case, seats: list[Seat], plan: Plan) -> dict[str, Any]:
    """All rounds of one case."""
    for seat in seats:
        attempt(seat, partial(seat.build, case, plan))
    for number in range(len(case.repeats) or min(plan.rounds, case.most_rounds)):
        turn = number % len(seats)
        for seat in seats[turn:] + seats[:turn]:
            steps = case.repeats[number] if case.repeats else seat.steps
            quiet = attempt(seat, partial(seat.sample, number, steps, plan.others_limit))
            if quiet is False:
                # A disturbed sample is taken once more, in the same round, and both are kept in the record.
                attempt(seat, partial(seat.sample, number, steps, plan.others_limit))
    return {
        "name": case.name,
        "group": case.group,
        "work": dataclasses.asdict(case.work),
        "tools": [seat.record for seat in seats],
    }


def seated(tools: tuple[Tool, ...], workers: dict[Tool, Worker | str], threads: int) -> list[Seat]:
    """A seat for each tool, on a worker of its own; workers are started side by side."""
    seats = []
    for tool in tools:
        if tool not in workers:
            try:
                workers[tool] = Worker(tool, threads)
            except WorkerError as error:
                workers[tool] = str(error)
        worker = workers[tool]
        seats.append(Seat(tool, None, worker) if isinstance(worker, str) else Seat(tool, worker, None))
    return seats


def conduct(cases: list[Case], plan: Plan, say: Say) -> Iterator[dict[str, Any]]:
    """The record of each case, as it is done."""
    for group, members in itertools.groupby(cases, key=lambda case: case.group):
        workers: dict[Tool, Worker | str] = {}
        try:
            for case in members:
                say(f"{case.name}: {', '.join(tool.name for tool in case.tools)}")
                record = run_case(case, seated(case.tools, workers, plan.threads), plan)
                samples = [sample for tool in record["tools"] for sample in tool["samples"]]
                dropped = sum(sample["dropped"] for sample in samples)
                if dropped:
                    say(f"  {dropped} of {len(samples)} samples dropped: others keep the CPU busy")
                yield record
                if group not in SHARED_WORKERS:
                    close(workers)
        finally:
            close(workers)


def close(workers: dict[Tool, Worker | str]) -> None:
    """End all processes."""
    for worker in workers.values():
        if isinstance(worker, Worker):
            worker.close()
    workers.clear()
