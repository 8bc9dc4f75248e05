"""Checkpoints: folders that are written under a temporary name and renamed when complete, so that none is partial."""

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

from saetrain.atomic_io import fsync_dir, fsync_files, hash_file, write_json
from saetrain.distributed import record_progress
from saetrain.errors import SaetrainError
from saetrain.types import shown_default

MAX_CHECKPOINTS = 2
"""Number of checkpoints to keep on disk."""
MAX_INTERVAL_MINUTES = 10.0
"""Maximum time between checkpoints, in minutes."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Output: the run directory and its checkpoints."""

    save_dir: str = "./output"
    """Parent folder of the run directory."""
    run_name: Annotated[str | None, shown_default("made from model, layers, k and width", "NAME")] = None
    """Name of the run directory."""
    save_every: int = 1000
    """Optimizer steps between checkpoints (and at least every 10 minutes)."""
    resume: bool = False
    """Continue the run from its last checkpoint; start from the beginning if it has none."""
    overwrite: bool = False
    """Delete an existing run of this name first."""
    save_sparsify: bool = True
    """Also write the weights in sparsify's format (sae.safetensors), next to those in SAELens' format."""

    def __post_init__(self) -> None:
        if self.save_every < 1:
            raise SaetrainError(f"--save_every {self.save_every}: must be at least 1")
        if self.resume and self.overwrite:
            raise SaetrainError(
                "--resume and --overwrite can't be given together: one keeps the run, the other deletes it"
            )
        if self.run_name is not None and (not self.run_name or Path(self.run_name).name != self.run_name):
            raise SaetrainError(f"--run_name {self.run_name!r}: must be a plain folder name without '/'")


FORMAT_VERSION = 4
"""Version of the checkpoint format; increase it if older checkpoints can no longer be resumed."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: ``tensors`` {SAE: {name: tensor}} and ``values`` of the run."""

    path: Path
    tensors: dict[str, dict[str, Tensor]]
    values: dict[str, Any]


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]
) -> Path:
    """Write ``folder/step_<step>``, delete all but the last MAX_CHECKPOINTS, and return the new path.

    Raises OSError or SafetensorError, for example if the disk is full; older checkpoints are then unchanged.
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
            record_progress()
            names[name] = f"sae_{number:03d}.safetensors"
            save_file({key: value.contiguous() for key, value in content.items()}, temporary / names[name])
        write_json(temporary / "state.json", {"format": FORMAT_VERSION, **values, "step": step, "files": names})
        hashes = {file.name: hash_file(file) for file in sorted(temporary.iterdir())}
        fsync_files(temporary)
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


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def rename_suspect(folder: Path, step: int) -> int | None:
    """Rename the checkpoint of ``step`` if there is an older one; return the older one's step, else None."""
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
    """Return how a checkpoint's files differ from its manifest, or None if they are intact."""
    try:
        expected = json.loads((path / "manifest.json").read_text())["sha256"]
        for name, digest in expected.items():
            if not (path / name).exists():
                return f"{name} is missing"
            if hash_file(path / name) != digest:
                return f"{name} does not match its hash"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json or a file that it lists can't be read"
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Load an intact checkpoint; raises SaetrainError if it has another format version."""
    values = json.loads((path / "state.json").read_text())
    if values.get("format") != FORMAT_VERSION:
        raise SaetrainError(
            f"--resume: checkpoint {path} has format {values.get('format')}, but this version of saetrain needs format "
            f"{FORMAT_VERSION}; finish the run with the version that started it, or start a run with another --run_name"
        )
    # A tensor mapped from a file may start at any multiple of 4 bytes, and some products round differently there.
    tensors = {
        name: {key: value.clone() for key, value in load_file(path / file).items()}
        for name, file in values["files"].items()
    }
    return Checkpoint(path, tensors, values)


def find_newest_valid(folder: Path) -> tuple[Path | None, list[str]]:
    """Return (the newest intact checkpoint or None, a message for each newer one that is damaged).

    If there is an intact one, the damaged ones are renamed, so that no later clean-up counts them as the newest.
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
