"""Learning rate rule of ``--lr auto``, and warnings about learning rates that are far from it."""

from __future__ import annotations

from dataclasses import dataclass

LR_RULE_BASE, LR_POWER_LATENTS, LR_POWER_K, LR_POWER_TOKENS, LR_POWER_STEPS = 0.016, -0.4, 0.1, 0.25, -0.2
"""The best rate for 3072 latents, k = 32 and 400 steps of 1024 tokens, and the exponents of the rule."""
LR_WARNING_FACTOR = 3.0
"""Factor between a learning rate and the rule above which the start of a run logs a warning."""
SGD_LR = 1.0
"""A learning rate that works for SGD with momentum 0.9 on this loss; in a trial, 0.001 ended at FVU 0.74, and 1 at
0.14."""


@dataclass(frozen=True)
class RunSize:
    """Properties of a run that determine the learning rate of ``--lr auto``."""

    num_latents: int
    k: float
    tokens_per_step: int
    steps: int


def recommended_lr(size: RunSize) -> float:
    """Return the learning rate of ``--lr auto``, a fit to the best rates of trial runs (docs/recipe.md)."""
    return float(
        LR_RULE_BASE
        * (size.num_latents / 3072) ** LR_POWER_LATENTS
        * (size.k / 32) ** LR_POWER_K
        * (size.tokens_per_step / 1024) ** LR_POWER_TOKENS
        * (size.steps / 400) ** LR_POWER_STEPS
    )


def describe_unusual_lr(lr: float, recommended: float, size: str) -> str | None:
    """Return a warning about a learning rate that is far from the rule's for a run of ``size``, or None."""
    ratio = lr / recommended
    if 1 / LR_WARNING_FACTOR <= ratio <= LR_WARNING_FACTOR:
        return None
    relation = f"{ratio:.1f} times" if ratio > 1 else f"1/{1 / ratio:.1f} of"
    return f"--lr {lr:g} is {relation} the {recommended:.2g} that --lr auto would use for {size}; try --lr auto"


def describe_small_sgd_lr(lr: float) -> str | None:
    """Return a warning about a learning rate that is too small for sgd, or None."""
    if lr >= SGD_LR / 10:
        return None
    return f"--lr {lr:g} is too small for --optimizer sgd: use a rate near {SGD_LR:g}"
