"""Lower bounds of a step (floors): the forward pass to the hook, the encoder's GEMM, one fused Adam pass."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.cases import Work
from benchmarks.inputs import SEED, hookpoint_name, make_token_ids, sequences_per_step
from benchmarks.saetrain_runner import build_base_model
from saetrain.activations.capture import ActivationCapture

GEMM_ROWS = 256
"""Rows per GEMM: the output fits into the cache, which is faster than one large GEMM."""


class RepeatedWork:
    """The same pieces of work, repeated."""

    period = 1

    def __init__(self, pieces: list[Callable[[], None]]) -> None:
        self._pieces = pieces

    def run(self, steps: int) -> list[float]:
        """Run the pieces ``steps`` times and return the seconds of each repetition."""
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            for piece in self._pieces:
                piece()
            seconds.append(time.perf_counter() - start)
        return seconds


def build(work: Work) -> RepeatedWork:
    """Build the floor of this kind; that of an end-to-end step is the sum of all three."""
    if work.kind == "forward":
        return RepeatedWork([_build_forward(work)])
    if work.kind == "gemm":
        return RepeatedWork([_build_gemm(work, torch.bfloat16 if work.model_dtype == "bf16" else torch.float32)])
    if work.kind == "adam":
        return RepeatedWork([_build_adam(work)])
    each = [piece for _ in work.layers for piece in (_build_gemm(work, torch.bfloat16), _build_adam(work))]
    return RepeatedWork([_build_forward(work), *each])


def _build_forward(work: Work) -> Callable[[], None]:
    capture = ActivationCapture(build_base_model(work), [hookpoint_name(work, layer) for layer in work.layers])
    ids = make_token_ids(work, sequences_per_step(work))
    mask = torch.ones_like(ids)

    def piece() -> None:
        capture(ids, mask)

    return piece


def _build_gemm(work: Work, dtype: torch.dtype) -> Callable[[], None]:
    torch.manual_seed(SEED)
    x = torch.randn(work.tokens, work.width).to(dtype)
    weight = torch.randn(work.latents, work.width).to(dtype).T
    out = torch.empty(GEMM_ROWS, work.latents, dtype=dtype)

    def piece() -> None:
        for rows in x.split(GEMM_ROWS):
            torch.mm(rows, weight, out=out[: len(rows)])

    return piece


def _build_adam(work: Work) -> Callable[[], None]:
    weights = [torch.nn.Parameter(torch.randn(work.latents, work.width)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = torch.optim.Adam(weights, fused=True)

    def piece() -> None:
        optimizer.step()

    return piece
