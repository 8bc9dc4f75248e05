"""``saetrain MODEL DATASET``: what the main command does, in order."""

from __future__ import annotations

import dataclasses

import torch

from saetrain import distributed
from saetrain.activations.model import resolve_device
from saetrain.config import RunConfig, write_yaml
from saetrain.logs import check_extras
from saetrain.runs.build import build_trainer
from saetrain.runs.directory import CONFIG, claim, open_directory, run_directory, with_restart, writing
from saetrain.runs.dry_run import report
from saetrain.runs.kernels import choose_kernels
from saetrain.runs.prepare import prepare, resolved
from saetrain.runs.resume import reconcile
from saetrain.runs.session import Session


def run(config: RunConfig) -> None:
    """Train, evaluate and save; SaetrainError for what the user can mend."""
    distributed.require_one_rank()
    # Moments of idle latents fade until they are denormal, which makes a step many times slower; before the first
    # parallel region, for its threads keep what they were made with.
    torch.set_flush_denormal(True)
    check_extras(config.logs)
    # Before anything slow, for it may be refused.
    choose_kernels(config.compute, config.optim, config.train.loss_fn, resolve_device(config.base.device))
    config = with_restart(config)
    if config.dry_run:
        prepared = prepare(config)
        report(prepared, *build_trainer(prepared, None))
        return
    directory = run_directory(config)
    checkpoint = open_directory(config, directory)
    prepared = prepare(config)
    if checkpoint is not None:
        prepared = reconcile(prepared, checkpoint)
    trainer, normalizers = build_trainer(prepared, checkpoint)
    again = "--overwrite" if config.output.overwrite else "--resume"
    with writing(directory, "at the start", checkpoint is not None, again):
        claim(directory, config.output.overwrite)
    session = Session(prepared, trainer, normalizers, directory, checkpoint)
    output = dataclasses.replace(config.output, run_name=directory.name)
    with session.writing():
        write_yaml(directory / CONFIG, dataclasses.replace(resolved(session.prepared), output=output))
    session.train()
