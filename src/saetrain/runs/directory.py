"""The run's folder: its name, that it may be written, and the checkpoint in it to go on from."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

from saetrain.config import RunConfig
from saetrain.errors import SaetrainError
from saetrain.logs.console import say
from saetrain.training.checkpoint import Checkpoint, load_checkpoint, newest_whole

CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"


def run_directory(config: RunConfig) -> Path:
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


def with_restart(config: RunConfig) -> RunConfig:
    """A process that torchrun started anew goes on with its run, whatever the flags of the first start said."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
        return config
    return dataclasses.replace(config, output=dataclasses.replace(config.output, resume=True, overwrite=False))


def open_directory(config: RunConfig, directory: Path) -> Checkpoint | None:
    """The checkpoint to go on from, if any; SaetrainError when a run lies there that must not be touched."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        if directory.exists() and any(directory.iterdir()):
            _may_enter(config, directory)
        directory.mkdir(exist_ok=True)
        probe = directory / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SaetrainError(
            f"--save_dir {config.output.save_dir}: can't write to {directory}: {error.strerror}"
        ) from error
    return _checkpoint(directory) if config.output.resume else None


def _may_enter(config: RunConfig, directory: Path) -> None:
    """Delete the run that lies there when --overwrite asks for it; SaetrainError unless --resume goes on with it."""
    if config.output.overwrite:
        # Only what this tool wrote is deleted.
        if not (directory / CONFIG).exists() and not (directory / CHECKPOINTS).exists():
            raise SaetrainError(
                f"--overwrite: {directory} holds no run of saetrain, so it is left alone; remove it by hand"
            )
        shutil.rmtree(directory)
    elif not config.output.resume:
        raise SaetrainError(
            f"{directory} holds a run already: --resume goes on with it, --overwrite deletes it, "
            "--run_name gives this one another name"
        )


def _checkpoint(directory: Path) -> Checkpoint | None:
    path, remarks = newest_whole(directory / CHECKPOINTS)
    for remark in remarks:
        say(remark)
    if path is None:
        say(f"--resume: {directory} holds no checkpoint, so the run starts from the beginning")
        return None
    return load_checkpoint(path)
