"""The checks of settings, which their base class makes after each construction, are never skipped."""

from __future__ import annotations

import ast
from pathlib import Path

import saetrain

FILES = sorted(Path(saetrain.__file__).parent.rglob("*.py"))


def test_checks_of_subclasses_call_those_of_the_base() -> None:
    found, silent = 0, []
    for path in FILES:
        for cls in ast.walk(ast.parse(path.read_text())):
            if not isinstance(cls, ast.ClassDef) or not cls.bases:
                continue
            for method in cls.body:
                if isinstance(method, ast.FunctionDef) and method.name == "__post_init__":
                    found += 1
                    if "super().__post_init__()" not in map(ast.unparse, method.body):
                        silent.append(f"{path.name}: {cls.name}")
    assert found > 8
    assert not silent, silent
