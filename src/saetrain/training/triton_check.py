"""Whether Triton's kernels compute on this device what they should: small steps by them beside autograd's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saetrain.coders.topk import TopK
from saetrain.kernels import gpu
from saetrain.optim import Optimizer, OptimSettings
from saetrain.training.engine import AutogradEngine, Engine
from saetrain.training.triton_engine import TritonEngine
from saetrain.types import StepContext

TOLERANCE, HALF_TOLERANCE = 1e-3, 0.05
"""Largest distance of what the steps do from autograd's, as a share of it; in small shapes 5e-6 was seen in fp32, and
0.003 in bf16, whose rounding decides between latents that are nearly alike."""
STEPS, STEPS_ON_CPU = 7, 3
"""On a GPU so many that the last ones are replayed from CUDA graphs."""
DEAD_STEP = 1
"""The one in which AuxK works."""
ALWAYS = 3
"""Latents that fire on every token, so that some have more pairs than one program sums."""


@dataclass(frozen=True)
class Shape:
    """N ``tokens``, D ``width``, F ``latents``, K active."""

    width: int
    latents: int
    k: int
    tokens: int


SMALL = Shape(33, 47, 5, 600)


@dataclass(frozen=True)
class Way:
    """How a step is computed; ``parts`` micro-batches, ``limit`` the norm that gradients are clipped to."""

    products: Literal["sparse", "dense"]
    half: bool = False
    parts: int = 1
    limit: float = 1.0

    def __str__(self) -> str:
        memory = "" if self.parts == 1 else f", {self.parts} micro-batches"
        clipped = ", clipped" if self.limit < 1 else ""
        return f"{self.products} products in {'bf16' if self.half else 'fp32'}{memory}{clipped}"

    @property
    def tolerance(self) -> float:
        """What rounding may do."""
        return HALF_TOLERANCE if self.half else TOLERANCE


CLIPPED = 0.01
WAYS = [
    Way(products, half, parts, limit)
    for products in ("sparse", "dense")
    for half, parts, limit in ((False, 1, 1.0), (False, 1, CLIPPED), (False, 2, CLIPPED), (True, 1, 1.0))
]


def distances(shape: Shape, device: torch.device, seed: int = 0) -> dict[Way, float]:
    """Of what some steps add to the weights (in bf16: of the moments behind them) from autograd's, as a share."""
    expected = {limit: _done(shape, device, seed, _reference(limit), 1) for limit in (1.0, CLIPPED)}
    found = {}
    for way in WAYS:
        right = expected[way.limit][way.half]
        done = _done(shape, device, seed, _engine(way, recorded=device.type == "cuda"), way.parts)[way.half]
        found[way] = float((done - right).norm() / right.norm())
    return found


def beyond(shape: Shape, device: torch.device) -> dict[Way, float]:
    """Those that are farther away than rounding explains: with one seed it may choose another latent, but with two?"""
    found = {way: each for way, each in distances(shape, device).items() if not each <= way.tolerance}
    if not found:
        return {}
    again = distances(shape, device, seed=1)
    return {way: each for way, each in found.items() if not again[way] <= way.tolerance}


def _settings(limit: float) -> OptimSettings:
    return OptimSettings(weight_decay=0.1, max_grad_norm=limit)


def _reference(limit: float) -> Callable[[TopK], Engine]:
    def build(coder: TopK) -> Engine:
        optimizer = Optimizer(
            dict(coder.named_parameters()),
            _settings(limit),
            project=coder.remove_parallel_gradient,
            renormalize=coder.renormalize_decoder,
        )
        return AutogradEngine(coder, optimizer)

    return build


def _engine(way: Way, *, recorded: bool) -> Callable[[TopK], Engine]:
    alone = way.parts == 1
    return lambda coder: TritonEngine(
        coder, _settings(way.limit), half=way.half, fused=alone, products=way.products, recorded=recorded and alone
    )


def _done(
    shape: Shape, device: torch.device, seed: int, build: Callable[[TopK], Engine], parts: int
) -> tuple[Tensor, Tensor]:
    """What the steps add to the weights, and the first moments behind them."""
    coder = TopK(shape.width, shape.latents, shape.k, auxk_alpha=1 / 32, seed=seed).to(device)
    with torch.no_grad():
        coder.b_enc[:ALWAYS] = 5.0
    start, engine = _flat(dict(coder.named_parameters())), build(coder)
    generator = torch.Generator().manual_seed(seed)
    variance, dead = torch.tensor(float(shape.width), device=device), torch.zeros(shape.latents, dtype=torch.bool)
    dead[-(shape.latents // 4) :] = True
    for step in range(STEPS if device.type == "cuda" else STEPS_ON_CPU):
        x = torch.randn(shape.tokens, shape.width, generator=generator).to(device)
        mask = dead.to(device) if step == DEAD_STEP else None
        about = StepContext(step, shape.tokens, mask, variance, variance, None if mask is None else shape.latents // 3)
        for part in x.chunk(parts):
            engine.micro_step(part, about)
        engine.norm_bound()
        engine.apply(1e-3)
    moments = {name: value for name, value in engine.state().items() if name.endswith("exp_avg")}
    return _flat(dict(coder.named_parameters())) - start, _flat(moments)


def _flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].detach().flatten() for name in sorted(tensors)])


@functools.cache
def fault(device: torch.device) -> str | None:
    """What is wrong with the kernels on ``device``, or None; what the GPU itself raises is raised."""
    try:
        # Triton launches where torch stands, whatever device its inputs are on.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            wrong = beyond(SMALL, device)
    except (torch.AcceleratorError, torch.OutOfMemoryError):
        raise
    except gpu.BUILD_ERRORS as error:
        return f"they can't be built: {type(error).__name__}: {error}"
    for way, distance in wrong.items():
        return f"on {device} their steps are {distance:.2g} of a step away from autograd's ({way})"
    return None
