"""Training step of one coder (forward, gradients, update): interface, settings and statistics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from saetrain.coders import CoderSettings, SparseCoder, TopK, architecture_name
from saetrain.coders.jumprelu import JumpReLUSettings
from saetrain.coders.topk import TopKSettings
from saetrain.optim import OptimSettings
from saetrain.settings import Settings
from saetrain.types import StepContext, TokenGroups


@dataclass(frozen=True, kw_only=True)
class KernelSettings(Settings):
    """Kernels: implementation of the SAE's training step."""

    kernels: Literal["auto", "reference", "torch", "native", "triton"] = "auto"
    """`native` (CPU), `triton` (NVIDIA, no benchmark yet): adam only; `torch`: any device; `auto`: the fastest."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the SAE's matrix products; weights and sums are float32. `auto`: bfloat16 if the hardware has it."""


Objective = Callable[[Tensor, dict[str, Tensor]], dict[str, Tensor]]
"""Function from a reconstruction (N, D) and the coder's loss terms to the loss terms of the micro-batch."""


@dataclass(frozen=True)
class StepRequest:
    """What a training step must support: the class of the coder, its optimizer, its loss and its device."""

    coder_class: type[SparseCoder]
    optim: OptimSettings
    device: torch.device
    end_to_end: bool = False
    """Whether the loss is computed on the model's outputs."""
    y_is_x: bool = True
    """Whether the coder reconstructs its input."""
    sae: CoderSettings | None = None
    """Settings of the coder; None: the defaults."""


@dataclass(frozen=True)
class MicroBatch:
    """Raw activations of one site: what its coders read, ``x_ND`` (N, D_in), and reconstruct, ``y_ND`` (N, D_out).

    An SAE has one tensor for both. ``objective``: loss terms that replace the coder's own, and then ``step_tokens``:
    tokens of the whole optimizer step, which sums over tokens are divided by. ``groups``: the groups of the rows, for
    coders that select in groups.
    """

    x_ND: Tensor
    y_ND: Tensor
    objective: Objective | None = None
    step_tokens: int | None = None
    groups: TokenGroups | None = None
    normalized: dict[Callable[[Tensor], Tensor], Tensor] = field(default_factory=dict, repr=False, compare=False)
    """{function: its value}, so that the SAEs of a site normalize the activations once."""

    def normalize_once(self, function: Callable[[Tensor], Tensor], values_ND: Tensor) -> Tensor:
        """Return ``function(values_ND)`` from ``normalized``; the same function always gets the same values."""
        if function not in self.normalized:
            self.normalized[function] = function(values_ND)
        return self.normalized[function]

    @classmethod
    def of_sae(cls, x_ND: Tensor) -> MicroBatch:
        """Return the micro-batch of an SAE, which reconstructs its input."""
        return cls(x_ND, x_ND)


@dataclass(frozen=True)
class StepStats:
    """Statistics of a micro-batch: its shares of the step's loss terms, and sums over its tokens.

    ``fired`` (F,) int64 number of tokens on which each latent fires; ``residual_sum`` (D,) Σ (x - x̂);
    ``residual_square`` Σ‖x - x̂‖², a scalar.
    """

    fired: Tensor
    tokens: int
    losses: dict[str, Tensor]
    residual_sum: Tensor
    residual_square: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Sums over tokens that the coder's ``after_step`` needs."""

    def merge_with(self, other: StepStats) -> StepStats:
        """Return the statistics of both micro-batches together."""
        return StepStats(
            self.fired + other.fired,
            self.tokens + other.tokens,
            {name: loss + other.losses[name] for name, loss in self.losses.items()},
            self.residual_sum + other.residual_sum,
            self.residual_square + other.residual_square,
            {name: value + other.sums[name] for name, value in self.sums.items()},
        )

    def pack_row(self) -> Tensor:
        """Return all values as one float64 row, which can be summed over ranks; counts stay exact."""
        parts = [self.fired, self.residual_sum, *self.sums.values(), self.residual_square, *self.losses.values()]
        row = [part.reshape(-1).double() for part in parts]
        return torch.cat([*row, row[0].new_full((1,), self.tokens)])

    def unpack_row(self, row: Tensor, tokens: int | None = None) -> StepStats:
        """Unpack a sum of rows of :meth:`pack_row` with the same loss names; without ``tokens``, synchronizes.

        ``tokens`` is the number of tokens in ``row``, if the host knows it.
        """
        latents, width = len(self.fired), len(self.residual_sum)
        sizes = [value.numel() for value in self.sums.values()]
        fired, residual_sum, *sums, rest = row.split([latents, width, *sizes, len(row) - latents - width - sum(sizes)])
        square, *losses, count = rest.unbind()
        return StepStats(
            fired.long(),
            int(count) if tokens is None else tokens,
            {name: loss.float() for name, loss in zip(self.losses, losses, strict=True)},
            residual_sum.float(),
            square.float(),
            {
                name: total.to(value.dtype).view_as(value)
                for (name, value), total in zip(self.sums.items(), sums, strict=True)
            },
        )


def build_adam_state(moments: Mapping[str, Tensor], step: Tensor) -> dict[str, Tensor]:
    """Return the optimizer state under the names of torch's Adam, as views of ``moments``.

    ``moments`` contains `m_` and `v_` of `enc`, `dec` (F, D), `b` (F,), `b_dec` (D,) and perhaps `threshold` (F,).
    Those of the encoder are returned in the shape of ``W_enc`` (D, F). ``step`` is a scalar.
    """
    out = {}
    names = {"W_enc": "enc", "W_dec": "dec", "b_enc": "b", "b_dec": "b_dec", "threshold": "threshold"}
    for parameter, tensor_name in names.items():
        if f"m_{tensor_name}" not in moments:
            continue
        for key, moment in (("exp_avg", "m"), ("exp_avg_sq", "v")):
            value = moments[f"{moment}_{tensor_name}"]
            out[f"{parameter}.{key}"] = value.T if tensor_name == "enc" else value
        out[f"{parameter}.step"] = step.clone()
    return out


class TrainStep(ABC):
    """Training step of one coder; gradients accumulate until :meth:`optimizer_step` or :meth:`zero_grad`."""

    @classmethod
    @abstractmethod
    def unsupported(cls, request: StepRequest) -> str | None:
        """Return why the step can't serve ``request``, or None if it can."""

    @classmethod
    def build(cls, coder: Any, optim: OptimSettings, kernels: KernelSettings, *, no_accumulation: bool) -> TrainStep:
        """Return the step of ``coder``; `auto` must be resolved in ``kernels``.

        ``no_accumulation``: each step has one micro-batch on one rank, so its gradients are not added to others.
        """
        use_bf16 = kernels.compute_dtype == "bfloat16"
        return cls(coder, optim, use_bf16=use_bf16, no_accumulation=no_accumulation)  # type: ignore[call-arg]

    @abstractmethod
    def forward_backward(
        self, x_ND: Tensor, ctx: StepContext, y_ND: Tensor | None = None, objective: Objective | None = None
    ) -> StepStats:
        """Accumulate the gradients of a micro-batch of coder inputs (N, D_in).

        ``y_ND`` (N, D_out): what the coder reconstructs; None: its input. ``objective``: loss terms that replace the
        coder's own.
        """

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """Return the accumulated gradients, to be summed over ranks in place before :meth:`norm_bound`."""

    @abstractmethod
    def norm_bound(self) -> Tensor | float:
        """Return an upper bound of the norm of the projected gradient; not finite if the norm is not."""

    @abstractmethod
    def optimizer_step(self, lr: float) -> Tensor:
        """Update the parameters at learning rate ``lr``; return the norm of the projected gradient before clipping."""

    @abstractmethod
    def zero_grad(self) -> None:
        """Discard the gradients."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Return the optimizer's tensors as ``{parameter.key: tensor}``."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the result of :meth:`state_dict`; the coder's parameters must be restored before."""


def explain_kernel_limits(request: StepRequest, supported: Sequence[type[SparseCoder]] = (TopK,)) -> str | None:
    """Return why hand-written kernels for SAEs of the ``supported`` classes can't serve ``request``, or None."""
    if request.end_to_end:
        return "they support only the SAE's own loss, but --loss_fn ce and kl need gradients through the model"
    if request.coder_class not in supported or not request.y_is_x:
        return f"they support only SAEs of the architectures {', '.join(map(architecture_name, supported))}"
    if isinstance(request.sae, TopKSettings) and request.sae.multi_topk:
        return "they do not support --multi_topk"
    if isinstance(request.sae, JumpReLUSettings) and request.sae.dead_pre_weight:
        return "they do not support --dead_pre_weight"
    if request.optim.optimizer != "adam":
        return f"they support only --optimizer adam, not {request.optim.optimizer}"
    return None


class DeviceStep(TrainStep):
    """Training step that never synchronizes with the device, so that the host can run ahead of it."""

    @abstractmethod
    def norm_bound(self) -> Tensor:
        """Return the bound of :meth:`TrainStep.norm_bound` as a scalar on the device."""

    @abstractmethod
    def optimizer_step(self, lr: float, ok: Tensor | None = None) -> Tensor:
        """Update the parameters if ``ok`` (a bool on the device) is true; return the norm of the projected gradient."""
