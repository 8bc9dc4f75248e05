"""Adam (Kingma & Ba, arXiv 1412.6980) that leaves latents without a gradient unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import ParamsT

CHUNK_ELEMENTS_CPU, CHUNK_ELEMENTS_ACCELERATOR = 1 << 17, 1 << 24
"""Elements of a tensor per Adam call; on a CPU a chunk fits in a core's cache."""
MOMENTS = ("exp_avg", "exp_avg_sq")


class LazyAdam(torch.optim.Optimizer):
    """Adam with decoupled weight decay that leaves idle latents unchanged, weights and moments alike.

    Options per parameter group, next to those of :class:`torch.optim.AdamW` (``lr``, ``betas``, ``eps``,
    ``weight_decay``):

    - ``lr_ratio``: factor on ``lr``. It lets a training step or scheduler set one ``lr`` for all groups.
    - ``latent_dim``: dimension of the group's parameters with one entry per latent. All groups with a ``latent_dim``
      have the same latents. None (default): each step updates all entries, as in ``AdamW``.

    A latent is idle in a step if the gradients of all its scalars are zero, that is of the one-dimensional parameters
    with a ``latent_dim``: biases and thresholds. Every path from a latent's weights to the loss passes through them.
    Without such a parameter, a latent is idle if the gradients of all its weights are zero. The bias correction uses
    the number of steps, not that of a latent's updates (docs/recipe.md).

    ``state`` has ``step`` (scalar), ``exp_avg`` and ``exp_avg_sq`` per parameter, from construction on. Parameters are
    fp32; their rows, along ``latent_dim`` if given, must be contiguous in memory.
    """

    updated_latents: Tensor | None = None
    """Indices (int64) of the latents that the last step updated; None if it updated all."""

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        lr_ratio: float = 1.0,
        latent_dim: int | None = None,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        # With ``fused``, torch loads step counts to the parameter's device.
        super().__init__(params, {**options, "lr_ratio": lr_ratio, "latent_dim": latent_dim, "fused": True})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, with its state."""
        super().add_param_group(param_group)
        self._complete_state(self.param_groups[-1])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of ``state_dict``; parameters that it lacks start without moments."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            self._complete_state(group)

    def _complete_state(self, group: dict[str, Any]) -> None:
        """Add missing state, and bring moments to the memory order of their parameter, as the fused kernel needs."""
        for parameter in group["params"]:
            assert _as_rows(parameter, parameter, group).is_contiguous(), "rows of a parameter are not contiguous"
            state = self.state[parameter]
            state.setdefault("step", torch.zeros((), dtype=torch.float32, device=parameter.device))
            for key in MOMENTS:
                if key not in state:
                    state[key] = torch.zeros_like(parameter)
                elif state[key].stride() != parameter.stride():
                    state[key] = torch.empty_like(parameter).copy_(state[key])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters that have a gradient; return what ``closure``, which computes gradients, returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.updated_latents = self._find_active_latents()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _find_active_latents(self) -> Tensor | None:
        """Return the indices of the latents that are not idle, or None if that is all."""
        gradients = [
            _as_rows(p.grad, p, group)
            for group in self.param_groups
            for p in group["params"]
            if group["latent_dim"] is not None and p.grad is not None
        ]
        if not gradients:
            return None
        scalars = [each for each in gradients if each.dim() == 1]
        is_active = torch.stack([each.reshape(len(each), -1).any(dim=1) for each in scalars or gradients]).any(dim=0)
        active = is_active.nonzero().squeeze(1)
        return None if len(active) == len(is_active) else active

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Apply Adam in chunks of rows: all rows or, with a ``latent_dim``, those of the active latents."""
        lr, state = group["lr"] * group["lr_ratio"], self.state[parameter]
        decay_factor = 1 - lr * group["weight_decay"]
        assert parameter.grad is not None
        whole = [
            _as_rows(tensor, parameter, group)
            for tensor in (parameter, parameter.grad, *(state[key] for key in MOMENTS))
        ]
        # The fused kernel reads memory in order, whatever the strides of the gradient are.
        whole[1] = whole[1].contiguous()
        for chunk in _split_rows(None if group["latent_dim"] is None else self.updated_latents, whole[0]):
            weight, gradient, first, second = (tensor[chunk] for tensor in whole)
            if decay_factor != 1:
                weight.mul_(decay_factor)
            adam(
                [weight], [gradient], [first], [second], [], [state["step"].clone()],
                fused=True, amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=lr, weight_decay=0,
                eps=group["eps"], maximize=False,
            )  # fmt: skip
            if isinstance(chunk, Tensor):
                for tensor, value in zip((whole[0], *whole[2:]), (weight, first, second), strict=True):
                    tensor[chunk] = value
        state["step"] += 1


def _as_rows(tensor: Tensor, parameter: Tensor, group: dict[str, Any]) -> Tensor:
    """Return a view of ``tensor``, which belongs to ``parameter``, whose first dimension is the slowest in memory."""
    dim = group["latent_dim"]
    if dim is None:
        dim = int(to_memory_order(parameter) is not parameter)
    return torch.atleast_1d(tensor).movedim(dim, 0)


def _split_rows(rows: Tensor | None, tensor: Tensor) -> Iterable[Tensor | slice]:
    """Split the row indices ``rows`` into chunks; None means all rows, as slices, which need no copies."""
    max_elements = CHUNK_ELEMENTS_CPU if tensor.device.type == "cpu" else CHUNK_ELEMENTS_ACCELERATOR
    size = max(1, max_elements * len(tensor) // tensor.numel())
    if rows is None:
        return [slice(start, start + size) for start in range(0, len(tensor), size)]
    return rows.split(size)


def to_memory_order(tensor: Tensor) -> Tensor:
    """Return a contiguous view of ``tensor``, transposed if needed, because optimizers copy what is not contiguous."""
    return tensor.T if tensor.dim() == 2 and not tensor.is_contiguous() else tensor
