"""Times cases: one worker process per tool, all of them alive for the whole case.

The tools take turns, so that a change of the machine's speed affects all of them alike.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import statistics
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

MIN_JUDGED_S = 0.25
"""Shorter samples are kept in any case: the kernel's clock of 10 ms is too coarse to measure other processes."""
MAX_STEPS = 200
REQUEST_TIMEOUT_S = 900.0
"""Includes the compilation of a kernel."""

Log = Callable[[str], None]


class WorkerError(Exception):
    """A tool could not start, build or run."""


@dataclass(frozen=True)
class MeasurePlan:
    """How much is measured."""

    rounds: int = 5
    seconds: float = 1.0
    """Target length of a sample."""
    warmup: int = 2
    """Steps before the first sample, at least one period."""
    max_other_cpu: float = 0.15
    """Share of the CPU used by other processes above which a sample is dropped."""
    threads: int = os.cpu_count() or 1


class Worker:
    """The process of one tool."""

    def __init__(self, tool: Tool, threads: int) -> None:
        python = str(ROOT / ".bench" / tool.environment / "bin" / "python") if tool.environment else sys.executable
        if not Path(python).exists():
            raise WorkerError("its environment does not exist: run make bench-peers")
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - close() ends it
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.worker", tool.module],
            cwd=ROOT,
            env=worker_environment(threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self._versions: dict[str, str] | None = None

    @property
    def versions(self) -> dict[str, str]:
        """Versions of Python and the tool's packages; waits until the tool is imported."""
        if self._versions is None:
            self._versions = self._read_reply()["versions"]
        assert self._versions is not None
        return self._versions

    def request(self, **request: Any) -> dict[str, Any]:
        """Send a request and return the reply."""
        assert self.versions
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise WorkerError(self._describe_exit()) from error
        return self._read_reply()

    def _read_reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        timer = threading.Timer(REQUEST_TIMEOUT_S, self._process.kill)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if not line:
            raise WorkerError(self._describe_exit())
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply

    def _describe_exit(self) -> str:
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().splitlines()
        return f"exit code {self._process.returncode}: {lines[-1] if lines else ''}"

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._errors.close()


def worker_environment(threads: int) -> dict[str, str]:
    """Environment variables of a worker: no network, no trackers, ``threads`` threads."""
    # OpenMP's wait policy keeps its default: idle threads spin for a few milliseconds in total, and making them sleep
    # at once slowed small operations down several times.
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "TOKENIZERS_PARALLELISM": "false",
    }


class ToolRun:
    """One tool in one case: its worker, the error that ended it, and its samples."""

    def __init__(self, tool: Tool, worker: Worker | None, error: str | None) -> None:
        self.tool, self.worker, self.error = tool, worker, error
        self.versions: dict[str, str] = {}
        self.samples: list[dict[str, Any]] = []
        self.steps = 0
        self._warmup_steps = 0

    def fail(self, error: str) -> None:
        """Exclude the tool from the rest of this case."""
        self.error, self.worker = error, None

    def build(self, case: Case, plan: MeasurePlan) -> None:
        """Build the workload, warm up, and choose the number of steps per sample."""
        assert self.worker is not None
        work = dataclasses.asdict(dataclasses.replace(case.work, **self.tool.changes))
        self.versions = self.worker.versions
        period = self.worker.request(do="build", work=work, options=self.tool.options)["period"]
        self._warmup_steps = max(plan.warmup, period)
        seconds = self.worker.request(do="run", steps=self._warmup_steps)["seconds"]
        # The first step includes allocations, and the first period includes filling a buffer.
        last = min(seconds) if period == 1 else sum(seconds[-period:]) / period
        self.steps = min(MAX_STEPS, max(1, math.ceil(plan.seconds / last / period)) * period)

    def take_sample(self, number: int, steps: int, max_other_cpu: float) -> bool:
        """Take a sample of round ``number``; returns whether other processes left the machine alone."""
        assert self.worker is not None
        reply = self.worker.request(do="run", steps=steps)
        dropped = reply["others_cpu"] > max_other_cpu and reply["wall"] > MIN_JUDGED_S
        self.samples.append({"round": number, "dropped": dropped, **reply})
        return not dropped

    def summarize(self, rounds: int, tokens: int) -> dict[str, Any]:
        """What the results file keeps.

        ``seconds_per_step`` is the mean of each round (None where no sample was kept), ``peak_bytes`` the largest peak
        of memory, and ``memory`` (tokens trained, peak bytes) after each sample.
        """
        seconds = [
            next((statistics.fmean(s["seconds"]) for s in self.samples if s["round"] == i and not s["dropped"]), None)
            for i in range(rounds)
        ]
        steps = itertools.accumulate((len(s["seconds"]) for s in self.samples), initial=self._warmup_steps)
        peaks = [sample["peak_bytes"] for sample in self.samples]
        return {
            "name": self.tool.name,
            "peer": self.tool.peer,
            "changes": self.tool.changes,
            "seconds_per_step": seconds,
            "dropped": sum(sample["dropped"] for sample in self.samples),
            "peak_bytes": max(peaks, default=None),
            "memory": [[count * tokens, peak] for count, peak in zip(list(steps)[1:], peaks, strict=True)],
            **({} if self.error is None else {"error": self.error}),
        }


def run_unless_failed(run: ToolRun, action: Callable[[], Any]) -> Any:
    """Call ``action``; if it fails, exclude the tool and continue with the others."""
    if run.worker is None:
        return None
    try:
        return action()
    except WorkerError as error:
        run.fail(str(error))
        return None


def measure_case(case: Case, runs: list[ToolRun], plan: MeasurePlan) -> dict[str, Any]:
    """Run all rounds of one case."""
    for run in runs:
        run_unless_failed(run, partial(run.build, case, plan))
    rounds = len(case.repeats) or min(plan.rounds, case.max_rounds)
    for number in range(rounds):
        turn = number % len(runs)
        for run in runs[turn:] + runs[:turn]:
            steps = case.repeats[number] if case.repeats else run.steps
            quiet = run_unless_failed(run, partial(run.take_sample, number, steps, plan.max_other_cpu))
            if quiet is False:
                # A disturbed sample is taken once more in the same round.
                run_unless_failed(run, partial(run.take_sample, number, steps, plan.max_other_cpu))
    tools = [run.summarize(rounds, case.work.tokens) for run in runs]
    if not case.repeats:
        for tool in tools:
            del tool["memory"]
    return {"name": case.name, "group": case.group, "work": dataclasses.asdict(case.work), "tools": tools}


def start_workers(tools: tuple[Tool, ...], workers: dict[Tool, Worker | str], threads: int) -> list[ToolRun]:
    """A run of each tool on its own worker; ``workers`` holds those that run already, or the error of their start."""
    runs = []
    for tool in tools:
        if tool not in workers:
            try:
                workers[tool] = Worker(tool, threads)
            except WorkerError as error:
                workers[tool] = str(error)
        worker = workers[tool]
        runs.append(ToolRun(tool, None, worker) if isinstance(worker, str) else ToolRun(tool, worker, None))
    return runs


def measure_cases(
    cases: list[Case], plan: MeasurePlan, versions: dict[str, set[str]], log: Log
) -> Iterator[dict[str, Any]]:
    """Yield the record of each case when it is done, and add the packages' versions to ``versions``."""
    for group, members in itertools.groupby(cases, key=lambda case: case.group):
        workers: dict[Tool, Worker | str] = {}
        try:
            for case in members:
                log(f"{case.name}: {', '.join(tool.name for tool in case.tools)}")
                runs = start_workers(case.tools, workers, plan.threads)
                record = measure_case(case, runs, plan)
                dropped = sum(tool["dropped"] for tool in record["tools"])
                if dropped:
                    count = sum(len(run.samples) for run in runs)
                    log(f"  {dropped} of {count} samples dropped: other processes use the CPU")
                for run in runs:
                    for name, version in run.versions.items():
                        versions.setdefault(name, set()).add(version)
                yield record
                if group not in SHARED_WORKERS:
                    close_workers(workers)
        finally:
            close_workers(workers)


def close_workers(workers: dict[Tool, Worker | str]) -> None:
    """End all processes."""
    for worker in workers.values():
        if isinstance(worker, Worker):
            worker.close()
    workers.clear()
