"""Implementations of a training step of one coder (forward, gradients, update), the fastest first."""

from __future__ import annotations

import importlib.util
from typing import Literal

from saetrain.training.steps.base import TrainStep

StepName = Literal["triton", "native", "torch"]
STEP_DEVICES: dict[StepName, str | None] = {"triton": "cuda", "native": "cpu", "torch": None}
"""{value of ``--kernels``: type of the only device that it is fast on, or None}, the fastest first."""


def load_step_class(name: str) -> type[TrainStep] | None:
    """Return the class of a training step, or None if the package that it needs is not installed."""
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return None
        from saetrain.training.steps.triton import TritonStep

        return TritonStep
    if name == "native":
        from saetrain.training.steps.native import NativeStep

        return NativeStep
    from saetrain.training.steps.autograd import AutogradStep

    return AutogradStep
