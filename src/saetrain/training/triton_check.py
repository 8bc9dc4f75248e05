"""Whether Triton's kernels compute on this device what they should: small steps by them beside autograd's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saetrain.coders.topk import TopK
from saetrain.kernels import gpu
from saetrain.optim import Optimizer, OptimSettings
from saetrain.training.engine import AutogradEngine, Engine
from saetrain.training.triton_engine import TritonEngine
from saetrain.types import Progress

TOLERANCE = 1e-3
"""Largest distance of the weights' movement from autograd's, as a share of it; rounding alone was seen at 5e-6."""
STEPS = 5
"""So many that the last ones are replayed from CUDA graphs where these are used."""


@dataclass(frozen=True)
class Shape:
    """N ``tokens``, D ``width``, F ``latents``, K active."""

    width: int
    latents: int
    k: int
    tokens: int


SMALL = Shape(33, 47, 5, 60)


def movements(shape: Shape, device: torch.device) -> dict[str, float]:
    """{way to compute: distance of the weights' movement in STEPS steps from autograd's, as a share of it}."""
    settings = OptimSettings(weight_decay=0.1)
    coder = _coder(shape, device)
    optimizer = Optimizer(
        dict(coder.named_parameters()),
        settings,
        project=coder.remove_parallel_gradient,
        renormalize=coder.renormalize_decoder,
    )
    expected = _movement(coder, AutogradEngine(coder, optimizer), shape)
    recorded = device.type == "cuda"
    found = {}
    for products in ("sparse", "dense"):
        for fused in (True, False):
            coder = _coder(shape, device)
            engine = TritonEngine(
                coder, settings, half=False, fused=fused, products=products, recorded=recorded and fused
            )
            moved = _movement(coder, engine, shape)
            name = f"{products} products, gradients {'fused' if fused else 'in memory'}"
            found[name] = float((moved - expected).norm() / expected.norm())
    return found


def _coder(shape: Shape, device: torch.device) -> TopK:
    return TopK(shape.width, shape.latents, shape.k, seed=0).to(device)


def _movement(coder: TopK, engine: Engine, shape: Shape) -> Tensor:
    """What STEPS steps over the same tokens add to the weights."""
    start = _flat(coder)
    device = start.device
    generator = torch.Generator().manual_seed(0)
    variance = torch.tensor(float(shape.width), device=device)
    for step in range(STEPS):
        x = torch.randn(shape.tokens, shape.width, generator=generator).to(device)
        engine.micro_step(x, Progress(step, shape.tokens, None, variance, variance))
        engine.norm_bound()
        engine.apply(1e-3)
    return _flat(coder) - start


def _flat(coder: TopK) -> Tensor:
    return torch.cat([p.detach().flatten() for _, p in sorted(coder.named_parameters())])


def fault(device: torch.device) -> str | None:
    """What is wrong with the kernels on ``device``, or None."""
    try:
        found = movements(SMALL, device)
    except gpu.BUILD_ERRORS as error:
        return f"they can't be built: {type(error).__name__}: {error}"
    for name, distance in found.items():
        if not distance <= TOLERANCE:
            return f"on {device} their steps are {distance:.2g} of a step away from autograd's ({name})"
    return None
