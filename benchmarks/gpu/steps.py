"""Training steps of each implementation: saetrain's through its trainer, and sparsify's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Work
from benchmarks.inputs import BATCHES, SEED, STEPS, make_activations
from benchmarks.peers import sparsify_gpu
from saetrain.activations.normalize import Normalizer
from saetrain.coders.topk import TopK
from saetrain.optim import OptimSettings
from saetrain.training.dead_latents import DEFAULT_DEAD_BIAS_LIFT, DeadSettings, FiringTracker
from saetrain.training.sae_state import SaeState
from saetrain.training.steps.autograd import AutogradStep
from saetrain.training.steps.base import MicroBatch, TrainStep
from saetrain.training.steps.self_check import StepShape
from saetrain.training.steps.triton import TritonStep
from saetrain.training.trainer import Trainer, TrainSettings
from saetrain.types import Site

LR = 1e-3
SKEWED = "triton (skewed inputs)"
"""With the inputs of the CPU benchmarks, on which few latents fire often and most fire rarely."""


@lru_cache(maxsize=1)
def _build_initial(width: int, latents: int, k: int) -> TopK:
    """Cached, because initializing a wide coder takes long."""
    return TopK(width, latents, k, seed=SEED)


def build_coder(shape: StepShape, device: str) -> TopK:
    """Build a coder with initial weights."""
    return copy.deepcopy(_build_initial(shape.width, shape.latents, shape.k)).to(device)


def build_batches(shape: StepShape, device: str, *, skewed: bool = False) -> list[Tensor]:
    """Several batches, so that none is in the cache from the previous step; unless skewed, all latents fire equally."""
    if skewed:
        work = Work("step", tokens=shape.tokens, width=shape.width, latents=shape.latents, k=shape.k)
        return [batch.to(device) for batch in make_activations(work)]
    generator = torch.Generator().manual_seed(SEED)
    return [torch.randn(shape.tokens, shape.width, generator=generator).to(device) for _ in range(BATCHES)]


class SaetrainStep:
    """saetrain's whole step as in a run, with rotation of the inputs, spike detection, counters and dead latents."""

    def __init__(self, build: Callable[[TopK], TrainStep], shape: StepShape, device: str) -> None:
        coder = build_coder(shape, device)
        window = DeadSettings().resolve_window(STEPS * shape.tokens, shape.latents, shape.k)
        firing = FiringTracker(shape.latents, window, DeadSettings().dead_percentage_threshold, torch.device(device))
        axes, variance = torch.eye(shape.width, device=device), float(shape.width)
        normalizer = Normalizer(torch.zeros(shape.width, device=device), 1.0, axes, variance)
        about: dict[str, Any] = {
            "data_variance": variance,
            "mse_per_fvu": 1.0,
            "peak_lr": LR,
            "seed": SEED,
            "dead_bias_lr_multiplier": DEFAULT_DEAD_BIAS_LIFT,
        }
        normalize = partial(normalizer, bf16=True)
        self._sae = SaeState(Site.of_sae("x"), coder, normalize, normalize, build(coder), firing, **about)
        settings = TrainSettings(max_tokens=STEPS * shape.tokens)
        self._trainer = Trainer({"x": self._sae}, settings, tokens_per_step=shape.tokens, warmup_steps=0)

    def __call__(self, x: Tensor) -> None:
        """One step."""
        self._trainer.train_step(repeat({"x": MicroBatch.of_sae(x)}))

    def check_steps(self) -> dict[str, float]:
        """Return the share of latents that fired in the last step; AssertionError if a step was skipped."""
        left_out = self._trainer.drain_spikes()
        assert not left_out, str(left_out[0])
        count = int(self._sae.train_step.state_dict()["W_dec.step"])
        assert count == self._trainer.step, f"{count} of {self._trainer.step} steps were applied"
        assert self._sae.stats is not None
        return {"fired": float((self._sae.stats.fired > 0).float().mean())}


class SparsifyStep:
    """sparsify's step; ``package``: use the package's own modules."""

    def __init__(self, package: sparsify_gpu.Package | None, shape: StepShape, device: str) -> None:
        self._step = sparsify_gpu.Step(build_coder(shape, device), package)

    def __call__(self, x: Tensor) -> None:
        """One step."""
        self._fvu = self._step(x)

    def check_steps(self) -> dict[str, float]:
        """AssertionError if the loss is not a number; returns nothing else."""
        assert self._fvu == self._fvu, "the loss is not a number"
        return {}


StepBuilder = Callable[[StepShape, str], "SaetrainStep | SparsifyStep"]


def build_triton_step(coder: TopK, **options: Any) -> TrainStep:
    """saetrain's Triton kernels, in bf16."""
    return TritonStep(coder, OptimSettings(), use_bf16=True, no_accumulation=True, **options)


def build_torch_step(coder: TopK) -> TrainStep:
    """saetrain's PyTorch step, in bf16."""
    return AutogradStep(coder, OptimSettings(), torch.bfloat16)


STEP_BUILDERS: dict[str, StepBuilder] = {
    "triton": partial(SaetrainStep, build_triton_step),
    "torch": partial(SaetrainStep, build_torch_step),
    "sparsify (without its kernels)": partial(SparsifyStep, None),
}
PRODUCT_BUILDERS: dict[str, StepBuilder] = {
    "triton (sparse)": partial(SaetrainStep, partial(build_triton_step, products="sparse")),
    "triton (dense)": partial(SaetrainStep, partial(build_triton_step, products="dense")),
}
"""For shapes at which sparse and dense gradient products take similar times."""


def builders_for(shape: StepShape, small: StepShape) -> dict[str, StepBuilder]:
    """The implementations that are timed at a shape."""
    found = dict(STEP_BUILDERS)
    package = sparsify_gpu.load_package()
    if package is not None:
        found["sparsify"] = partial(SparsifyStep, package)
    if shape == small:
        found["triton (no graphs)"] = partial(SaetrainStep, partial(build_triton_step, use_cuda_graphs=False))
    elif shape.latents <= 256 * shape.k:
        found |= PRODUCT_BUILDERS
    return {**found, SKEWED: STEP_BUILDERS["triton"]}


def cycle_batches(step: Callable[[Tensor], object], batches: Sequence[Tensor]) -> Callable[[], None]:
    """Return a function that runs the step on the next batch."""
    number = 0

    def run() -> None:
        nonlocal number
        number += 1
        step(batches[number % len(batches)])

    return run
