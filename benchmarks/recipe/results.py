"""The results file of a sweep: one line per run, written after each run, so that an interrupted sweep can continue."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine, describe_run
from benchmarks.recipe.task import Task
from benchmarks.results_file import write_results

Result = dict[str, Any]
"""Metrics of a run by name, or its ``error``."""
KEPT = ("fvu", "never_fired", "dead_by_window", "l0", "lr", "error")
"""Entries of a result that the file keeps, with the commit."""
DEFAULTS = {each.name: each.default for each in dataclasses.fields(Task)} | {"options": {}}


class Results:
    """Tasks and their results; ``timings`` {tool: wall seconds of runs that were alone on the machine}."""

    def __init__(self, path: Path, module: str, arguments: Sequence[str] = ()) -> None:
        self._path = path
        stored = json.loads(path.read_text()) if path.exists() else {}
        self.runs: list[tuple[Task, Result]] = [
            (Task(**entry["task"]), entry["result"]) for entry in stored.get("runs", [])
        ]
        self.timings: dict[str, list[float]] = stored.get("seconds", {})
        self.versions: dict[str, list[str]] = stored.get("versions", {})
        command = shlex.join(["python", "-m", module, *arguments])
        self._about = {"run": {**describe_run([]), "command": command}, "machine": describe_machine()}

    def get(self, task: Task) -> Result | None:
        """The task's result, or None if it has not run."""
        return next((result for known, result in self.runs if known == task), None)

    def tried_rates(self, like: Task) -> dict[float, float]:
        """{rate: FVU} of the runs that differ from ``like`` only in the rate; infinite for a failed run."""
        return {
            task.lr: float(result.get("fvu", float("inf")))
            for task, result in self.runs
            if task.lr is not None and dataclasses.replace(task, lr=like.lr) == like
        }

    def discard_if_again(self, tasks: Collection[Task], again: bool) -> None:
        """Discard the results of ``tasks`` if ``again``; otherwise print which commits they are from."""
        if again:
            self.discard(tasks)
            return
        now = describe_run([])["commit"]
        others = {str(result.get("commit")) for task, result in self.runs if task in tasks} - {now}
        if others:
            print(f"some results are from other commits ({', '.join(sorted(others))}; now {now}): --again repeats them")

    def discard(self, tasks: Collection[Task]) -> None:
        """Discard the results of ``tasks``."""
        self.runs = [(task, result) for task, result in self.runs if task not in tasks]

    def add(self, task: Task, result: Result) -> None:
        """Add a result with the current commit, and write the file."""
        for name, version in result.get("versions", {}).items():
            self.versions[name] = sorted({*self.versions.get(name, []), version})
        kept = {name: result[name] for name in KEPT if name in result}
        self.runs.append((task, {**kept, "commit": describe_run([])["commit"]}))
        self.write()

    def write(self) -> None:
        """Write the file."""
        runs = [{"task": changed_fields(task), "result": result} for task, result in self.runs]
        head = {**self._about, "versions": self.versions, "seconds": self.timings}
        write_results(self._path, {**head, "runs": runs})


def changed_fields(task: Task) -> dict[str, Any]:
    """The task's fields that differ from their defaults."""
    return {name: value for name, value in dataclasses.asdict(task).items() if value != DEFAULTS[name]}
