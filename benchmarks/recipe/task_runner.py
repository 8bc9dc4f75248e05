"""Runs tasks in parallel, each in its own process and in the environment of its tool."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.recipe.results import Result, Results
from benchmarks.recipe.sweep import SAETRAIN
from benchmarks.recipe.task import Task


def add_run_options(parser: argparse.ArgumentParser, out: Path) -> None:
    """Add the options that all programs of this package share."""
    parser.add_argument("--again", action="store_true", help="repeat runs that have a result")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="number of parallel runs")
    parser.add_argument("--threads", type=int, default=1, help="threads per run")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / ".bench" / "recipe", help="folder for text and activations"
    )
    parser.add_argument("--out", type=Path, default=out, help="results file")


def find_python(tool: str) -> Path:
    """Path of the Python interpreter in the tool's environment."""
    name = tool.split()[0]
    return Path(sys.executable) if name == SAETRAIN else ROOT / ".bench" / name / "bin" / "python"


def run_task(task: Task, activations: Path, threads: int) -> Result:
    """Run the task in its own process and return its result."""
    command = [str(find_python(task.tool)), "-m", "benchmarks.recipe.worker", str(activations), str(threads)]
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    words = json.dumps(dataclasses.asdict(task))
    done = subprocess.run([*command, words], cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    # A killed run (out of memory, or by hand) is not a result of the tool.
    if done.returncode < 0:
        raise SystemExit(f"{words}: ended by signal {-done.returncode}; start again to continue")
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]}
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def run_tasks(
    missing_tasks: Callable[[], list[Task]],
    results: Results,
    activations: Callable[[str], Path],
    *,
    processes: int,
    threads: int,
) -> None:
    """Run tasks until none is missing; the next tasks may depend on earlier results.

    ``activations`` returns the file of a site.
    """
    running: dict[Future[Result], Task] = {}
    with ThreadPoolExecutor(processes) as pool:
        while True:
            for task in missing_tasks():
                if task not in running.values() and len(running) < processes:
                    running[pool.submit(run_task, task, activations(task.site), threads)] = task
            if not running:
                return
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                task, result = running.pop(future), future.result()
                results.add(task, result)
                _log_result(task, result)


def _log_result(task: Task, result: Result) -> None:
    size = f"{task.tool}, {task.site}, F={task.latents}, k={task.k}, {task.steps} steps, seed {task.seed}"
    metrics = {name: round(value, 4) for name, value in result.items() if isinstance(value, float)}
    print(f"{size}, lr {task.lr or 'default'}:", metrics or result, flush=True)
