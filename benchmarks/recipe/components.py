"""The components of the recipe, each of which can be switched off in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks import saetrain_runner
from saetrain.activations.normalize import Normalizer
from saetrain.coders import base
from saetrain.optim import build, schedule
from saetrain.training.steps import native


def _set_constants(*values: tuple[Any, str, Any]) -> Callable[[], None]:
    """Return a function that sets constants of modules."""

    def switch_off() -> None:
        for module, name, value in values:
            assert hasattr(module, name), (module, name)
            setattr(module, name, value)

    return switch_off


AXES, IDLE, DECAY = "principal axes", "idle latents not updated", "weight decay"
COMPONENTS: dict[str, Callable[[], None]] = {
    AXES: _set_constants(),
    IDLE: _set_constants((base.SparseCoder, "updates_idle_latents", True)),
    "encoder starts at 0.3": _set_constants((base, "ENCODER_INIT_NORM", 1.0)),
    "Adam's betas": _set_constants((native, "BETAS", (0.9, 0.999)), (build, "BETAS", (0.9, 0.999))),
    "encoder at half the rate": _set_constants((native, "ENCODER_LR_RATIO", 1.0), (build, "ENCODER_LR_RATIO", 1.0)),
    "decay over 80 %": _set_constants((schedule, "LR_DECAY_SHARE", 0.2)),
    DECAY: _set_constants(),
    "lift of dead latents": _set_constants((saetrain_runner, "DEFAULT_DEAD_BIAS_LIFT", 0.0)),
}
"""{component: function that switches it off}; it is replaced by the usual value of other tools, or by nothing."""


def kernels_without(component: str | None) -> str:
    """Kernels that support switching the component off; the fastest kernels have a fixed update."""
    return "torch" if component == IDLE else "auto"


def normalizer_without(component: str | None, normalizer: Normalizer) -> Normalizer:
    """The normalizer, without principal axes if these are switched off."""
    return replace(normalizer, axes=torch.eye(len(normalizer.mean))) if component == AXES else normalizer
