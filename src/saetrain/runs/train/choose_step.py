"""Choose the training step of a run: the one that --kernels names, or the first that has no objection."""

from __future__ import annotations

import functools

import torch

from saetrain.coders import SparseCoder
from saetrain.config import RunConfig
from saetrain.errors import SaetrainError
from saetrain.logs.console import log_rank0
from saetrain.ops.cpu_features import has_fast_bf16
from saetrain.optim import OptimSettings
from saetrain.training.steps import STEP_DEVICES, StepName, load_step_class
from saetrain.training.steps.base import KernelSettings, StepRequest, TrainStep
from saetrain.types import Site


def step_request(config: RunConfig, device: torch.device, site: Site | None = None) -> StepRequest:
    """Return what the training step of an SAE must support; ``site`` None: it is not known yet."""
    y_is_x = site is None or site.is_sae
    return StepRequest(config.coder_class, config.optim, device, config.train.end_to_end, y_is_x, config.sae)


@functools.cache
def choose_kernels(settings: KernelSettings, request: StepRequest) -> KernelSettings:
    """Return ``settings`` with every `auto` resolved; SaetrainError for a step that cannot serve ``request``."""
    name, dtype = settings.kernels, settings.compute_dtype
    if name == "auto":
        name = _choose_fastest(request)
    else:
        objection = _find_objection(name, request)
        if objection:
            raise SaetrainError(
                f"--kernels {name}: {objection}; omit the flag to use the fastest supported kernels; to resume a run "
                f"that was started with {name}, pass --kernels torch"
            )
    if name == "reference" and dtype == "bfloat16":
        raise SaetrainError("--compute_dtype bfloat16: --kernels reference supports only float32")
    if dtype == "auto":
        is_bf16 = name != "reference" and not request.end_to_end and has_fast_bf16(request.device)
        dtype = "bfloat16" if is_bf16 else "float32"
    return KernelSettings(kernels=name, compute_dtype=dtype)


def _choose_fastest(request: StepRequest) -> StepName:
    """Return the first step for the device that has no objection, and log the objections."""
    for name, device_type in STEP_DEVICES.items():
        if device_type not in (None, request.device.type):
            continue
        objection = _find_objection(name, request)
        if objection is None:
            return name
        log_rank0(f"--kernels auto: the {name} kernels are not used: {objection}; using PyTorch's")
    raise AssertionError("autograd supports every request")


def _find_objection(name: str, request: StepRequest) -> str | None:
    """Return why the step can't serve the request, or None."""
    step = load_step_class(name)
    return f"the package {name} is not installed" if step is None else step.unsupported(request)


def build_train_step(
    coder: SparseCoder, kernels: KernelSettings, optim: OptimSettings, *, no_accumulation: bool
) -> TrainStep:
    """Return the training step that ``kernels``, resolved by :func:`choose_kernels`, names.

    ``no_accumulation``: a step has one micro-batch on one rank, so its gradients are not added to others.
    """
    step = load_step_class(kernels.kernels)
    assert step is not None, kernels
    return step.build(coder, optim, kernels, no_accumulation=no_accumulation)
