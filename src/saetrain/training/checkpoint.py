"""Checkpoints: folders that are written under a temporary name and renamed when complete, so that none is partial."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saetrain.atomic_io import write_json
from saetrain.distributed import record_progress
from saetrain.errors import SaetrainError
from saetrain.manifest import find_damage, replace_folder, temporary_folder
from saetrain.settings import Settings, Total
from saetrain.small_files import read_json
from saetrain.types import shown_default
from saetrain.untrusted import require_file_name

MAX_CHECKPOINTS = 2
"""Number of checkpoints to keep on disk."""
MAX_INTERVAL_MINUTES = 10.0
"""Maximum time between checkpoints, in minutes."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings(Settings):
    """Output: the run directory and its checkpoints."""

    save_dir: str = "./output"
    """Parent folder of the run directory."""
    run_name: Annotated[str | None, shown_default("made from model, layers, k and width", "NAME")] = None
    """Name of the run directory."""
    save_every: Total = 1000
    """Optimizer steps between checkpoints (and at least every 10 minutes)."""
    resume: bool = False
    """Continue the run from its last checkpoint; start from the beginning if it has none."""
    overwrite: bool = False
    """Delete an existing run of this name first."""
    save_sparsify: bool = True
    """Also write the weights in sparsify's format (sae.safetensors), next to those in SAELens' format."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume and self.overwrite:
            raise SaetrainError(
                "--resume and --overwrite can't be given together: one keeps the run, the other deletes it"
            )
        if self.run_name is not None:
            require_file_name(self.run_name, "--run_name")


STATE_FILE = "state.json"
FORMAT_VERSION = 6
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
    for unfinished in folder.glob(temporary_folder(folder / "*").name):
        shutil.rmtree(unfinished, ignore_errors=True)
    with replace_folder(final) as temporary:
        names = {}
        for number, (name, content) in enumerate(tensors.items()):
            record_progress()
            names[name] = f"sae_{number:03d}.safetensors"
            save_file({key: value.contiguous() for key, value in content.items()}, temporary / names[name])
        write_json(temporary / STATE_FILE, {"format": FORMAT_VERSION, **values, "step": step, "files": names})
    for old in list_checkpoints(folder)[:-MAX_CHECKPOINTS]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    found = [path for path in folder.glob("step_*") if path.is_dir()]
    return sorted(path for path in found if path.name.removeprefix("step_").isdecimal())


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


def find_checkpoint_damage(path: Path, state_type: Any = dict) -> str | None:
    """Return why a checkpoint can't be used, or None: its files differ from its manifest, or its state is not valid.

    ``state_type``: dataclass that describes the values of the state, with the names of its fields.
    """
    return find_damage(path) or _find_invalid_state(path, state_type)


def _find_invalid_state(path: Path, state_type: Any) -> str | None:
    """Return what is wrong with the state, unless it has the format of another version."""
    try:
        header = read_json(path / STATE_FILE, _Header, STATE_FILE)
        if header.format == FORMAT_VERSION:
            read_json(path / STATE_FILE, state_type, STATE_FILE)
    except SaetrainError as error:
        return str(error)
    if header.format != FORMAT_VERSION:
        return None
    if header.step < 0 or path.name != _step_folder_name(header.step):
        return f"{STATE_FILE} is of step {header.step}"
    if {*header.files.values()} != {file.name for file in path.glob("*.safetensors")}:
        return f"{STATE_FILE} lists other files than the folder contains"
    return None


@dataclass(frozen=True)
class _Header:
    """The values of ``state.json`` that every checkpoint has."""

    format: int
    step: int
    files: dict[str, str]


def load_checkpoint(path: Path) -> Checkpoint:
    """Load an intact checkpoint; raises SaetrainError if it has another format version."""
    values = read_json(path / STATE_FILE, dict[str, Any])
    if values["format"] != FORMAT_VERSION:
        raise SaetrainError(
            f"--resume: checkpoint {path} has format {values['format']}, but this version of saetrain needs format "
            f"{FORMAT_VERSION}; finish the run with the version that started it, or start a run with another --run_name"
        )
    try:
        # A tensor mapped from a file may start at any multiple of 4 bytes, and some products round differently there.
        tensors = {
            name: {key: value.clone() for key, value in load_file(path / file).items()}
            for name, file in values["files"].items()
        }
    except SafetensorError as error:
        raise SaetrainError(f"--resume: checkpoint {path}: a file of tensors is not valid: {error}") from error
    return Checkpoint(path, tensors, values)


def find_newest_valid(folder: Path, state_type: Any = dict) -> tuple[Path | None, list[str]]:
    """Return (the newest intact checkpoint or None, a message for each newer one that is damaged).

    If there is an intact one, the damaged ones are renamed, so that no later clean-up counts them as the newest.
    ``state_type``: see :func:`find_checkpoint_damage`.
    """
    damaged_paths: list[Path] = []
    remarks: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        problem = find_checkpoint_damage(path, state_type)
        if problem is None:
            for damaged in damaged_paths:
                renamed = damaged.with_name(f"damaged_{damaged.name}")
                shutil.rmtree(renamed, ignore_errors=True)
                os.replace(damaged, renamed)
            return path, remarks
        damaged_paths.append(path)
        remarks.append(f"checkpoint {path} is damaged ({problem})")
    return None, remarks
