"""The pieces of the recipe, each of which can be switched off in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import saetrain_runner
from saetrain import optim
from saetrain.activations.normalize import Normalizer
from saetrain.coders import base
from saetrain.training import native_engine


def _constants(*values: tuple[Any, str, Any]) -> Callable[[], None]:
    """Sets constants of modules."""

    def switch_off() -> None:
        for module, name, value in values:
            assert hasattr(module, name), (module, name)
            setattr(module, name, value)

    return switch_off


def _all_latents(self: optim.Optimizer) -> Tensor:
    return torch.arange(len(self._parameters["b_enc"]))


AXES, IDLE, DECAY = "principal axes", "idle latents not updated", "weight decay"
PIECES: dict[str, Callable[[], None]] = {
    AXES: _constants(),
    IDLE: _constants((optim.Optimizer, "_active_latents", _all_latents)),
    "encoder starts at 0.3": _constants((base, "ENCODER_SCALE", 1.0)),
    "Adam's betas": _constants((native_engine, "BETAS", (0.9, 0.999)), (optim, "BETAS", (0.9, 0.999))),
    "encoder at half the rate": _constants((native_engine, "ENCODER_SHARE", 1.0), (optim, "ENCODER_SHARE", 1.0)),
    "decay over 80 %": _constants((optim, "DECAY_SHARE", 0.2)),
    DECAY: _constants(),
    "lift of dead latents": _constants((saetrain_runner, "LIFT", 0.0)),
}
"""{piece: what switches it off}; what takes its place is the usual value of other tools, or nothing."""


def kernels_without(piece: str | None) -> str:
    """Kernels that can do without it: the fastest have one update."""
    return "torch" if piece == IDLE else "auto"


def normalizer_without(piece: str | None, normalizer: Normalizer) -> Normalizer:
    """The inputs' constants, without axes where these are off."""
    return replace(normalizer, axes=torch.eye(len(normalizer.mean))) if piece == AXES else normalizer
