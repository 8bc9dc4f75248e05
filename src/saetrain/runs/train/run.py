"""``saetrain MODEL DATASET``: the training command from settings to saved SAEs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from saetrain import distributed
from saetrain.activations.model import resolve_device
from saetrain.config import RunConfig, write_yaml
from saetrain.distributed import env
from saetrain.errors import SaetrainError
from saetrain.grid import expand_grid
from saetrain.logs import require_log_packages
from saetrain.runs.run_dir import (
    CONFIG_FILE,
    initialize_run_dir,
    open_run_dir,
    report_write_errors,
    resolve_run_dir,
    resume_if_restarted,
)
from saetrain.runs.run_lock import lock_run_dir
from saetrain.runs.train import gather
from saetrain.runs.train.builders import TrainingRun, build_trainer
from saetrain.runs.train.choose_step import choose_kernels, step_request
from saetrain.runs.train.dry_run import report_dry_run
from saetrain.runs.train.loop import TrainLoop
from saetrain.runs.train.resolve import Resolved
from saetrain.runs.train.resume import keep_first_values, require_same_result, require_same_run
from saetrain.runs.train.setup import RunContext, prepare_run, resolve_config
from saetrain.runs.train.stored_run import prepare_stored_run
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
        context = (prepare_stored_run if config.activations is not None else prepare_run)(config)
        report_dry_run(context, *build_trainer(context, None))
        return directory
    with lock_run_dir(directory):
        context, checkpoint = _prepare_or_resume(config, directory)
        run = TrainingRun(context, *build_trainer(context, checkpoint), directory, checkpoint)
        _write_run_dir(run, config.output.overwrite)
        TrainLoop(run).run()
    return directory


def _prepare_or_resume(config: RunConfig, directory: Path) -> tuple[RunContext, Checkpoint | None]:
    """Return the prepared run, and the checkpoint to continue from."""
    checkpoint = _open_checkpoint(config, directory)
    prepare = prepare_stored_run if config.activations is not None else prepare_run
    if checkpoint is None:
        context = prepare(config)
    else:
        kept = Resolved.from_json(checkpoint.values["resolved"])
        context = prepare(keep_first_values(config, checkpoint.values), kept)
        require_same_result(context, checkpoint)
        checkpoint = _broadcast_checkpoint(context, checkpoint)
    require_same_run(context)
    return context, checkpoint


def _write_run_dir(run: TrainingRun, overwrite: bool) -> None:
    """Create the run directory, or empty it with ``overwrite``, and write the resolved settings; only on rank 0."""
    if env.rank() != 0:
        return
    retry_flag = "--overwrite" if overwrite else "--resume"
    with report_write_errors(run.directory, "at the start", run.checkpoint is not None, retry_flag):
        initialize_run_dir(run.directory, overwrite)
    resolved = resolve_config(run.context)
    output = dataclasses.replace(resolved.output, run_name=run.directory.name)
    with report_write_errors(run.directory, f"at step {run.trainer.step}", run.checkpoint is not None):
        write_yaml(run.directory / CONFIG_FILE, dataclasses.replace(resolved, output=output))


def _choose_kernels_on_ranks(config: RunConfig) -> None:
    """Choose the kernels, first in one process per host, which builds them; SaetrainError if the ranks differ."""
    device = resolve_device(config.base.device)
    if device.type == "cuda" and device.index is not None:
        # Triton launches on torch's current device, whatever device its inputs are on.
        torch.cuda.set_device(device)
    requests = [(each.compute, step_request(each, device)) for each in expand_grid(config).values()]
    chosen = distributed.local_rank0_first(
        "building the kernels", lambda: [choose_kernels(settings, request) for settings, request in requests]
    )
    gather.require_equal_on_ranks({"the type of --device": device.type})
    gather.require_equal_on_ranks(
        {
            "--kernels": [each.kernels for each in chosen],
            "--compute_dtype": [each.compute_dtype for each in chosen],
        }
    )


def _open_checkpoint(config: RunConfig, directory: Path) -> Checkpoint | None:
    """Return the checkpoint that rank 0 finds, or None; the other ranks receive its tensors later."""
    found = open_run_dir(config, directory) if env.rank() == 0 else None
    values = distributed.broadcast_from_rank0(found.values if found is not None else None, "opening the run directory")
    if values is None:
        return None
    return found or Checkpoint(directory, {}, values)


def _broadcast_checkpoint(run: RunContext, checkpoint: Checkpoint) -> Checkpoint:
    """Send this rank the tensors that it needs, because the run directory may be on rank 0's disk only."""
    missing = run.plans.keys() - checkpoint.values["files"].keys()
    if missing:
        raise SaetrainError(f"--resume: checkpoint {checkpoint.path} has no SAE {', '.join(sorted(missing))}")
    tensors = {}
    for name in checkpoint.values["files"]:
        content = distributed.broadcast_tensors(checkpoint.tensors.get(name), f"sending the checkpoint of {name}")
        if name not in run.plans or run.resolved.placement.is_owned_by(name, env.rank()):
            tensors[name] = content
    return dataclasses.replace(checkpoint, tensors=tensors)
