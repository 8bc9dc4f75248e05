"""``saetrain MODEL DATASET``: what the main command does, in order."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from saetrain import distributed, launch
from saetrain.activations.model import resolve_device
from saetrain.config import RunConfig, write_yaml
from saetrain.logs import require_log_packages
from saetrain.runs import together
from saetrain.runs.build import build_trainer, sae_names
from saetrain.runs.directory import CONFIG, claim, open_directory, run_directory, with_restart, writing
from saetrain.runs.dry_run import report
from saetrain.runs.kernels import choose_kernels
from saetrain.runs.prepare import Prepared, prepare, resolved
from saetrain.runs.resume import fit_batch, reconcile, require_same
from saetrain.runs.session import Session
from saetrain.training.checkpoint import Checkpoint


def run(config: RunConfig) -> None:
    """Train, evaluate and save; SaetrainError for what the user can mend."""
    # Moments of idle latents fade until they are denormal, which makes a step many times slower; before the first
    # parallel region, for its threads keep what they were made with.
    torch.set_flush_denormal(True)
    if launch.rank() == 0:
        require_log_packages(config.logs)
    # Before anything slow, for it may be refused.
    _choose_kernels(config)
    config = with_restart(config)
    distributed.set_phase("loading model and text")
    if config.dry_run:
        prepared = prepare(config)
        report(prepared, *build_trainer(prepared, None))
        return
    directory = run_directory(config)
    checkpoint = _opened(config, directory)
    if checkpoint is not None:
        config = fit_batch(config, checkpoint.values)
    prepared = prepare(config)
    if checkpoint is not None:
        prepared = reconcile(prepared, checkpoint)
        checkpoint = _shared(prepared, checkpoint)
    require_same(prepared)
    trainer, normalizers = build_trainer(prepared, checkpoint)
    first = launch.rank() == 0
    again = "--overwrite" if config.output.overwrite else "--resume"
    if first:
        with writing(directory, "at the start", checkpoint is not None, again):
            claim(directory, config.output.overwrite)
    session = Session(prepared, trainer, normalizers, directory, checkpoint)
    output = dataclasses.replace(config.output, run_name=directory.name)
    if first:
        with session.writing():
            write_yaml(directory / CONFIG, dataclasses.replace(resolved(session.prepared), output=output))
    session.train()


def _choose_kernels(config: RunConfig) -> None:
    """One process of each host builds what has to be built; all must come to the same kernels."""
    device = resolve_device(config.base.device)
    if device.type == "cuda" and device.index is not None:
        # Triton launches where torch stands, whatever device its inputs are on.
        torch.cuda.set_device(device)
    asked = (config.compute, config.optim, config.train.loss_fn, device)
    chosen = distributed.local_rank0_first("building the kernels", lambda: choose_kernels(*asked))
    together.require_same({"the kind of --device": device.type})
    together.require_same({"--kernels": chosen.kernels, "--compute_dtype": chosen.compute_dtype})


def _opened(config: RunConfig, directory: Path) -> Checkpoint | None:
    """The checkpoint to go on from, as rank 0 finds it; the others get its tensors later."""
    found = open_directory(config, directory) if launch.rank() == 0 else None
    values = distributed.broadcast_from_rank0(found.values if found is not None else None, "opening the run's folder")
    if values is None:
        return None
    return found or Checkpoint(directory, {}, values)


def _shared(run: Prepared, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the tensors that this rank needs, for the folder may lie on rank 0's disk alone."""
    tensors = {}
    for name in checkpoint.values["files"]:
        content = distributed.broadcast_tensors(checkpoint.tensors.get(name), f"sending the checkpoint of {name}")
        hookpoint = sae_names(run).get(name, (None,))[0]
        if hookpoint is None or run.division.is_owned_by(hookpoint, launch.rank()):
            tensors[name] = content
    return dataclasses.replace(checkpoint, tensors=tensors)
