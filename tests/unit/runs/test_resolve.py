"""The values that a run resolves belong to SAEs, of which a site may have several."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import torch

from saetrain.cli import parse_train
from saetrain.runs.train.plan import plan_saes
from saetrain.runs.train.resolve import Resolved, resolve_run
from saetrain.training.steps.base import KernelSettings

WORDS = "model data --init_seeds 1 2 --lr auto --num_latents 64 --k 4 --kernels reference --compute_dtype float32"
SAES = ["h.0", "h.0/seed2", "h.1", "h.1/seed2"]
MODEL: Any = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)


def resolve(kept: Resolved | None = None) -> Resolved:
    config = parse_train(WORDS.split())
    return resolve_run(config, MODEL, plan_saes(config, ["h.0", "h.1"]), {"h.0": 8, "h.1": 8}, 64, kept)


def test_each_sae_has_its_rate_and_window() -> None:
    found = resolve()
    assert list(found.lrs) == list(found.dead_windows) == SAES


def test_a_resumed_run_keeps_the_values_of_each_sae() -> None:
    lrs, windows = {"h.0": 0.1, "h.0/seed2": 0.2, "h.1": 0.3, "h.1/seed2": 0.4}, dict.fromkeys(SAES, 7)
    kernels = dict.fromkeys(SAES, KernelSettings(kernels="torch", compute_dtype="float32"))
    found = resolve(dataclasses.replace(resolve(), lrs=lrs, dead_windows=windows, kernels=kernels))
    assert found.lrs == lrs
    assert found.dead_windows == windows
    # A setting that is given replaces the kept one.
    assert found.kernels["h.0"].kernels == "reference"
