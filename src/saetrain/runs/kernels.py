"""Which kernels a run takes: what was asked for, or the fastest that run here."""

from __future__ import annotations

import functools

import torch

from saetrain.coders.topk import TopK
from saetrain.errors import SaetrainError
from saetrain.kernels import native
from saetrain.kernels.processor import half_is_fast
from saetrain.logs.console import say
from saetrain.optim import Optimizer, OptimSettings
from saetrain.training.engine import AutogradEngine, Engine, KernelSettings
from saetrain.training.native_engine import NativeEngine
from saetrain.training.torch_engine import TorchEngine
from saetrain.training.trainer import END_TO_END


@functools.cache
def choose_kernels(
    settings: KernelSettings, optim: OptimSettings, loss_fn: str, device: torch.device
) -> KernelSettings:
    """``settings`` with every `auto` worked out; SaetrainError for what can't run here."""
    name, dtype = settings.kernels, settings.compute_dtype
    if loss_fn in END_TO_END:
        if name not in ("auto", "reference"):
            raise SaetrainError(
                f"--kernels {name}: its gradients are written out for the SAE's own loss, and --loss_fn {loss_fn} "
                "needs those through the model; leave the flag out, and --kernels reference is taken"
            )
        name = "reference"
    problem = _against_native(optim, device)
    if name == "native" and problem:
        raise SaetrainError(f"--kernels native: {problem}; use --kernels torch")
    if name in ("auto", "native") and not problem:
        problem = _build_problem()
        if problem and name == "native":
            raise SaetrainError(f"--kernels native: the C++ kernels can't be built: {problem}; use --kernels torch")
    if name == "auto" and problem and device.type == "cpu":
        say(f"--kernels auto: the C++ kernels are not used: {problem}; PyTorch's are")
    if name == "auto":
        name = "torch" if problem else "native"
    if name == "reference" and dtype == "bfloat16":
        raise SaetrainError("--compute_dtype bfloat16: --kernels reference computes in float32 alone")
    if dtype == "auto":
        dtype = "bfloat16" if name != "reference" and half_is_fast(device) else "float32"
    return KernelSettings(kernels=name, compute_dtype=dtype)


def _against_native(optim: OptimSettings, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"it runs on a CPU, not on {device}"
    if optim.optimizer != "adam":
        return f"it steps by adam alone, not by --optimizer {optim.optimizer}"
    return None


def _build_problem() -> str | None:
    """Why the C++ kernels can't be had, or None."""
    try:
        native.library()
    except OSError as error:
        return str(error)
    return None


def make_engine(coder: TopK, kernels: KernelSettings, optim: OptimSettings, *, alone: bool) -> Engine:
    """The engine that ``kernels``, worked out by :func:`choose_kernels`, names.

    ``alone``: a step has one micro-batch on one rank, so its gradients have nothing to be added to.
    """
    half = kernels.compute_dtype == "bfloat16"
    if kernels.kernels == "native":
        return NativeEngine(coder, optim, half=half, fused=alone)
    optimizer = Optimizer(
        dict(coder.named_parameters()),
        optim,
        project=coder.remove_parallel_gradient,
        renormalize=coder.renormalize_decoder,
    )
    if kernels.kernels == "torch":
        return TorchEngine(coder, optimizer, torch.bfloat16 if half else torch.float32)
    return AutogradEngine(coder, optimizer)
