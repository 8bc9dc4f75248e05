"""Builds the optimizer of a coder from the settings, and names the tensors of its state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saetrain.optim.lazy_adam import LazyAdam
from saetrain.optim.settings import OptimSettings

BETAS = (0.8, 0.99)
EPS = 1e-8
"""Constants of Adam. The eps fits the gradients of a loss that is divided by the variance and averaged over thousands
of tokens."""
ENCODER_LR_RATIO = 0.5
"""Ratio of the encoder's to the decoder's learning rate; latents die if the encoder moves too fast (docs/recipe.md)."""


def build_optimizer(
    parameters: Mapping[str, nn.Parameter],
    settings: OptimSettings,
    *,
    encoder_parameters: Collection[str],
    latent_dims: Mapping[str, int],
) -> torch.optim.Optimizer:
    """Return the optimizer of ``settings``, with one group per parameter and a learning rate of 0.

    With Adam, ``encoder_parameters`` have the learning rate ENCODER_LR_RATIO x ``lr``, and idle latents keep the
    parameters in ``latent_dims`` ({parameter: dimension of the latents}). Matrices of the encoder decay.
    """
    groups = [
        {
            "params": [(name, parameter)],
            "lr_ratio": ENCODER_LR_RATIO if name in encoder_parameters else 1.0,
            "weight_decay": settings.effective_weight_decay
            if name in encoder_parameters and parameter.dim() > 1
            else 0.0,
            "latent_dim": latent_dims.get(name),
        }
        for name, parameter in parameters.items()
    ]
    return OPTIMIZERS[settings.optimizer](groups)


def _build_adam(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return LazyAdam(groups, lr=0.0, betas=BETAS, eps=EPS)


def _build_sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    # SGD's own weight decay is added to the gradient, and so to the momentum.
    own_groups = [{"params": group["params"], "decoupled_decay": group["weight_decay"]} for group in groups]
    optimizer = torch.optim.SGD(own_groups, lr=0.0, momentum=0.9)
    optimizer.register_step_pre_hook(_decay_weights)
    return optimizer


@torch.no_grad()
def _decay_weights(optimizer: torch.optim.Optimizer, *step_arguments: object) -> None:
    for group in optimizer.param_groups:
        if group["decoupled_decay"]:
            for parameter in group["params"]:
                parameter.mul_(1 - group["lr"] * group["decoupled_decay"])


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "adam": _build_adam,
    "sgd": _build_sgd,
}
"""{value of ``--optimizer``: function that builds it from parameter groups}."""


def named_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the tensors of the state as ``{parameter.key: tensor}``, such as ``W_enc.exp_avg``."""
    return {
        f"{name}.{key}": value
        for name, parameter in _named_parameters(optimizer)
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def load_named_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Load a copy of the result of :func:`named_state`."""
    parameters = {name: (index, parameter) for index, (name, parameter) in enumerate(_named_parameters(optimizer))}
    by_index: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
    for entry, value in state.items():
        name, key = entry.rsplit(".", 1)
        index, parameter = parameters[name]
        # Files are in row-major order, but the update is fast only in the memory order of the parameter.
        by_index[index][key] = value.clone() if key == "step" else torch.empty_like(parameter).copy_(value)
    optimizer.load_state_dict({"state": by_index, "param_groups": optimizer.state_dict()["param_groups"]})


def _named_parameters(optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    return [
        pair for group in optimizer.param_groups for pair in zip(group["param_names"], group["params"], strict=True)
    ]
