"""``metrics.jsonl``: one line per record, never a step twice and none missing, also after a crash."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from saetrain.files import fsync_dir, write_atomic
from saetrain.logs.base import LAST, Record, RunInfo, Sink
from saetrain.logs.console import say

NAME = "metrics.jsonl"


class JsonLines(Sink):
    """Appends; a resumed run first drops what was written behind its checkpoint, a fresh one sets older lines aside."""

    def __init__(self, info: RunInfo, every: int) -> None:
        super().__init__(every, info.steps)
        path = info.directory / NAME
        if info.resumed_step is not None and path.exists():
            write_atomic(path, "".join(_lines_until(path.read_text(), info.resumed_step)))
        elif path.exists() and path.stat().st_size:
            _set_aside(path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)

    def write(self, record: Record) -> None:
        """One JSON object; a figure that is not finite becomes null, for JSON has no NaN."""
        line = {
            "kind": record.kind,
            "step": record.step,
            "tokens": record.tokens,
            **finite(record.run),
            "saes": {name: finite(figures) for name, figures in record.saes.items()},
        }
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Flush to the disk."""
        os.fsync(self._file.fileno())

    def close(self, failed: bool) -> None:
        """Close the file; after a failure, what could not be written is already said."""
        try:
            self._file.close()
        except OSError:
            if not failed:
                raise


def set_aside(directory: Path) -> list[Path]:
    """The metrics files of earlier starts in ``directory``: ``metrics.jsonl.1`` and so on."""
    return sorted(path for path in directory.glob(f"{NAME}.*") if path.suffix[1:].isdecimal())


def _set_aside(path: Path) -> None:
    """Rename the metrics of a run that begins anew without --overwrite, such as one whose checkpoints were removed."""
    number = 1 + max((int(old.suffix[1:]) for old in set_aside(path.parent)), default=0)
    old = path.with_name(f"{NAME}.{number}")
    os.replace(path, old)
    fsync_dir(path.parent)
    say(f"the metrics of the earlier start are kept in {old}")


def finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    """The figures with None for what JSON can't write."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def _lines_until(text: str, step: int) -> list[str]:
    """The whole lines of ``text`` whose step is at most ``step``; a line that a crash cut short is dropped."""
    kept = []
    for line in text.splitlines(keepends=True):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["step"] <= step and line.endswith("\n") and record["kind"] not in LAST:
            kept.append(line)
    return kept
