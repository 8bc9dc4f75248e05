"""Optimizer, learning rate rule of ``--lr auto``, and learning rate schedule."""

from saetrain.optim.build import (
    BETAS,
    ENCODER_LR_RATIO,
    EPS,
    build_optimizer,
    load_named_state,
    named_state,
)
from saetrain.optim.lazy_adam import LazyAdam, to_memory_order
from saetrain.optim.lr_rule import (
    RunSize,
    describe_small_sgd_lr,
    describe_unusual_lr,
    recommended_lr,
)
from saetrain.optim.schedule import LR_DECAY_SHARE, lr_factor, resolve_warmup_steps
from saetrain.optim.settings import AUTO_WEIGHT_DECAY, OptimSettings

__all__ = [
    "AUTO_WEIGHT_DECAY",
    "BETAS",
    "ENCODER_LR_RATIO",
    "EPS",
    "LR_DECAY_SHARE",
    "LazyAdam",
    "OptimSettings",
    "RunSize",
    "build_optimizer",
    "describe_small_sgd_lr",
    "describe_unusual_lr",
    "load_named_state",
    "lr_factor",
    "named_state",
    "recommended_lr",
    "resolve_warmup_steps",
    "to_memory_order",
]
