"""Optimizers, the learning rate rule of ``--lr auto``, and the learning rate schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from saetrain.errors import SaetrainError
from saetrain.types import shown_default

BETAS = (0.8, 0.99)
EPS = 1e-8
"""Constants of Adam. The eps fits the gradients of a loss that is divided by the variance and averaged over thousands
of tokens."""
ENCODER_LR_RATIO = 0.5
"""Ratio of the encoder's to the decoder's learning rate; latents die if the encoder moves too fast (docs/recipe.md)."""
LR_DECAY_SHARE = 0.8
"""Share of the run, at its end, in which the learning rate decreases linearly to zero."""
SGD_LR = 1.0
"""A learning rate that works for SGD with momentum 0.9 on this loss; in a trial, 0.001 ended at FVU 0.74, and 1 at
0.14."""
LR_RULE_BASE, LR_POWER_LATENTS, LR_POWER_K, LR_POWER_TOKENS, LR_POWER_STEPS = 0.016, -0.4, 0.1, 0.25, -0.2
"""Rule of ``--lr auto``: the best rate for 3072 latents, k = 32 and 400 steps of 1024 tokens, and its exponents."""
AUTO_WEIGHT_DECAY = 0.15
"""Weight decay that the rule was fitted with."""
LR_WARNING_FACTOR = 3.0
"""Factor between a learning rate and the rule above which the start of a run logs a warning."""


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """Optimizer."""

    optimizer: Literal["adam", "sgd"] = "adam"
    """Optimizer; `sgd` uses momentum 0.9."""
    lr: float | Literal["auto"] = 0.001
    """Peak learning rate of the decoder; adam gives the encoder half of it. `auto` computes it (docs/recipe.md)."""
    lr_warmup_steps: Annotated[int | None, shown_default("a twentieth of the run, at most 1000", "INT")] = None
    """Optimizer steps in which the learning rate increases linearly."""
    weight_decay: Annotated[float | None, shown_default("0.15 with --lr auto, else 0", "FLOAT")] = None
    """Decoupled weight decay of the encoder's weights; a step multiplies them by 1 - encoder learning rate x this."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to this norm; 0 disables clipping."""

    def __post_init__(self) -> None:
        if self.lr != "auto" and not 0 < self.lr < float("inf"):
            raise SaetrainError(f"--lr {self.lr}: must be a positive number or auto")
        for name in ("lr_warmup_steps", "weight_decay", "max_grad_norm"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise SaetrainError(f"--{name} {value}: must not be negative")

    @property
    def effective_weight_decay(self) -> float:
        """Weight decay: the given value, or the one that the learning rate rule was fitted with."""
        if self.weight_decay is not None:
            return self.weight_decay
        return AUTO_WEIGHT_DECAY if self.lr == "auto" else 0.0


@dataclass(frozen=True)
class RunSize:
    """Properties of a run that determine the learning rate of ``--lr auto``."""

    num_latents: int
    k: int
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
    return f"--lr {lr:g} is {relation} the {recommended:.2g} that --lr auto would use for {size}"


def describe_small_sgd_lr(lr: float) -> str | None:
    """Return a warning about a learning rate that is too small for sgd, or None."""
    if lr >= SGD_LR / 10:
        return None
    return f"--lr {lr:g} is too small for --optimizer sgd: use a rate near {SGD_LR:g}"


def resolve_warmup_steps(settings: OptimSettings, steps: int) -> int:
    """Return the number of warm-up steps in a run of ``steps`` optimizer steps."""
    return settings.lr_warmup_steps if settings.lr_warmup_steps is not None else min(1000, steps // 20)


def lr_factor(step: int, total_steps: int, warmup_steps: int) -> float:
    """Return the factor on the peak learning rate at step ``step`` (from 0): warm-up, constant, linear decay."""
    warmup_factor = min(1.0, (step + 1) / (warmup_steps + 1))
    decay_steps = max(1, round(total_steps * LR_DECAY_SHARE))
    return warmup_factor * min(1.0, (total_steps - step) / (decay_steps + 1))


Parameters = Mapping[str, nn.Parameter]
ENCODER_PARAMETERS = frozenset({"W_enc", "b_enc"})
LATENT_PARAMETERS = ("W_enc", "b_enc", "W_dec")
"""Parameters whose memory has one row per latent."""
CHUNK_ELEMENTS_CPU, CHUNK_ELEMENTS_ACCELERATOR = 1 << 17, 1 << 24
"""Elements of a tensor per Adam call; on a CPU a chunk fits in a core's cache."""


def _split_rows(rows: Tensor, tensor: Tensor) -> Iterable[Tensor | slice]:
    """Split the row indices ``rows`` into chunks; if they cover all rows, return slices, which need no copies."""
    max_elements = CHUNK_ELEMENTS_CPU if tensor.device.type == "cpu" else CHUNK_ELEMENTS_ACCELERATOR
    size = max(1, max_elements * len(tensor) // tensor.numel())
    if len(rows) == len(tensor):
        return [slice(start, start + size) for start in range(0, len(tensor), size)]
    return rows.split(size)


def _adam_step_chunk(
    tensors: Sequence[Tensor], chunk: Tensor | slice, step: Tensor, lr: float, decay_factor: float
) -> None:
    """Apply Adam to the rows ``chunk`` of (parameter, gradient, first moment, second moment).

    The parameter is first multiplied by ``decay_factor``.
    """
    parameter, gradient, first, second = (tensor[chunk] for tensor in tensors)
    if decay_factor != 1:
        parameter.mul_(decay_factor)
    adam(
        [parameter], [gradient], [first], [second], [], [step.clone()],
        fused=True, amsgrad=False, beta1=BETAS[0], beta2=BETAS[1], lr=lr, weight_decay=0, eps=EPS, maximize=False,
    )  # fmt: skip
    if isinstance(chunk, Tensor):
        for tensor, value in zip((tensors[0], *tensors[2:]), (parameter, first, second), strict=True):
            tensor[chunk] = value


def _build_adam(parameters: list[Tensor]) -> torch.optim.Optimizer:
    # Only its state is used: its own step would update all rows.
    return torch.optim.Adam(parameters, lr=0.0, betas=BETAS, eps=EPS)


def _build_sgd(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.0, momentum=0.9)


OPTIMIZERS: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {"adam": _build_adam, "sgd": _build_sgd}
"""{value of ``--optimizer``: function that builds the torch optimizer}."""


class Optimizer:
    """Wraps a torch optimizer and keeps the decoder rows at unit norm.

    The order is: project, clip, step, renormalize. The projection needs unit rows, and clipping after it uses the norm
    of the gradient that is applied. ``project`` removes the part of the decoder's gradient that is parallel to its
    rows. ``renormalize`` scales the decoder rows, all or those with the given indices, to unit norm. Adam is lazy: if
    the bias of a latent has no gradient, because the latent did not fire, the step changes neither its weights nor its
    moments (docs/recipe.md).
    """

    def __init__(
        self,
        parameters: Parameters,
        settings: OptimSettings,
        *,
        project: Callable[[], None],
        renormalize: Callable[[Tensor | None], None],
    ) -> None:
        self._parameters, self._settings = dict(parameters), settings
        self._project, self._renormalize = project, renormalize
        self._transposed = {name for name, p in parameters.items() if to_memory_order(p) is not p}
        self._memory_views = {name: nn.Parameter(to_memory_order(p.detach())) for name, p in parameters.items()}
        self._is_lazy = settings.optimizer == "adam"
        self.torch_optimizer = OPTIMIZERS[settings.optimizer](list(self._memory_views.values()))
        if self._is_lazy:
            for own in self._memory_views.values():
                moments = {key: torch.zeros_like(own, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
                self.torch_optimizer.state[own] = {"step": torch.zeros((), device=own.device), **moments}

    @classmethod
    def for_coder(cls, coder: Any, settings: OptimSettings) -> Optimizer:
        """Return the optimizer of a coder, which obeys the coder's traits."""
        is_unit_norm = coder.has_unit_norm_decoder
        return cls(
            dict(coder.named_parameters()),
            settings,
            project=coder.remove_parallel_gradient if is_unit_norm else lambda: None,
            renormalize=coder.renormalize_decoder if is_unit_norm else lambda rows: None,
        )

    def project_gradients(self) -> Tensor:
        """Project the gradients and return their norm before clipping."""
        # The fused optimizer runs over memory, so a gradient with other strides would update the wrong elements.
        assert all(p.grad is None or p.grad.stride() == p.stride() for p in self._parameters.values()), (
            "gradient layout"
        )
        self._project()
        return torch.nn.utils.get_total_norm([p.grad for p in self._parameters.values() if p.grad is not None])

    def step(self, lr: float, norm: Tensor) -> None:
        """Apply the projected gradients, whose norm is ``norm``, at learning rate ``lr``, without zeroing them."""
        # Scaling by 1 would read and write all gradients without effect.
        if 0 < self._settings.max_grad_norm < float(norm):
            torch.nn.utils.clip_grads_with_norm_(self._parameters.values(), self._settings.max_grad_norm, norm)
        if self._is_lazy:
            self._step_active(lr)
            return
        if self._settings.effective_weight_decay:
            with torch.no_grad():
                self._parameters["W_enc"].mul_(1 - lr * self._settings.effective_weight_decay)
        for name, parameter in self._parameters.items():
            self._memory_views[name].grad = None if parameter.grad is None else to_memory_order(parameter.grad)
        for group in self.torch_optimizer.param_groups:
            group["lr"] = lr
        self.torch_optimizer.step()
        self._renormalize(None)

    @torch.no_grad()
    def _step_active(self, lr: float) -> None:
        """Apply Adam in chunks to the latents whose bias has a gradient, and to ``b_dec``."""
        active = self._active_latents()
        for name, parameter in self._parameters.items():
            assert parameter.grad is not None
            state = self.torch_optimizer.state[self._memory_views[name]]
            tensors = [parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]]
            if name == "W_enc":
                tensors = [
                    *(tensor.T for tensor in tensors[:2]),
                    *(self._in_parameter_shape(name, each).T for each in tensors[2:]),
                ]
            parameter_lr = lr * (ENCODER_LR_RATIO if name in ENCODER_PARAMETERS else 1.0)
            decay_factor = 1 - parameter_lr * self._settings.effective_weight_decay if name == "W_enc" else 1.0
            for chunk in _split_rows(active, tensors[0]) if name in LATENT_PARAMETERS else [slice(None)]:
                _adam_step_chunk(tensors, chunk, state["step"], parameter_lr, decay_factor)
            state["step"] += 1
        self._renormalize(None if len(active) == len(self._parameters["b_enc"]) else active)

    def _active_latents(self) -> Tensor:
        """Return the indices of the latents whose bias has a gradient."""
        bias = self._parameters["b_enc"].grad
        assert bias is not None
        return bias.nonzero().squeeze(1)

    def _in_parameter_shape(self, name: str, stored: Tensor) -> Tensor:
        """Return a view of an optimizer tensor in the shape of its parameter."""
        return stored.T if stored.dim() == 2 and name in self._transposed else stored

    def zero_grad(self) -> None:
        """Discard the gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """Return the optimizer's tensors as ``{parameter.key: tensor}``."""
        return {
            f"{name}.{key}": self._in_parameter_shape(name, value)
            for name, own in self._memory_views.items()
            for key, value in self.torch_optimizer.state[own].items()
            if isinstance(value, Tensor)
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the result of :meth:`state_dict`."""
        for name, value in state.items():
            parameter, key = name.rsplit(".", 1)
            own, shown = self._memory_views[parameter], self._parameters[parameter]
            # A moment needs the memory order of its parameter, and the step count its device.
            is_moment = value.shape == shown.shape and value.dim() > 0
            loaded = torch.empty_like(own) if is_moment else value.to(own.device)
            if is_moment:
                loaded.copy_(value.T if parameter in self._transposed else value)
            self.torch_optimizer.state[own][key] = loaded


def to_memory_order(tensor: Tensor) -> Tensor:
    """Return a contiguous view of ``tensor``, transposed if needed, because optimizers copy what is not contiguous."""
    return tensor.T if tensor.dim() == 2 and not tensor.is_contiguous() else tensor
