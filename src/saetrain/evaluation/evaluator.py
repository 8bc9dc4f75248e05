"""Evaluation during training: metrics of several coders on held-out activations, in one pass over the text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from saetrain.coders.base import SparseCoder
from saetrain.distributed import record_progress
from saetrain.errors import SaetrainError
from saetrain.evaluation.geometry import geometry_metrics
from saetrain.evaluation.reconstruction import ReconstructionSums
from saetrain.evaluation.sparsity import SparsitySums

CHUNK_TOKENS = 1024
"""Tokens encoded at once; bounds the memory of the pre-activations (N, F)."""


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """Evaluation on held-out text during training."""

    eval_every: int = 1000
    """Optimizer steps between evaluations on held-out text. A run always evaluates at its end (0: only there)."""
    eval_tokens: int = 20_000
    """Held-out tokens per evaluation."""

    def __post_init__(self) -> None:
        if self.eval_every < 0:
            raise SaetrainError(f"--eval_every {self.eval_every}: must not be negative")
        if self.eval_tokens < 1:
            raise SaetrainError(f"--eval_tokens {self.eval_tokens}: must be at least 1")


@dataclass(frozen=True)
class EvalTarget:
    """A coder of raw activations of ``hookpoint``; ``centre`` (D,) is any constant near their mean."""

    hookpoint: str
    coder: SparseCoder
    centre: Tensor


@torch.no_grad()
def evaluate_coders(
    targets: Mapping[str, EvalTarget],
    batches: Iterable[Mapping[str, Tensor]],
    max_tokens: int,
    dead_threshold: float,
) -> dict[str, dict[str, float]]:
    """Return {target: {metric: value}} over the first ``max_tokens`` tokens of ``batches``.

    A batch contains raw activations {hookpoint: (N, D)}. A latent that fires on a smaller share of the tokens than
    ``dead_threshold`` counts as dead.
    """
    sums = {
        name: (
            ReconstructionSums(target.centre),
            SparsitySums(target.coder.num_latents, dead_threshold, target.centre.device),
        )
        for name, target in targets.items()
    }
    n_tokens = 0
    for batch in batches:
        count = min(max_tokens - n_tokens, len(next(iter(batch.values()))))
        for name, target in targets.items():
            record_progress()
            for x in batch[target.hookpoint][:count].split(CHUNK_TOKENS):
                codes = target.coder.encode(x.float())
                sums[name][0].add(x, target.coder.decode(codes))
                sums[name][1].add(codes)
        n_tokens += count
        if n_tokens >= max_tokens:
            break
    return {
        name: {
            "tokens": n_tokens,
            **reconstruction.metric_values(),
            **sparsity.metric_values(),
            **geometry_metrics(targets[name].coder.W_enc, targets[name].coder.W_dec),
        }
        for name, (reconstruction, sparsity) in sums.items()
    }
