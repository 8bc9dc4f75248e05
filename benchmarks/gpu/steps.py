"""A training step by each path, over inputs in turn: ours through the trainer, and sparsify's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Work
from benchmarks.inputs import SEED, STEPS, activations
from benchmarks.peers import sparsify_gpu
from saetrain.coders.topk import TopK
from saetrain.optim import Optimizer, OptimSettings
from saetrain.training.engine import Engine
from saetrain.training.firing import LIFT, DeadSettings, FiringTracker
from saetrain.training.torch_engine import TorchEngine
from saetrain.training.trainer import SaeTrainer, Trainer, TrainSettings
from saetrain.training.triton_check import Shape
from saetrain.training.triton_engine import TritonEngine

LR = 1e-3
Step = Callable[[Tensor], object]


@lru_cache(maxsize=1)
def _initial(width: int, latents: int, k: int, device: str) -> TopK:
    """Kept, for making a wide one takes long."""
    return TopK(width, latents, k, seed=SEED).to(device)


def coder_of(shape: Shape, device: str) -> TopK:
    """A fresh coder."""
    return copy.deepcopy(_initial(shape.width, shape.latents, shape.k, device))


def batches_of(shape: Shape, device: str) -> list[Tensor]:
    """Activations in turn, so that none is in the cache from the step before."""
    work = Work("step", tokens=shape.tokens, width=shape.width, latents=shape.latents, k=shape.k)
    return [batch.to(device) for batch in activations(work)]


def through_trainer(build: Callable[[TopK], Engine]) -> Callable[[Shape, str], Step]:
    """Our whole step as in a run: spikes, counters and the lifting of dead latents are in it."""

    def make(shape: Shape, device: str) -> Step:
        coder = coder_of(shape, device)
        window = DeadSettings().window(STEPS * shape.tokens, shape.latents, shape.k)
        firing = FiringTracker(shape.latents, window, DeadSettings().dead_percentage_threshold, torch.device(device))
        about: dict[str, Any] = {"data_variance": float(shape.width), "raw_mse": 1.0, "lr": LR, "seed": SEED}
        sae = SaeTrainer("x", coder, Tensor.float, build(coder), firing, **about, lift=LIFT)
        settings = TrainSettings(max_tokens=STEPS * shape.tokens)
        trainer = Trainer({"x": sae}, settings, tokens=shape.tokens, warmup=0)
        return lambda x: trainer.train_step(lambda _: {"x": x})

    return make


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


def sparsify(own: bool) -> Callable[[Shape, str], Step]:
    """Their step; ``own``: with the package's own modules."""

    def make(shape: Shape, device: str) -> Step:
        return sparsify_gpu.Step(coder_of(shape, device), sparsify_gpu.package() if own else None)

    return make


PATHS: dict[str, Callable[[Shape, str], Step]] = {
    "triton": through_trainer(triton),
    "torch": through_trainer(plain),
    "sparsify (written out)": sparsify(own=False),
}
OTHER_PRODUCTS = {
    "triton (sparse)": through_trainer(lambda coder: triton(coder, products="sparse")),
    "triton (dense)": through_trainer(lambda coder: triton(coder, products="dense")),
}
"""Where the choice between them is near."""
GRAPHS = {
    "triton (no graphs)": through_trainer(lambda coder: triton(coder, recorded=False)),
    "triton (graphs)": through_trainer(lambda coder: triton(coder, recorded=True)),
}


def paths_of(shape: Shape, small: Shape) -> dict[str, Callable[[Shape, str], Step]]:
    """What is timed at a shape."""
    found = dict(PATHS)
    if sparsify_gpu.package() is not None:
        found["sparsify (its own modules)"] = sparsify(own=True)
    if shape == small:
        return {**found, **GRAPHS}
    return {**found, **OTHER_PRODUCTS} if shape.latents <= 256 * shape.k else found


def in_turn(step: Step, batches: Sequence[Tensor]) -> Callable[[], None]:
    """The step, each time over the next batch."""
    number = 0

    def run() -> None:
        nonlocal number
        number += 1
        step(batches[number % len(batches)])

    return run
