"""A function fits on a screen, a file holds one idea, and every public one says what it is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import saetrain

ROOT = Path(saetrain.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def test_functions_fit_on_a_screen_and_files_hold_one_idea() -> None:
    long = [path.name for path in FILES if len(path.read_text().splitlines()) > 400]
    for path in FILES:
        for node in functions(ast.parse(path.read_text())):
            if (node.end_lineno or 0) - node.lineno + 1 > 60:
                long.append(f"{path.name}: {node.name}")
    assert not long, long


def test_public_things_have_docstrings() -> None:
    bare = []
    for path in FILES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        for node in tree.body:
            if isinstance(node, (Function, ast.ClassDef)) and not node.name.startswith("_"):
                if not ast.get_docstring(node):
                    bare.append(f"{path.name}: {node.name}")
                for inner in node.body if isinstance(node, ast.ClassDef) else []:
                    if isinstance(inner, Function) and not inner.name.startswith("_") and not ast.get_docstring(inner):
                        bare.append(f"{path.name}: {node.name}.{inner.name}")
    assert not bare, bare


def test_no_pickle_and_no_eval() -> None:
    for path in FILES:
        text = path.read_text()
        assert "import pickle" not in text, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), path
