"""All figures of several coders on held-out activations, in one pass over the text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from saetrain.coders.base import SparseCoder
from saetrain.errors import SaetrainError
from saetrain.evaluation.geometry import geometry_metrics
from saetrain.evaluation.reconstruction import ReconstructionSums
from saetrain.evaluation.sparsity import SparsitySums

CHUNK_TOKENS = 1024
"""Tokens encoded at once, which bounds the (tokens, F) pre-activations."""


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Held-out figures while training."""

    eval_every: int = 1000
    """Optimizer steps between evaluations on held-out text (and one at the end); 0: only at the end."""
    eval_tokens: int = 20_000
    """Held-out tokens that an evaluation takes."""

    def __post_init__(self) -> None:
        if self.eval_every < 0:
            raise SaetrainError(f"--eval_every {self.eval_every}: must not be negative")
        if self.eval_tokens < 1:
            raise SaetrainError(f"--eval_tokens {self.eval_tokens}: must be at least 1")


@dataclass(frozen=True)
class Subject:
    """A coder that takes raw activations of ``hookpoint``; ``centre`` (D,) near their mean."""

    hookpoint: str
    coder: SparseCoder
    centre: Tensor


@torch.no_grad()
def evaluate(
    subjects: Mapping[str, Subject],
    batches: Iterable[Mapping[str, Tensor]],
    tokens: int,
    dead_threshold: float,
) -> dict[str, dict[str, float]]:
    """{subject: figures} over the first ``tokens`` tokens of ``batches`` of raw activations {hookpoint: (n, D)}."""
    sums = {
        name: (
            ReconstructionSums(subject.centre),
            SparsitySums(subject.coder.num_latents, dead_threshold, subject.centre.device),
        )
        for name, subject in subjects.items()
    }
    seen = 0
    for batch in batches:
        count = min(tokens - seen, len(next(iter(batch.values()))))
        for name, subject in subjects.items():
            for x in batch[subject.hookpoint][:count].split(CHUNK_TOKENS):
                codes = subject.coder.encode(x.float())
                sums[name][0].add(x, subject.coder.decode(codes))
                sums[name][1].add(codes)
        seen += count
        if seen >= tokens:
            break
    return {
        name: {
            "tokens": seen,
            **reconstruction.metrics(),
            **sparsity.metrics(),
            **geometry_metrics(subjects[name].coder.W_enc, subjects[name].coder.W_dec),
        }
        for name, (reconstruction, sparsity) in sums.items()
    }
