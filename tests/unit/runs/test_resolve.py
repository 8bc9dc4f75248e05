"""The values that a run resolves belong to SAEs, of which a site may have several."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import torch

from saetrain.cli import parse_train
from saetrain.runs.train.resolve import Resolved, resolve_run
from saetrain.types import Site

WORDS = "model data --init_seeds 1 2 --lr auto --num_latents 64 --k 4 --kernels reference --compute_dtype float32"
SITES = {name: Site.of_sae(name) for name in ("h.0", "h.1")}
MODEL: Any = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)


def resolve(kept: Resolved | None = None) -> Resolved:
    return resolve_run(parse_train(WORDS.split()), MODEL, SITES, {"h.0": 8, "h.1": 8}, 64, kept)


def test_each_sae_has_its_rate_and_window() -> None:
    found = resolve()
    assert list(found.lrs) == list(found.dead_windows) == ["h.0", "h.0/seed2", "h.1", "h.1/seed2"]


def test_a_resumed_run_keeps_the_values_of_each_sae_also_those_of_an_earlier_version() -> None:
    lrs, windows = {"h.0": 0.1, "h.0/seed2": 0.2, "h.1": 0.3}, {"h.0": 1, "h.0/seed2": 2, "h.1": 3}
    found = resolve(dataclasses.replace(resolve(), lrs=lrs, dead_windows=windows))
    assert found.lrs == {**lrs, "h.1/seed2": 0.3}
    assert found.dead_windows == {**windows, "h.1/seed2": 3}
