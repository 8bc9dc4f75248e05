"""Settings of the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from saetrain.settings import Factor, PositiveFactor, Settings, TotalOrZero
from saetrain.types import shown_default

AUTO_WEIGHT_DECAY = 0.15
"""Weight decay that the rule of ``--lr auto`` was fitted with."""


@dataclass(frozen=True, kw_only=True)
class OptimSettings(Settings):
    """Optimizer."""

    optimizer: Literal["adam", "sgd"] = "adam"
    """Optimizer; `sgd` uses momentum 0.9."""
    lr: PositiveFactor | Literal["auto"] = 0.001
    """Peak learning rate of the decoder; adam gives the encoder half of it. `auto` computes it (docs/recipe.md)."""
    lr_warmup_steps: Annotated[TotalOrZero | None, shown_default("a twentieth of the run, at most 1000", "INT")] = None
    """Optimizer steps in which the learning rate increases linearly."""
    weight_decay: Annotated[Factor | None, shown_default("0.15 with --lr auto, else 0", "FLOAT")] = None
    """Decoupled weight decay of the encoder's weights; a step multiplies them by 1 - encoder learning rate x this."""
    max_grad_norm: Factor = 1.0
    """Gradients with a larger norm are scaled down to this norm; 0 disables clipping."""

    @property
    def effective_weight_decay(self) -> float:
        """Weight decay: the given value, or the one that the learning rate rule was fitted with."""
        if self.weight_decay is not None:
            return self.weight_decay
        return AUTO_WEIGHT_DECAY if self.lr == "auto" else 0.0
