"""Imports point downwards: base < maths < stages < applications < config, runs, sae < cli.

Stages do not import one another, and neither do applications.
"""

from __future__ import annotations

import ast
from pathlib import Path

import saetrain

ROOT = Path(saetrain.__file__).parent
LEVELS = [
    {"errors", "untrusted", "small_files", "settings", "typed_values", "types"}
    | {"distributed", "atomic_io", "manifest", "hub", "async_copy"},
    {"losses", "metrics", "ops", "optim"},
    {"data", "activations", "coders", "logs"},
    {"training", "evaluation", "interop", "features"},
    {"config", "explore", "grid", "report", "runs", "sae", "splicing"},
    {"cli", "cli_help", "cli_suggestions", "cli_words"},
]
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
INDEPENDENT = LEVELS[2] | LEVELS[3]
OPTIONAL = {
    "wandb": {"logs/wandb.py"},
    "tensorboard": {"logs/tensorboard.py"},
    "starlette": {"explore/server.py"},
    "uvicorn": {"explore/server.py"},
    "triton": {"ops/triton/kernels.py", "ops/triton/topk.py"},
}


def family(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def allowed(source: str, target: str) -> bool:
    if source == target:
        return True
    if source in INDEPENDENT and target in INDEPENDENT and LEVEL[source] == LEVEL[target]:
        return False
    return LEVEL[target] <= LEVEL[source]


def test_imports_point_downwards() -> None:
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        source = family(path)
        if source in ("__init__", "__main__"):
            continue
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "saetrain":
                continue
            if parts[1] not in LEVEL:
                assert source == "runs", f"{path}: imports the package's root"
                continue
            if not allowed(source, parts[1]):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, wrong


def test_every_file_has_a_place() -> None:
    unknown = {family(path) for path in ROOT.rglob("*.py")} - LEVEL.keys() - {"__init__", "__main__"}
    assert not unknown, unknown


def test_optional_packages_are_imported_in_their_files_alone() -> None:
    for package, homes in OPTIONAL.items():
        users = {
            path.relative_to(ROOT).as_posix()
            for path in ROOT.rglob("*.py")
            if any(name.split(".")[0] == package for name in imports(path))
        }
        assert users <= homes, (package, users)
