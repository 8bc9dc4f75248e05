"""Learning rate schedule: linear warm-up, constant, linear decay to zero."""

from __future__ import annotations

from saetrain.optim.settings import OptimSettings

LR_DECAY_SHARE = 0.8
"""Share of the run, at its end, in which the learning rate decreases linearly to zero."""


def resolve_warmup_steps(settings: OptimSettings, steps: int) -> int:
    """Return the number of warm-up steps in a run of ``steps`` optimizer steps."""
    return settings.lr_warmup_steps if settings.lr_warmup_steps is not None else min(1000, steps // 20)


def lr_factor(step: int, total_steps: int, warmup_steps: int) -> float:
    """Return the factor on the peak learning rate at step ``step`` (from 0)."""
    warmup_factor = min(1.0, (step + 1) / (warmup_steps + 1))
    decay_steps = max(1, round(total_steps * LR_DECAY_SHARE))
    return warmup_factor * min(1.0, (total_steps - step) / (decay_steps + 1))
