"""Results files: JSON with one line per record, and numbers rounded to eight significant digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DIGITS = 8
MAX_LINE = 320
"""Characters of a record that is kept on one line."""


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write the file through a temporary one, so that an interrupted write leaves the previous version."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text(format_json(round_floats(results)) + "\n")
    temporary.replace(path)


def round_floats(value: Any) -> Any:
    """Round every float in nested dictionaries and lists."""
    if isinstance(value, dict):
        return {key: round_floats(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [round_floats(each) for each in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def format_json(value: Any, indent: str = "") -> str:
    """Format containers on one line where they fit, else one item per line."""
    line = json.dumps(value)
    if not value or not isinstance(value, (dict, list)) or len(line) <= MAX_LINE:
        return line
    inner = indent + " "
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {format_json(each, inner)}" for key, each in value.items()]
        return "{\n" + ",\n".join(inner + item for item in items) + f"\n{indent}}}"
    return "[\n" + ",\n".join(inner + format_json(each, inner) for each in value) + f"\n{indent}]"
