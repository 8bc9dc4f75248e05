"""Only the files of an architecture, of its kernels and of its formats name it or read its own attributes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import saetrain

ROOT = Path(saetrain.__file__).parent
OWN_FILES = ("coders/", "ops/", "training/steps/", "interop/", "optim/lr_rule.py")
NAMES = re.compile("topk|auxk", re.IGNORECASE)
FLAGS = re.compile("--auxk|auxk_|^topk$")


def identifiers(node: ast.AST) -> Iterator[str]:
    """Yield the names that a node of the syntax tree uses or defines."""
    for value in (getattr(node, name, None) for name in ("id", "attr", "name", "arg", "asname")):
        if isinstance(value, str):
            yield value


def find_names(tree: ast.AST) -> list[str]:
    """Return what a file has of an architecture: identifiers, flags and settings, and the attribute k of a coder."""
    # torch.topk and Tensor.topk are searches, and saetrain.ops has one for everybody.
    allowed = {"topk"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("saetrain.ops"):
            allowed.update(alias.name for alias in node.names)
    found = []
    for node in ast.walk(tree):
        found += [name for name in identifiers(node) if NAMES.search(name) and name not in allowed]
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and FLAGS.search(node.value):
            found.append(node.value)
        # The settings of every coder have a k.
        if isinstance(node, ast.Attribute) and node.attr == "k" and not ast.unparse(node.value).endswith(".sae"):
            found.append(ast.unparse(node))
    return found


def test_no_other_file_names_an_architecture() -> None:
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        place = path.relative_to(ROOT).as_posix()
        if not place.startswith(OWN_FILES):
            wrong += [f"{place}: {name}" for name in find_names(ast.parse(path.read_text()))]
    assert not wrong, wrong


def test_names_of_an_architecture_are_found() -> None:
    source = "from saetrain.coders import TopK\nauxk_alpha = coder.k\nlog('pass --auxk_alpha')\nf(k_auxk=x.topk(3))"
    assert len(find_names(ast.parse(source))) == 5
    assert not find_names(ast.parse("from saetrain.ops.sparse import topk_two_stage as t\nt(config.sae.k, x.topk(3))"))
