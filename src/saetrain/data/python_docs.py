"""A data set of Python's own documentation: the chapters of its reference and the docstrings of its standard library.

Python files are parsed and not imported, because importing some of them opens windows or browsers. Only compiled
modules are imported, because they have no source.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pkgutil
import pydoc_data.topics
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "site-packages", "dist-packages"}
SKIPPED_MODULES = ("_test", "xx", "_xx")
MIN_CHARACTERS = 20
HELD_OUT_ONE_IN = 10
"""One in this many texts is held out."""

NamedText = tuple[str, str]
"""(name of the chapter or object, text)."""


def write_splits(folder: Path) -> None:
    """Write ``train.jsonl`` and ``test.jsonl`` to ``folder``; files that are already correct are not rewritten."""
    folder.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {"train": [], "test": []}
    for name, text in drop_duplicates(iter_texts()):
        held_out = zlib.crc32(text.encode()) % HELD_OUT_ONE_IN == 0
        lines["test" if held_out else "train"].append(json.dumps({"name": name, "text": text}) + "\n")
    for split, content in lines.items():
        path = folder / f"{split}.jsonl"
        if not path.exists() or path.read_text() != "".join(content):
            path.write_text("".join(content))


def drop_duplicates(texts: Iterable[NamedText]) -> list[NamedText]:
    """Return the texts without duplicates, ignoring case and white space, and without very short texts."""
    found: dict[str, NamedText] = {}
    for name, text in texts:
        key = " ".join(text.casefold().split())
        if len(key) >= MIN_CHARACTERS:
            found.setdefault(key, (name, inspect.cleandoc(text)))
    return list(found.values())


def iter_texts() -> Iterator[NamedText]:
    """Yield the chapters, then the docstrings of Python files, then those of compiled modules."""
    for name, text in sorted(pydoc_data.topics.topics.items()):
        yield f"chapter '{name}'", text
    library = Path(sysconfig.get_path("stdlib"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path in sorted(library.rglob("*.py")):
            relative_path = path.relative_to(library)
            if not SKIPPED_FOLDERS & set(relative_path.parts):
                yield from iter_source_docstrings(
                    path, ".".join(relative_path.with_suffix("").parts).removesuffix(".__init__")
                )
        compiled = {module.name for module in pkgutil.iter_modules([str(library / "lib-dynload")])}
        for name in sorted(compiled | set(sys.builtin_module_names)):
            if not name.startswith(SKIPPED_MODULES):
                yield from iter_compiled_docstrings(name)


def iter_source_docstrings(path: Path, module: str) -> Iterator[NamedText]:
    """Yield the docstrings of a file's module, classes and functions; none if this Python can't parse the file."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    yield from _iter_docstrings(tree, module)


def _iter_docstrings(node: Any, name: str) -> Iterator[NamedText]:
    text = ast.get_docstring(node)
    if text:
        yield name, text
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _iter_docstrings(child, f"{name}.{child.name}")


def iter_compiled_docstrings(module: str) -> Iterator[NamedText]:
    """Yield the docstrings of a compiled module, its functions, classes and methods; none if it can't be imported."""
    try:
        yield from _iter_member_docstrings(importlib.import_module(module), module, depth=2)
    except ImportError:
        return


def _iter_member_docstrings(value: Any, name: str, depth: int) -> Iterator[NamedText]:
    text = getattr(value, "__doc__", None)
    if isinstance(text, str):
        yield name, text
    if depth and (inspect.ismodule(value) or inspect.isclass(value)):
        for key, member in sorted(vars(value).items()):
            if callable(member) or inspect.isdatadescriptor(member) or inspect.ismethoddescriptor(member):
                yield from _iter_member_docstrings(member, f"{name}.{key}", depth - 1)
