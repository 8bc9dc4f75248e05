"""Training step of one coder (forward, gradients, update): base class, settings, and the reference with autograd."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saetrain.coders.base import SparseCoder
from saetrain.optim import (
    LazyAdam,
    OptimSettings,
    build_optimizer,
    load_named_state,
    named_state,
    to_memory_order,
)
from saetrain.types import CoderOutput, StepContext


@dataclass(frozen=True, kw_only=True)
class KernelSettings:
    """Kernels: implementation of the SAE's training step."""

    kernels: Literal["auto", "reference", "torch", "native", "triton"] = "auto"
    """`native` (CPU), `triton` (NVIDIA, no benchmark yet): adam only; `torch`: any device; `auto`: the fastest."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the SAE's matrix products; weights and sums are float32. `auto`: bfloat16 if the hardware has it."""


Objective = Callable[[CoderOutput], dict[str, Tensor]]
"""Function from a coder's output to named, weighted loss terms of a micro-batch, which replace the coder's own."""


@dataclass(frozen=True)
class SplicedBatch:
    """A micro-batch whose loss is computed on the model's outputs with the reconstruction spliced in.

    ``raw_ND`` raw activations that are replaced; ``step_tokens`` tokens of the whole optimizer step, which sums over
    tokens are divided by; ``objective`` the loss terms.
    """

    raw_ND: Tensor
    step_tokens: int
    objective: Objective


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

    def merge_with(self, other: StepStats) -> StepStats:
        """Return the statistics of both micro-batches together."""
        return StepStats(
            self.fired + other.fired,
            self.tokens + other.tokens,
            {name: loss + other.losses[name] for name, loss in self.losses.items()},
            self.residual_sum + other.residual_sum,
            self.residual_square + other.residual_square,
        )

    def pack_row(self) -> Tensor:
        """Return all values as one float64 row, which can be summed over ranks; counts stay exact."""
        parts = [self.fired, self.residual_sum, self.residual_square, *self.losses.values()]
        row = [part.reshape(-1).double() for part in parts]
        return torch.cat([*row, row[0].new_full((1,), self.tokens)])

    def unpack_row(self, row: Tensor, tokens: int | None = None) -> StepStats:
        """Unpack a sum of rows of :meth:`pack_row` with the same loss names; without ``tokens``, synchronizes.

        ``tokens`` is the number of tokens in ``row``, if the host knows it.
        """
        latents, width = len(self.fired), len(self.residual_sum)
        fired, residual_sum, rest = row.split([latents, width, len(row) - latents - width])
        square, *losses, count = rest.unbind()
        return StepStats(
            fired.long(),
            int(count) if tokens is None else tokens,
            {name: loss.float() for name, loss in zip(self.losses, losses, strict=True)},
            residual_sum.float(),
            square.float(),
        )


def build_adam_state(moments: Mapping[str, Tensor], step: Tensor) -> dict[str, Tensor]:
    """Return the optimizer state under the names of torch's Adam, as views of ``moments``.

    ``moments`` contains `m_` and `v_` of `enc`, `dec` (F, D), `b` (F,) and `b_dec` (D,). Those of the encoder are
    returned in the shape of ``W_enc`` (D, F). ``step`` is a scalar.
    """
    out = {}
    for parameter, tensor_name in (("W_enc", "enc"), ("W_dec", "dec"), ("b_enc", "b"), ("b_dec", "b_dec")):
        for key, moment in (("exp_avg", "m"), ("exp_avg_sq", "v")):
            value = moments[f"{moment}_{tensor_name}"]
            out[f"{parameter}.{key}"] = value.T if tensor_name == "enc" else value
        out[f"{parameter}.step"] = step.clone()
    return out


class TrainStep(ABC):
    """Training step of one coder; gradients accumulate until :meth:`optimizer_step` or :meth:`zero_grad`."""

    @abstractmethod
    def forward_backward(self, x_ND: Tensor, progress: StepContext, objective: Objective | None = None) -> StepStats:
        """Accumulate the gradients of a micro-batch of coder inputs; only the reference supports ``objective``."""

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


class DeviceStep(TrainStep):
    """Training step that never synchronizes with the device, so that the host can run ahead of it."""

    @abstractmethod
    def norm_bound(self) -> Tensor:
        """Return the bound of :meth:`TrainStep.norm_bound` as a scalar on the device."""

    @abstractmethod
    def optimizer_step(self, lr: float, ok: Tensor | None = None) -> Tensor:
        """Update the parameters if ``ok`` (a bool on the device) is true; return the norm of the projected gradient."""


class ReferenceStep(TrainStep):
    """Reference: any coder, any device, gradients from autograd, any optimizer."""

    def __init__(self, coder: SparseCoder, settings: OptimSettings) -> None:
        self._coder, self._max_grad_norm = coder, settings.max_grad_norm
        self._optimizer = build_optimizer(
            dict(coder.named_parameters()),
            settings,
            encoder_parameters=coder.encoder_parameters,
            latent_dims={} if coder.updates_idle_latents else coder.latent_dims,
        )
        self._norm = torch.zeros(())

    def forward_backward(self, x_ND: Tensor, progress: StepContext, objective: Objective | None = None) -> StepStats:
        """Accumulate the gradients of a micro-batch with autograd."""
        output = self._coder(x_ND, x_ND, progress)
        if objective is not None:
            output.losses = objective(output)
        output.total_loss().backward()
        with torch.no_grad():
            residual = x_ND - output.reconstruction
            losses = {name: loss.detach() for name, loss in output.losses.items()}
            return StepStats(
                fired=output.codes.firing_counts(),
                tokens=len(x_ND),
                losses=losses,
                residual_sum=residual.sum(dim=0),
                residual_square=residual.pow(2).sum(),
            )

    def gradients(self) -> list[Tensor]:
        """Return contiguous views of the gradients of all parameters."""
        return [to_memory_order(p.grad) for p in self._coder.parameters() if p.grad is not None]

    def norm_bound(self) -> float:
        """Project the accumulated gradients and return their exact norm."""
        if self._coder.has_unit_norm_decoder:
            self._coder.remove_parallel_gradient()
        self._norm = torch.nn.utils.get_total_norm([p.grad for p in self._coder.parameters() if p.grad is not None])
        return float(self._norm)

    def optimizer_step(self, lr: float) -> Tensor:
        """Clip, update the parameters and renormalize the decoder; return the norm of the projected gradient."""
        # Scaling by 1 would read and write all gradients without effect.
        if 0 < self._max_grad_norm < float(self._norm):
            torch.nn.utils.clip_grads_with_norm_(self._coder.parameters(), self._max_grad_norm, self._norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        if self._coder.has_unit_norm_decoder:
            # None means all latents.
            updated = self._optimizer.updated_latents if isinstance(self._optimizer, LazyAdam) else None
            self._coder.renormalize_decoder(updated)
        self.zero_grad()
        return self._norm

    def zero_grad(self) -> None:
        """Set the gradients to zero."""
        self._optimizer.zero_grad(set_to_none=False)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of the torch optimizer."""
        return named_state(self._optimizer)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the state of the torch optimizer."""
        load_named_state(self._optimizer, state)
