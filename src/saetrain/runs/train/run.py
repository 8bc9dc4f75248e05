"""``saetrain MODEL DATASET``: the training command from settings to saved SAEs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from saetrain import distributed
from saetrain.activations.model import resolve_device
from saetrain.config import RunConfig, write_yaml
from saetrain.distributed import env
from saetrain.logs import require_log_packages
from saetrain.runs.run_dir import (
    CONFIG_FILE,
    initialize_run_dir,
    open_run_dir,
    report_write_errors,
    resolve_run_dir,
    resume_if_restarted,
)
from saetrain.runs.train import gather
from saetrain.runs.train.builders import TrainingRun, build_trainer, sae_names
from saetrain.runs.train.choose_step import choose_kernels, step_request
from saetrain.runs.train.dry_run import report_dry_run
from saetrain.runs.train.loop import TrainLoop
from saetrain.runs.train.resume import fit_batch, reconcile_with_checkpoint, require_same_run
from saetrain.runs.train.setup import RunContext, prepare_run, resolve_config
from saetrain.training.checkpoint import Checkpoint


def train_saes(config: RunConfig) -> Path:
    """Train, evaluate and save SAEs, and return the run directory; SaetrainError for errors that the user can fix."""
    # The moments of idle latents decay to denormal numbers, which make a step many times slower. The call precedes the
    # first parallel region, because its threads keep the mode that they were created with.
    torch.set_flush_denormal(True)
    if env.rank() == 0:
        require_log_packages(config.logs)
    # The choice precedes anything slow, because it may fail.
    _choose_kernels_on_ranks(config)
    config = resume_if_restarted(config)
    directory = resolve_run_dir(config)
    distributed.set_phase("loading model and text", is_loading=True)
    if config.dry_run:
        context = prepare_run(config)
        report_dry_run(context, *build_trainer(context, None))
        return directory
    checkpoint = _open_checkpoint(config, directory)
    if checkpoint is not None:
        config = fit_batch(config, checkpoint.values)
    context = prepare_run(config)
    if checkpoint is not None:
        context = reconcile_with_checkpoint(context, checkpoint)
        checkpoint = _broadcast_checkpoint(context, checkpoint)
    require_same_run(context)
    trainer, normalizers = build_trainer(context, checkpoint)
    is_rank0 = env.rank() == 0
    retry_flag = "--overwrite" if config.output.overwrite else "--resume"
    if is_rank0:
        with report_write_errors(directory, "at the start", checkpoint is not None, retry_flag):
            initialize_run_dir(directory, config.output.overwrite)
    loop = TrainLoop(TrainingRun(context, trainer, normalizers, directory, checkpoint))
    output = dataclasses.replace(config.output, run_name=directory.name)
    if is_rank0:
        with loop.checkpointing.report_write_errors():
            write_yaml(directory / CONFIG_FILE, dataclasses.replace(resolve_config(context), output=output))
    loop.run()
    return directory


def _choose_kernels_on_ranks(config: RunConfig) -> None:
    """Choose the kernels, first in one process per host, which builds them; SaetrainError if the ranks differ."""
    device = resolve_device(config.base.device)
    if device.type == "cuda" and device.index is not None:
        # Triton launches on torch's current device, whatever device its inputs are on.
        torch.cuda.set_device(device)
    request = step_request(config, device)
    chosen = distributed.local_rank0_first("building the kernels", lambda: choose_kernels(config.compute, request))
    gather.require_equal_on_ranks({"the type of --device": device.type})
    gather.require_equal_on_ranks({"--kernels": chosen.kernels, "--compute_dtype": chosen.compute_dtype})


def _open_checkpoint(config: RunConfig, directory: Path) -> Checkpoint | None:
    """Return the checkpoint that rank 0 finds, or None; the other ranks receive its tensors later."""
    found = open_run_dir(config, directory) if env.rank() == 0 else None
    values = distributed.broadcast_from_rank0(found.values if found is not None else None, "opening the run directory")
    if values is None:
        return None
    return found or Checkpoint(directory, {}, values)


def _broadcast_checkpoint(run: RunContext, checkpoint: Checkpoint) -> Checkpoint:
    """Send this rank the tensors that it needs, because the run directory may be on rank 0's disk only."""
    tensors = {}
    for name in checkpoint.values["files"]:
        content = distributed.broadcast_tensors(checkpoint.tensors.get(name), f"sending the checkpoint of {name}")
        hookpoint = sae_names(run).get(name, (None,))[0]
        if hookpoint is None or run.placement.is_owned_by(hookpoint, env.rank()):
            tensors[name] = content
    return dataclasses.replace(checkpoint, tensors=tensors)
