"""Gradients -> steps: the optimizers, the learning rate rule and its schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from saetrain.errors import SaetrainError
from saetrain.types import shown_default

BETAS = (0.8, 0.99)
EPS = 1e-8
"""Adam's constants; the eps suits gradients of a loss over the variance, averaged over thousands of tokens."""
ENCODER_SHARE = 0.5
"""The encoder's learning rate over the decoder's: latents die of an encoder that moves too fast (docs/recipe.md)."""
DECAY_SHARE = 0.8
"""Share of the run, at its end, over which the learning rate falls linearly to zero."""
SGD_LR = 1.0
"""A rate that trains with momentum 0.9 on a loss over the variance (found by trial: 0.001 leaves FVU at 0.74 there,
1 at 0.14)."""
LR, LR_LATENTS, LR_K, LR_TOKENS, LR_STEPS = 0.016, -0.4, 0.1, 0.25, -0.2
"""The rule: the best rate for 3072 latents, k = 32 and 400 steps of 1024 tokens, and its powers."""
AUTO_DECAY = 0.15
"""Weight decay beside the rule's rate."""
FAR_OFF = 3.0
"""Factor off the rule from which the start says so."""


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """Optimizer."""

    optimizer: Literal["adam", "sgd"] = "adam"
    """`sgd` has momentum 0.9."""
    lr: float | Literal["auto"] = 0.001
    """Peak learning rate, of which adam gives the encoder half; `auto`: by a rule in latents, k, tokens a step and
    steps (docs/recipe.md)."""
    lr_warmup_steps: Annotated[int | None, shown_default("a twentieth of the run, at most 1000", "INT")] = None
    """Optimizer steps over which the learning rate rises."""
    weight_decay: Annotated[float | None, shown_default("0.15 with --lr auto, else 0", "FLOAT")] = None
    """Decoupled, on the encoder's weights alone; a share per step and unit of the encoder's learning rate."""
    max_grad_norm: float = 1.0
    """Gradients of a larger norm are scaled down to it; 0 switches that off."""

    def __post_init__(self) -> None:
        if self.lr != "auto" and not 0 < self.lr < float("inf"):
            raise SaetrainError(f"--lr {self.lr}: must be a positive number, or auto")
        for name in ("lr_warmup_steps", "weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise SaetrainError(f"--{name} {value}: must not be negative")

    @property
    def decay(self) -> float:
        """The weight decay: as given, or what the rule for the learning rate was fitted with."""
        if self.weight_decay is not None:
            return self.weight_decay
        return AUTO_DECAY if self.lr == "auto" else 0.0


@dataclass(frozen=True)
class RunSize:
    """What the rule for the learning rate asks about a run."""

    num_latents: int
    k: int
    tokens_per_step: int
    steps: int


def lr_rule(size: RunSize) -> float:
    """The learning rate of `--lr auto`, fitted to the best of fixed rates (docs/recipe.md)."""
    return float(
        LR
        * (size.num_latents / 3072) ** LR_LATENTS
        * (size.k / 32) ** LR_K
        * (size.tokens_per_step / 1024) ** LR_TOKENS
        * (size.steps / 400) ** LR_STEPS
    )


def resolve_lr(settings: OptimSettings, size: RunSize) -> float:
    """The peak learning rate: as given, or by the rule."""
    return lr_rule(size) if settings.lr == "auto" else settings.lr


def lr_remark(lr: float, size: RunSize) -> str | None:
    """What to say of a learning rate that is far off the rule."""
    rule = lr_rule(size)
    ratio = lr / rule
    if 1 / FAR_OFF <= ratio <= FAR_OFF:
        return None
    far = f"{ratio:.1f} times" if ratio > 1 else f"1/{1 / ratio:.1f} of"
    return (
        f"--lr {lr:g} is {far} the {rule:.2g} that --lr auto takes for {size.num_latents} latents, k = {size.k} and "
        f"{size.steps} steps of {size.tokens_per_step} tokens"
    )


def sgd_remark(lr: float) -> str | None:
    """What to say of a learning rate by which sgd hardly moves."""
    if lr >= SGD_LR / 10:
        return None
    return f"--lr {lr:g} hardly trains with --optimizer sgd: rates near {SGD_LR:g} do on this loss"


def warmup_steps(settings: OptimSettings, steps: int) -> int:
    """Optimizer steps of the warm-up in a run of ``steps``."""
    return settings.lr_warmup_steps if settings.lr_warmup_steps is not None else min(1000, steps // 20)


def lr_factor(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate at optimizer step ``step``, from 0: up, level, then linearly down."""
    rising = min(1.0, (step + 1) / (warmup + 1))
    decay = max(1, round(steps * DECAY_SHARE))
    return rising * min(1.0, (steps - step) / (decay + 1))


Parameters = Mapping[str, nn.Parameter]
Groups = list[dict[str, Any]]
ENCODER = frozenset({"W_enc", "b_enc"})
LATENT = ("W_enc", "b_enc", "W_dec")
"""Parameters that have a row for each latent where they lie in memory."""
MOMENTS = ("exp_avg", "exp_avg_sq")


def _adam(groups: Groups) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, lr=0.0, betas=BETAS, eps=EPS, fused=True)


def _sgd(groups: Groups) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9)


OPTIMIZERS: dict[str, Callable[[Groups], torch.optim.Optimizer]] = {"adam": _adam, "sgd": _sgd}
"""Name of ``--optimizer`` -> how it is built."""


class Optimizer:
    """A torch optimizer in the order that leaves the saved decoder at unit norm.

    Project, clip, step, renormalise: the projection needs unit rows, and clipping after it sees the gradient that
    is really applied. ``project`` takes the radial part out of the decoder's gradient, ``renormalize`` scales its
    rows back to unit norm. Adam leaves a latent alone, weights and moments, on a step that gives its bias no gradient:
    on one in which it does not fire (docs/recipe.md).
    """

    def __init__(
        self,
        parameters: Parameters,
        settings: OptimSettings,
        *,
        project: Callable[[], None],
        renormalize: Callable[[], None],
    ) -> None:
        self._parameters, self._settings = dict(parameters), settings
        self._project, self._renormalize = project, renormalize
        self._turned = {name for name, p in parameters.items() if in_memory_order(p) is not p}
        self._stored = {name: nn.Parameter(in_memory_order(p.detach())) for name, p in parameters.items()}
        self._lazy = settings.optimizer == "adam"
        share = ENCODER_SHARE if self._lazy else 1.0
        groups = [
            {"params": [p for name, p in self._stored.items() if (name in ENCODER) is encoder], "share": part}
            for encoder, part in ((False, 1.0), (True, share))
        ]
        self._decay = share * settings.decay
        self.torch = OPTIMIZERS[settings.optimizer](groups)

    def project(self) -> Tensor:
        """Project the gradients; gives their norm, before clipping."""
        # The fused optimizer walks memory, so a gradient that lies in another order would be applied elsewhere.
        assert all(p.grad is None or p.grad.stride() == p.stride() for p in self._parameters.values()), (
            "gradient layout"
        )
        self._project()
        return torch.nn.utils.get_total_norm([p.grad for p in self._parameters.values() if p.grad is not None])

    def step(self, lr: float, norm: Tensor) -> None:
        """Apply the projected gradients, whose norm is ``norm``, at learning rate ``lr``; they stay as they are."""
        # Scaling by one would read and write all gradients for nothing.
        if 0 < self._settings.max_grad_norm < float(norm):
            torch.nn.utils.clip_grads_with_norm_(self._parameters.values(), self._settings.max_grad_norm, norm)
        idle = self._idle_rows() if self._lazy else []
        if self._decay:
            with torch.no_grad():
                self._parameters["W_enc"].mul_(1 - lr * self._decay)
        for name, parameter in self._parameters.items():
            self._stored[name].grad = None if parameter.grad is None else in_memory_order(parameter.grad)
        for group in self.torch.param_groups:
            group["lr"] = group["share"] * lr
        self.torch.step()
        with torch.no_grad():
            for tensor, rows, before in idle:
                tensor[rows] = before
        self._renormalize()

    @torch.no_grad()
    def _idle_rows(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """What a step must leave alone: tensors, rows of latents without a gradient, and what these hold now."""
        bias = self._parameters["b_enc"].grad
        rows = (bias == 0).nonzero().squeeze(1) if bias is not None else torch.empty(0, dtype=torch.long)
        if len(rows) == 0:
            return []
        found = []
        for name in LATENT:
            own = self._stored[name]
            moments = [self.torch.state[own][key] for key in MOMENTS if key in self.torch.state[own]]
            # One latent alone lies in memory in both orders at once, and is not turned.
            across = name == "W_enc" and name not in self._turned
            tensors = [tensor.T if across else tensor for tensor in (own, *moments)]
            found += [(tensor, rows, tensor[rows]) for tensor in tensors]
        return found

    def drop(self) -> None:
        """Forget the gradients."""
        for parameter in self._parameters.values():
            if parameter.grad is not None:
                parameter.grad.zero_()

    def state(self) -> dict[str, Tensor]:
        """The optimizer's tensors as ``{parameter.key: tensor}``."""
        return {
            f"{name}.{key}": value.T if value.dim() == 2 and name in self._turned else value
            for name, own in self._stored.items()
            for key, value in self.torch.state[own].items()
            if isinstance(value, Tensor)
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state` gave."""
        for name, value in state.items():
            parameter, key = name.rsplit(".", 1)
            own, shown = self._stored[parameter], self._parameters[parameter]
            # A moment must lie in memory as its parameter does, and the count of steps beside it.
            moment = value.shape == shown.shape and value.dim() > 0
            fitted = torch.empty_like(own) if moment else value.to(own.device)
            if moment:
                fitted.copy_(value.T if parameter in self._turned else value)
            self.torch.state[own][key] = fitted


def in_memory_order(tensor: Tensor) -> Tensor:
    """The same memory, transposed where rows lie across it: optimizers copy what they can't walk straight through."""
    return tensor.T if tensor.dim() == 2 and not tensor.is_contiguous() else tensor
