"""Checkpoints: a folder each, written beside its place and renamed into it, so that a crash leaves whole ones only."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saetrain.atomic_io import fsync_dir, hash_file, write_json
from saetrain.errors import SaetrainError
from saetrain.types import shown_default

MAX_CHECKPOINTS = 2
"""Checkpoints that stay on disk."""
MAX_INTERVAL_MINUTES = 10.0
"""Minutes between checkpoints at the most."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Output: where the run lies, and when it is saved."""

    save_dir: str = "./output"
    """Folder of all runs."""
    run_name: Annotated[str | None, shown_default("made from model, layers, k and width", "NAME")] = None
    """Folder of this run inside it."""
    save_every: int = 1000
    """Optimizer steps between checkpoints (and at least every 10 minutes)."""
    resume: bool = False
    """Go on from the run's last checkpoint; without one, start fresh."""
    overwrite: bool = False
    """Delete an existing run of this name first."""
    save_sparsify: bool = True
    """Write sae.safetensors, sparsify's layout of the weights, beside SAELens'."""

    def __post_init__(self) -> None:
        if self.save_every < 1:
            raise SaetrainError(f"--save_every {self.save_every}: must be at least 1")
        if self.resume and self.overwrite:
            raise SaetrainError("--resume and --overwrite can't be given together: one keeps the run, one deletes it")
        if self.run_name is not None and (not self.run_name or Path(self.run_name).name != self.run_name):
            raise SaetrainError(f"--run_name {self.run_name!r}: must be a plain folder name without '/'")


FORMAT_VERSION = 4
"""Of what a checkpoint holds: raise it when a run could not go on from an older one."""


@dataclass(frozen=True)
class Checkpoint:
    """What was read back: {SAE: tensors} and the run's own values."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    values: dict[str, Any]


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]
) -> Path:
    """Write ``folder/step_<step>``, and drop all but the last few.

    Raises OSError or SafetensorError (disk full); the checkpoints before it are then as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / _step_folder_name(step)
    for unfinished in folder.glob(".writing_*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    temporary = folder / f".writing_{step:09d}"
    try:
        temporary.mkdir()
        names = {}
        for number, (name, content) in enumerate(tensors.items()):
            names[name] = f"sae_{number:03d}.safetensors"
            save_file({key: value.contiguous() for key, value in content.items()}, temporary / names[name])
        write_json(temporary / "state.json", {"format": FORMAT_VERSION, **values, "step": step, "files": names})
        hashes = {file.name: hash_file(file) for file in sorted(temporary.iterdir())}
        _fsync_files(temporary)
        write_json(temporary / "manifest.json", {"sha256": hashes})
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        fsync_dir(folder)
    except (OSError, SafetensorError):
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in list_checkpoints(folder)[:-MAX_CHECKPOINTS]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _fsync_files(folder: Path) -> None:
    for file in folder.iterdir():
        with open(file, "rb+") as handle:
            os.fsync(handle.fileno())


def list_checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def rename_suspect(folder: Path, step: int) -> int | None:
    """Rename the checkpoint of ``step`` where one before it is there; gives that one's step, else None."""
    checkpoints = list_checkpoints(folder)
    if len(checkpoints) < 2 or checkpoints[-1].name != _step_folder_name(step):
        return None
    suspect = folder / f"suspect_{checkpoints[-1].name}"
    shutil.rmtree(suspect, ignore_errors=True)
    os.replace(checkpoints[-1], suspect)
    return int(checkpoints[-2].name.removeprefix("step_"))


def _step_folder_name(step: int) -> str:
    return f"step_{step:09d}"


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files by its manifest, or None."""
    try:
        expected = json.loads((path / "manifest.json").read_text())["sha256"]
        for name, digest in expected.items():
            if not (path / name).exists():
                return f"{name} is missing"
            if hash_file(path / name) != digest:
                return f"{name} does not match its hash"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its manifest.json or a file that it names can't be read"
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read an undamaged checkpoint; SaetrainError when another version wrote it."""
    values = json.loads((path / "state.json").read_text())
    if values.get("format") != FORMAT_VERSION:
        raise SaetrainError(
            f"--resume: checkpoint {path} is of format {values.get('format')}, and this version goes on from {FORMAT_VERSION}; "
            "end the run with the version that began it, or start one of another --run_name"
        )
    tensors = {name: load_file(path / file) for name, file in values["files"].items()}
    return Checkpoint(path, tensors, values)


def find_newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """(the newest undamaged checkpoint or None, a line for each newer one that is damaged).

    The damaged ones are renamed where one before them is whole, so that no later clean-up takes them for the newest.
    """
    damaged_paths: list[Path] = []
    remarks: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        problem = find_damage(path)
        if problem is None:
            for damaged in damaged_paths:
                renamed = damaged.with_name(f"damaged_{damaged.name}")
                shutil.rmtree(renamed, ignore_errors=True)
                os.replace(damaged, renamed)
            return path, remarks
        damaged_paths.append(path)
        remarks.append(f"checkpoint {path} is damaged ({problem})")
    return None, remarks
