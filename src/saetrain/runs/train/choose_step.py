"""Choose the kernels of a run: those of --kernels, or the fastest that this machine supports."""

from __future__ import annotations

import functools
import importlib.util
import os
from functools import partial
from typing import Literal

import torch

from saetrain.coders.topk import TopK
from saetrain.errors import SaetrainError
from saetrain.logs.console import log_rank0
from saetrain.ops.cpu_features import has_fast_bf16
from saetrain.ops.native import bindings as native
from saetrain.optim import OptimSettings
from saetrain.training.steps.base import KernelSettings, ReferenceStep, TrainStep
from saetrain.training.steps.native import NativeStep
from saetrain.training.steps.pytorch import TorchStep
from saetrain.training.trainer import END_TO_END_LOSSES

KERNEL_LANGUAGE = {"native": "C++", "triton": "Triton"}


@functools.cache
def choose_kernels(
    settings: KernelSettings, optim: OptimSettings, loss_fn: str, device: torch.device
) -> KernelSettings:
    """Return ``settings`` with every `auto` resolved; SaetrainError for kernels that cannot run here."""
    name, dtype = settings.kernels, settings.compute_dtype
    if loss_fn in END_TO_END_LOSSES:
        if name not in ("auto", "reference"):
            raise SaetrainError(
                f"--kernels {name}: supports only the SAE's own loss, but --loss_fn {loss_fn} needs gradients through "
                "the model; omit the flag to use --kernels reference"
            )
        name = "reference"
    problems = {
        "native": partial(_why_native_unsupported, optim, device),
        "triton": partial(_why_triton_unsupported, optim, device),
    }
    if name in problems:
        problem = problems[name]()
        if problem:
            raise SaetrainError(
                f"--kernels {name}: {problem}; omit the flag to use the fastest supported kernels; to resume a run "
                f"that was started with {name}, pass --kernels torch"
            )
    if name == "auto":
        fast: Literal["native", "triton"] = "native" if device.type == "cpu" else "triton"
        problem = problems[fast]()
        if problem:
            log_rank0(f"--kernels auto: the {KERNEL_LANGUAGE[fast]} kernels are not used: {problem}; using PyTorch's")
        name = "torch" if problem else fast
    if name == "reference" and dtype == "bfloat16":
        raise SaetrainError("--compute_dtype bfloat16: --kernels reference supports only float32")
    if dtype == "auto":
        dtype = "bfloat16" if name != "reference" and has_fast_bf16(device) else "float32"
    return KernelSettings(kernels=name, compute_dtype=dtype)


def _why_native_unsupported(optim: OptimSettings, device: torch.device) -> str | None:
    """Return why the C++ kernels cannot be used, or None."""
    if optim.optimizer != "adam":
        return f"they support only --optimizer adam, not {optim.optimizer}"
    if device.type != "cpu":
        return f"they run on a CPU, not on {device}"
    try:
        native.load_library()
    except OSError as error:
        return f"they can't be built: {error}"
    return None


def _why_triton_unsupported(optim: OptimSettings, device: torch.device) -> str | None:
    """Return why the Triton kernels cannot be used, or None."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if optim.optimizer != "adam":
        return f"they support only --optimizer adam, not {optim.optimizer}"
    if device.type != "cuda" and not interpreted:
        return f"they run on a GPU, not on {device}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type != "cuda":
        log_rank0("--kernels triton: TRITON_INTERPRET=1 selects Triton's interpreter, which is for tests and very slow")
        return None
    from saetrain.training.steps.self_check import find_kernel_problem

    # The check takes seconds at the first start on a machine, because an untested compiler or GPU may be wrong.
    return find_kernel_problem(device)


def build_train_step(coder: TopK, kernels: KernelSettings, optim: OptimSettings, *, no_accumulation: bool) -> TrainStep:
    """Return the training step that ``kernels``, resolved by :func:`choose_kernels`, names.

    ``no_accumulation``: a step has one micro-batch on one rank, so its gradients are not added to others.
    """
    bf16 = kernels.compute_dtype == "bfloat16"
    if kernels.kernels == "native":
        return NativeStep(coder, optim, use_bf16=bf16, no_accumulation=no_accumulation)
    if kernels.kernels == "triton":
        from saetrain.training.steps.triton import TritonStep

        return TritonStep(coder, optim, use_bf16=bf16, no_accumulation=no_accumulation)
    if kernels.kernels == "torch":
        return TorchStep(coder, optim, torch.bfloat16 if bf16 else torch.float32)
    return ReferenceStep(coder, optim)
