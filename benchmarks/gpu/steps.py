"""A training step by each path, over inputs in turn: ours through the trainer, and sparsify's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Work
from benchmarks.inputs import BATCHES, SEED, STEPS, activations
from benchmarks.peers import sparsify_gpu
from saetrain.activations.normalize import Normalizer
from saetrain.coders.topk import TopK
from saetrain.optim import Optimizer, OptimSettings
from saetrain.training.engine import Engine
from saetrain.training.firing import LIFT, DeadSettings, FiringTracker
from saetrain.training.torch_engine import TorchEngine
from saetrain.training.trainer import SaeTrainer, Trainer, TrainSettings
from saetrain.training.triton_check import Shape
from saetrain.training.triton_engine import TritonEngine

LR = 1e-3
SKEWED = "triton (skewed inputs)"
"""Over inputs as those of the CPU's benchmarks, in which few latents fire often and most hardly do."""


@lru_cache(maxsize=1)
def _initial(width: int, latents: int, k: int) -> TopK:
    """Kept, for making a wide one takes long."""
    return TopK(width, latents, k, seed=SEED)


def coder_of(shape: Shape, device: str) -> TopK:
    """A fresh coder."""
    return copy.deepcopy(_initial(shape.width, shape.latents, shape.k)).to(device)


def batches_of(shape: Shape, device: str, *, skewed: bool = False) -> list[Tensor]:
    """Activations in turn, so that none is in the cache from the step before; unless skewed, all latents fire alike."""
    if skewed:
        work = Work("step", tokens=shape.tokens, width=shape.width, latents=shape.latents, k=shape.k)
        return [batch.to(device) for batch in activations(work)]
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randn(shape.tokens, shape.width, generator=generator).to(device) for _ in range(BATCHES)]


class Ours:
    """Our whole step as in a run: turning the inputs, spikes, counters and the lifting of dead latents are in it."""

    def __init__(self, build: Callable[[TopK], Engine], shape: Shape, device: str) -> None:
        coder = coder_of(shape, device)
        window = DeadSettings().window(STEPS * shape.tokens, shape.latents, shape.k)
        firing = FiringTracker(shape.latents, window, DeadSettings().dead_percentage_threshold, torch.device(device))
        axes, variance = torch.eye(shape.width, device=device), float(shape.width)
        normalizer = Normalizer(torch.zeros(shape.width, device=device), 1.0, axes, variance, float("inf"))
        about: dict[str, Any] = {"data_variance": variance, "raw_mse": 1.0, "lr": LR, "seed": SEED, "lift": LIFT}
        self._sae = SaeTrainer("x", coder, partial(normalizer, half=True), build(coder), firing, **about)
        settings = TrainSettings(max_tokens=STEPS * shape.tokens)
        self._trainer = Trainer({"x": self._sae}, settings, tokens=shape.tokens, warmup=0)

    def __call__(self, x: Tensor) -> None:
        """One step."""
        self._trainer.train_step(lambda _: {"x": x})

    def check(self) -> dict[str, float]:
        """The share of the latents that fired in the last step; AssertionError where a step was left out."""
        left_out = self._trainer.settle()
        assert not left_out, str(left_out[0])
        count = int(self._sae.engine.state()["W_dec.step"])
        assert count == self._trainer.step, f"{count} of {self._trainer.step} steps were applied"
        assert self._sae.sums is not None
        return {"fired": float((self._sae.sums.fired > 0).float().mean())}


class Theirs:
    """sparsify's; ``package``: with the package's own modules."""

    def __init__(self, package: sparsify_gpu.Package | None, shape: Shape, device: str) -> None:
        self._step = sparsify_gpu.Step(coder_of(shape, device), package)

    def __call__(self, x: Tensor) -> None:
        """One step."""
        self._fvu = self._step(x)

    def check(self) -> dict[str, float]:
        """Nothing but that the loss is a number."""
        assert self._fvu == self._fvu, "the loss is not a number"
        return {}


Path = Callable[[Shape, str], "Ours | Theirs"]


def triton(coder: TopK, **how: Any) -> Engine:
    """Our kernels, in bf16."""
    return TritonEngine(coder, OptimSettings(), half=True, fused=True, **how)


def plain(coder: TopK) -> Engine:
    """The PyTorch path, in bf16."""
    settings = OptimSettings()
    optimizer = Optimizer(
        dict(coder.named_parameters()),
        settings,
        project=coder.remove_parallel_gradient,
        renormalize=coder.renormalize_decoder,
    )
    return TorchEngine(coder, optimizer, torch.bfloat16)


PATHS: dict[str, Path] = {
    "triton": partial(Ours, triton),
    "torch": partial(Ours, plain),
    "sparsify (without its kernels)": partial(Theirs, None),
}
OTHER_PRODUCTS: dict[str, Path] = {
    "triton (sparse)": partial(Ours, partial(triton, products="sparse")),
    "triton (dense)": partial(Ours, partial(triton, products="dense")),
}
"""Where the choice between them is near."""


def paths_of(shape: Shape, small: Shape) -> dict[str, Path]:
    """What is timed at a shape."""
    found = dict(PATHS)
    package = sparsify_gpu.package()
    if package is not None:
        found["sparsify"] = partial(Theirs, package)
    if shape == small:
        found["triton (no graphs)"] = partial(Ours, partial(triton, recorded=False))
    elif shape.latents <= 256 * shape.k:
        found |= OTHER_PRODUCTS
    return {**found, SKEWED: PATHS["triton"]}


def in_turn(step: Callable[[Tensor], object], batches: Sequence[Tensor]) -> Callable[[], None]:
    """The step, each time over the next batch."""
    number = 0

    def run() -> None:
        nonlocal number
        number += 1
        step(batches[number % len(batches)])

    return run
