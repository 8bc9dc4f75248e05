"""The messages that docs/troubleshooting.md explains are messages that the program has."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import saetrain

ROOT = Path(saetrain.__file__).parent
DOCS = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
FOREIGN = {"header", "cuda"}


def texts() -> str:
    """Every string of the source, with the pieces of one f-string joined by a mark."""
    found = []
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "\0" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_messages_in_the_docs_exist() -> None:
    source = texts()
    rows = [line for line in DOCS.read_text().splitlines() if line.startswith("| ") and "`" in line]
    assert len(rows) > 25
    missing = []
    for row in rows:
        for message in re.findall(r"`([^`]+)`", row.split("|")[1]):
            for piece in re.split(r"…|--[a-zA-Z_]+|\bN\b|'t5'|\d+(?: to \d+)?", message):
                words = piece.strip(" :,;()?'")
                if len(words) > 5 and words not in FOREIGN and words not in source:
                    missing.append(words)
    assert not missing, missing
