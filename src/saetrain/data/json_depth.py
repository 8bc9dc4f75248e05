"""Depth limit of JSON rows: the parser of pyarrow recurses, and ends the process on rows of some 10,000 brackets."""

from __future__ import annotations

import io
from typing import Any

from saetrain.small_files import MAX_DEPTH, measure_depth


def limit_json_depth() -> None:
    """Make the library `datasets` raise ValueError for JSON deeper than MAX_DEPTH, before pyarrow reads it."""
    from datasets.packaged_modules.json import json as reader

    if not isinstance(reader.paj, _ShallowJson):
        reader.paj = _ShallowJson(reader.paj)


class _ShallowJson:
    """The module ``pyarrow.json`` with a depth limit."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def read_json(self, source: io.BytesIO, **options: Any) -> Any:
        """Return the table of the JSON rows in ``source``."""
        depth = measure_depth(source.getvalue())
        if depth > MAX_DEPTH:
            raise ValueError(describe_depth(depth))
        return self._module.read_json(source, **options)


def describe_depth(depth: int) -> str:
    """Return what is wrong with a row of this depth."""
    return f"is nested {depth:,} levels deep; at most {MAX_DEPTH} are allowed"
