"""The run's folder: its name, that it may be written, and the checkpoint in it to go on from."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from saetrain import distributed
from saetrain.atomic_io import temporary_path, write_atomic
from saetrain.config import RunConfig
from saetrain.errors import SaetrainError
from saetrain.logs.console import log_rank0
from saetrain.logs.jsonl import METRICS_FILE as METRICS
from saetrain.logs.jsonl import list_earlier_metrics
from saetrain.training.checkpoint import Checkpoint, find_newest_valid, load_checkpoint

CHECKPOINTS_DIR = "checkpoints"
CONFIG_FILE = "config.yaml"
SAES_DIR = "sae"
SPIKE_FILE = "spike.json"
EVALUATION_DIR = "evaluation"
ASSESSMENT_FILE = "final_assessment.json"
RUN_FILES = (
    CHECKPOINTS_DIR,
    CONFIG_FILE,
    SAES_DIR,
    SPIKE_FILE,
    METRICS,
    EVALUATION_DIR,
    ASSESSMENT_FILE,
    "wandb",
    "tensorboard",
)
"""What a run writes into its folder."""
DELETING_DIR = ".deleting"
OVERWRITING_MARKER = ".overwriting"
"""Lies in a folder whose earlier run is being deleted."""
RUN_MARKER = ".saetrain"
RUN_MARKER_TEXT = "A run of saetrain, format 1. --overwrite deletes runs in folders that hold this file."


def resolve_run_dir(config: RunConfig) -> Path:
    """``save_dir/run_name``; without a name, one made from model, layers, k and width."""
    name = config.output.run_name
    if name is None:
        where = config.where
        if where.hookpoints is not None:
            site = "_".join(
                "".join(c if c.isalnum() or c in ".-" else "-" for c in pattern) for pattern in where.hookpoints
            )
        elif where.layer_stride is not None:
            site = f"every{where.layer_stride}"
        else:
            site = "layer" + "-".join(map(str, where.layers or (0,)))
        width = f"f{config.sae.num_latents}" if config.sae.num_latents else f"x{config.sae.expansion_factor}"
        name = f"{Path(config.model).name}_{site}_k{config.sae.k}_{width}"
    return Path(config.output.save_dir) / name


def resume_if_restarted(config: RunConfig) -> RunConfig:
    """A process that torchrun started anew goes on with its run, whatever the flags of the first start said."""
    if not distributed.was_restarted():
        return config
    return dataclasses.replace(config, output=dataclasses.replace(config.output, resume=True, overwrite=False))


def open_run_dir(config: RunConfig, directory: Path) -> Checkpoint | None:
    """The checkpoint to go on from, if any; SaetrainError when a run lies there that must not be touched."""
    try:
        # A process that was killed while it claimed a new folder leaves the marker under its temporary name.
        if directory.exists() and set(directory.iterdir()) - {temporary_path(directory / RUN_MARKER)}:
            _require_resume_or_overwrite(config, directory)
        # Nothing is made before the run can begin, so the nearest folder that is there is tried.
        existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise SaetrainError(
            f"--save_dir {config.output.save_dir}: can't write to {directory}: {error.strerror}"
        ) from error
    return _load_newest_checkpoint(directory) if config.output.resume else None


def _require_resume_or_overwrite(config: RunConfig, directory: Path) -> None:
    """SaetrainError unless --resume goes on with what lies there, or --overwrite may delete it."""
    for flag in ("overwrite", "resume"):
        if getattr(config.output, flag) and not is_run_dir(directory):
            raise SaetrainError(
                f"--{flag}: {directory} holds no run of saetrain, so it is left alone; remove it by hand, or give "
                "another --run_name"
            )
    if not config.output.overwrite and not config.output.resume:
        raise SaetrainError(
            f"{directory} holds a run already: --resume goes on with it, --overwrite deletes it, "
            "--run_name gives this one another name"
        )


def is_run_dir(directory: Path) -> bool:
    """Whether this tool made the folder."""
    return (directory / RUN_MARKER).exists()


def initialize_run_dir(directory: Path, overwrite: bool) -> None:
    """Make the folder this run's: what an earlier run left goes, and nothing else, once the new one can begin."""
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / DELETING_DIR).exists():
        shutil.rmtree(directory / DELETING_DIR)
    if overwrite or (directory / OVERWRITING_MARKER).exists():
        # Cut short, it is finished by the next start, whatever that one asks for.
        (directory / OVERWRITING_MARKER).touch()
        for path in (*(directory / name for name in RUN_FILES), *list_earlier_metrics(directory)):
            if path.is_dir() and not path.is_symlink():
                # Deleted in its place and cut short, an SAE's folder could lose a file and still look whole.
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
    """Within it, a full or vanished disk ends the run with a message; ``kept``: a checkpoint is there."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        whole = "; the last checkpoint is whole" if has_checkpoint else ""
        raise SaetrainError(
            f"writing to {directory} failed {when}: {error}{whole}; make room and start again with {retry_flag}"
        ) from error


def _load_newest_checkpoint(directory: Path) -> Checkpoint | None:
    if (directory / OVERWRITING_MARKER).exists():
        log_rank0(f"--resume: {directory} was being overwritten, so the run starts from the beginning")
        return None
    # A damaged checkpoint is renamed only where one before it is whole.
    with report_write_errors(directory, "at the start", has_checkpoint=True):
        path, remarks = find_newest_valid(directory / CHECKPOINTS_DIR)
    for remark in remarks:
        log_rank0(remark)
    if path is None and remarks:
        raise SaetrainError(
            f"--resume: every checkpoint in {directory / CHECKPOINTS_DIR} is damaged; {remarks[0]}; "
            "--overwrite starts the run from the beginning"
        )
    if path is None:
        log_rank0(f"--resume: {directory} holds no checkpoint, so the run starts from the beginning")
        return None
    return load_checkpoint(path)
