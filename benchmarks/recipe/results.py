"""The file of results: one entry a run with its commit, rewritten after each, so that what was stopped goes on."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine, describe_run
from benchmarks.recipe.task import Task

Result = dict[str, Any]
"""What a run gave, by figure; or its ``error``."""


class Results:
    """Tasks with what they gave; ``timings`` {tool: wall seconds of runs that had the machine for themselves}."""

    def __init__(self, path: Path, module: str, arguments: Sequence[str] = ()) -> None:
        self._path = path
        stored = json.loads(path.read_text()) if path.exists() else {}
        self.runs: list[tuple[Task, Result]] = [
            (Task(**entry["task"]), entry["result"]) for entry in stored.get("runs", [])
        ]
        self.timings: dict[str, list[float]] = stored.get("seconds", {})
        command = shlex.join(["python", "-m", module, *arguments])
        self._about = {"run": {**describe_run([]), "command": command}, "machine": describe_machine()}

    def get(self, task: Task) -> Result | None:
        """What the task gave, if it is done."""
        return next((result for known, result in self.runs if known == task), None)

    def tried(self, like: Task) -> dict[float, float]:
        """{rate: FVU} of the runs that differ from ``like`` in nothing else; infinite where one failed."""
        return {
            task.lr: float(result.get("fvu", float("inf")))
            for task, result in self.runs
            if task.lr is not None and dataclasses.replace(task, lr=like.lr) == like
        }

    def renew(self, tasks: Collection[Task], again: bool) -> None:
        """Forget what these gave where it is to be measured ``again``; else say where other code gave it."""
        if again:
            self.drop(tasks)
            return
        now = describe_run([])["commit"]
        others = {str(result.get("commit")) for task, result in self.runs if task in tasks} - {now}
        if others:
            print(f"some results are of other code ({', '.join(sorted(others))}; now {now}): --again measures anew")

    def drop(self, tasks: Collection[Task]) -> None:
        """Forget what these gave."""
        self.runs = [(task, result) for task, result in self.runs if task not in tasks]

    def add(self, task: Task, result: Result) -> None:
        """Keep a result, on the disk too, with the commit of the code that is here now."""
        self.runs.append((task, {**result, "commit": describe_run([])["commit"]}))
        self.write()

    def write(self) -> None:
        """Write the file."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._path.with_suffix(".new")
        runs = [{"task": dataclasses.asdict(task), "result": result} for task, result in self.runs]
        fresh.write_text(json.dumps({**self._about, "seconds": self.timings, "runs": runs}, indent=1) + "\n")
        fresh.replace(self._path)
