"""The run directory: its name, its creation, and the newest checkpoint in it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from saetrain import distributed
from saetrain.atomic_io import temporary_path, write_atomic
from saetrain.config import RunConfig, to_flat
from saetrain.errors import SaetrainError
from saetrain.grid import expand_grid
from saetrain.interop.formats import SAES_DIR
from saetrain.logs.console import log_rank0
from saetrain.logs.jsonl import METRICS_FILE as METRICS
from saetrain.logs.jsonl import list_earlier_metrics
from saetrain.runs.train.checkpoint_state import CheckpointState
from saetrain.training.checkpoint import Checkpoint, find_newest_valid, load_checkpoint
from saetrain.untrusted import shorten_name

CHECKPOINTS_DIR = "checkpoints"
CONFIG_FILE = "config.yaml"
SPIKE_FILE = "spike.json"
EVALUATION_DIR = "evaluation"
ASSESSMENT_FILE = "final_assessment.json"
FEATURES_DIR = "features"
REPORT_FILE = "report.html"
REPORT_DIR = "report"
RUN_FILES = (
    CHECKPOINTS_DIR,
    CONFIG_FILE,
    SAES_DIR,
    SPIKE_FILE,
    METRICS,
    EVALUATION_DIR,
    ASSESSMENT_FILE,
    FEATURES_DIR,
    REPORT_FILE,
    REPORT_DIR,
    "wandb",
    "tensorboard",
)
"""Files and folders that a run writes into its directory."""
DELETING_DIR = ".deleting"
OVERWRITING_MARKER = ".overwriting"
"""Marks a run directory whose earlier run is being deleted."""
LOCK_FILE = ".lock"
RUN_MARKER = ".saetrain"
RUN_MARKER_TEXT = "A run of saetrain, format 1. --overwrite deletes runs in folders that hold this file."


def resolve_run_dir(config: RunConfig) -> Path:
    """Return ``save_dir/run_name``; the default name is built from model, hookpoints, k and number of latents."""
    name = config.output.run_name
    if name is None:
        where = config.where
        if where.hookpoints is not None:
            site = "_".join(
                "".join(c if c.isalnum() or c in ".-" else "-" for c in pattern) for pattern in where.hookpoints
            )
        elif config.activations is not None:
            site = "all"
        elif where.layer_stride is not None:
            site = f"every{where.layer_stride}"
        else:
            site = "layer" + "-".join(str(layer).replace("-", "to") for layer in where.layers or (0,))
        flats = [to_flat(each) for each in expand_grid(config).values()]
        k = "-".join(dict.fromkeys(str(flat["k"]) for flat in flats))
        width = "-".join(
            dict.fromkeys(
                f"f{flat['num_latents']}" if flat["num_latents"] else f"x{flat['expansion_factor']}" for flat in flats
            )
        )
        name = shorten_name(f"{Path(config.model).name}_{site}_k{k}_{width}")
    return Path(config.output.save_dir) / name


def shorten_path(path: Path) -> str:
    """Return ``path`` relative to the working directory if it is inside it, else unchanged."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def resume_if_restarted(config: RunConfig) -> RunConfig:
    """Replace --overwrite by --resume if torchrun restarted this process, so that the restart continues the run."""
    if not distributed.was_restarted():
        return config
    return dataclasses.replace(config, output=dataclasses.replace(config.output, resume=True, overwrite=False))


def open_run_dir(config: RunConfig, directory: Path) -> Checkpoint | None:
    """Return the checkpoint to resume from, or None to start from the beginning.

    Raises SaetrainError if the directory contains a run that the flags do not mention.
    """
    if not is_unused(directory):
        _require_resume_or_overwrite(config, directory)
    return _load_newest_checkpoint(directory) if config.output.resume else None


def is_unused(directory: Path) -> bool:
    """Return whether the directory is empty but for what a process left that was killed before it wrote the marker."""
    return set(directory.iterdir()) <= {temporary_path(directory / RUN_MARKER), directory / LOCK_FILE}


def _require_resume_or_overwrite(config: RunConfig, directory: Path) -> None:
    """Raise SaetrainError unless --resume or --overwrite is given and the directory contains a run."""
    for flag in ("overwrite", "resume"):
        if getattr(config.output, flag) and not is_run_dir(directory):
            raise SaetrainError(
                f"--{flag}: {directory} contains files but no run of saetrain, so it is not touched; remove it by "
                "hand or pass another --run_name"
            )
    if not config.output.overwrite and not config.output.resume:
        raise SaetrainError(
            f"{directory} already exists and is not empty: pass --resume to continue its run, --overwrite to delete "
            "its run, or another --run_name"
        )


def find_features_folder(sae_folder: Path) -> Path:
    """Return where the features of the SAE in a folder are: in its run, `features/<name>`, or else in the folder."""
    folder = sae_folder.absolute()
    for parent in folder.parents:
        if parent.name == SAES_DIR:
            return parent.parent / FEATURES_DIR / folder.relative_to(parent)
    return folder / FEATURES_DIR


def find_config_file(directory: Path, sae: str) -> Path:
    """Return the file with the settings of an SAE of a run: its own, or else that of the run."""
    own = directory / SAES_DIR / sae / CONFIG_FILE
    return own if own.exists() else directory / CONFIG_FILE


def is_run_dir(directory: Path) -> bool:
    """Return whether saetrain created the directory."""
    return (directory / RUN_MARKER).exists()


def initialize_run_dir(directory: Path, overwrite: bool) -> None:
    """Create the run directory; with ``overwrite``, delete the files of the earlier run and nothing else."""
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / DELETING_DIR).exists():
        shutil.rmtree(directory / DELETING_DIR)
    if overwrite or (directory / OVERWRITING_MARKER).exists():
        # If the deletion is interrupted, the next start finishes it, even without --overwrite.
        (directory / OVERWRITING_MARKER).touch()
        for path in (*(directory / name for name in RUN_FILES), *list_earlier_metrics(directory)):
            if path.is_dir() and not path.is_symlink():
                # The folder is renamed first, because an interrupted deletion could leave an SAE that looks complete.
                os.replace(path, directory / DELETING_DIR)
                shutil.rmtree(directory / DELETING_DIR)
            else:
                path.unlink(missing_ok=True)
        (directory / OVERWRITING_MARKER).unlink()
    write_atomic(directory / RUN_MARKER, f"{RUN_MARKER_TEXT}\n")


@contextlib.contextmanager
def report_write_errors(
    directory: Path, when: str, has_checkpoint: bool, retry_flag: str = "--resume"
) -> Iterator[None]:
    """Convert errors of writing, for example on a full disk, to a SaetrainError.

    ``when`` completes "writing failed …"; ``has_checkpoint``: an intact checkpoint exists; ``retry_flag``: the flag
    that the message advises for the restart.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        intact = "; the last checkpoint is intact" if has_checkpoint else ""
        raise SaetrainError(
            f"writing to {directory} failed {when}: {error}{intact}; free disk space and restart with {retry_flag}"
        ) from error


def _load_newest_checkpoint(directory: Path) -> Checkpoint | None:
    if (directory / OVERWRITING_MARKER).exists():
        log_rank0(f"--resume: an --overwrite of {directory} was interrupted, so the run starts from the beginning")
        return None
    # A damaged checkpoint is renamed only if an earlier one is intact.
    with report_write_errors(directory, "at the start", has_checkpoint=True):
        path, remarks = find_newest_valid(directory / CHECKPOINTS_DIR, CheckpointState)
    for remark in remarks:
        log_rank0(remark)
    if path is None and remarks:
        raise SaetrainError(
            f"--resume: every checkpoint in {directory / CHECKPOINTS_DIR} is damaged; {remarks[0]}; "
            "pass --overwrite to start the run from the beginning"
        )
    if path is None:
        log_rank0(f"--resume: {directory} contains no checkpoint, so the run starts from the beginning")
        return None
    return load_checkpoint(path)
