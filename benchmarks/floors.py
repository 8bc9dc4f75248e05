"""What no trainer goes below: the model's forward to the hook, the encoder's GEMM, one fused Adam pass."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.cases import Work
from benchmarks.inputs import SEED, hookpoint, sequences_per_step, token_ids
from benchmarks.saetrain_runner import base_model
from saetrain.activations.capture import ActivationCapture

CHUNK = 256
"""Rows of a GEMM at once: its output stays in the cache, which was faster than one large one."""


class Repeated:
    """A piece of work that is the same each time."""

    period = 1

    def __init__(self, pieces: list[Callable[[], None]]) -> None:
        self._pieces = pieces

    def run(self, steps: int) -> list[float]:
        """Seconds of each repetition."""
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            for piece in self._pieces:
                piece()
            seconds.append(time.perf_counter() - start)
        return seconds


def build(work: Work) -> Repeated:
    """The floor of that kind; of an end-to-end step, the sum of the three."""
    if work.kind == "forward":
        return Repeated([_forward(work)])
    if work.kind == "gemm":
        return Repeated([_gemm(work, torch.bfloat16 if work.model_dtype == "bf16" else torch.float32)])
    if work.kind == "adam":
        return Repeated([_adam(work)])
    each = [piece for _ in work.layers for piece in (_gemm(work, torch.bfloat16), _adam(work))]
    return Repeated([_forward(work), *each])


def _forward(work: Work) -> Callable[[], None]:
    capture = ActivationCapture(base_model(work), [hookpoint(work, layer) for layer in work.layers])
    ids = token_ids(work, sequences_per_step(work))
    mask = torch.ones_like(ids)

    def piece() -> None:
        capture(ids, mask)

    return piece


def _gemm(work: Work, dtype: torch.dtype) -> Callable[[], None]:
    torch.manual_seed(SEED)
    x = torch.randn(work.tokens, work.width).to(dtype)
    weight = torch.randn(work.latents, work.width).to(dtype).T
    out = torch.empty(CHUNK, work.latents, dtype=dtype)

    def piece() -> None:
        for rows in x.split(CHUNK):
            torch.mm(rows, weight, out=out[: len(rows)])

    return piece


def _adam(work: Work) -> Callable[[], None]:
    weights = [torch.nn.Parameter(torch.randn(work.latents, work.width)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = torch.optim.Adam(weights, fused=True)

    def piece() -> None:
        optimizer.step()

    return piece
