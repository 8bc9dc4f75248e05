"""How one coder is stepped: forward, gradients, update. The reference is autograd; a fast engine computes the same."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saetrain.coders.base import SparseCoder
from saetrain.optim import Optimizer, to_memory_order
from saetrain.types import CoderOutput, StepContext


@dataclass(frozen=True, kw_only=True)
class KernelSettings:
    """Kernels: how the SAE's step is computed."""

    kernels: Literal["auto", "reference", "torch", "native", "triton"] = "auto"
    """`native`: C++ for CPUs, built at first use; `triton`: for NVIDIA's GPUs, not measured on one so far; both step by
    adam alone; `torch`: PyTorch, anywhere; `reference`: plain autograd; `auto`: the fastest of them that runs here."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the SAE's products; weights and sums are float32. `auto`: bfloat16 where the hardware has it."""


Objective = Callable[[CoderOutput], dict[str, Tensor]]
"""Named loss terms of a micro-batch, weights applied, in the place of the coder's own, which it is given."""


@dataclass(frozen=True)
class SplicedBatch:
    """A micro-batch whose loss is the model's own, with the reconstruction in the activation's place.

    ``raw_ND`` raw activations that are replaced; ``step_tokens`` what sums over tokens are divided by: tokens of the
    whole optimizer step; ``objective`` the loss terms.
    """

    raw_ND: Tensor
    step_tokens: int
    objective: Objective


@dataclass(frozen=True)
class StepStats:
    """What a micro-batch gives: its loss terms (parts of the step's) and sums over its tokens.

    ``fired`` (F,) int64 tokens on which each latent is active; ``residual_sum`` (D,) of x - x̂; ``residual_square``
    Σ‖x - x̂‖², a scalar.
    """

    fired: Tensor
    tokens: int
    losses: dict[str, Tensor]
    residual_sum: Tensor
    residual_square: Tensor

    def merge_with(self, other: StepStats) -> StepStats:
        """Both as one."""
        return StepStats(
            self.fired + other.fired,
            self.tokens + other.tokens,
            {name: loss + other.losses[name] for name, loss in self.losses.items()},
            self.residual_sum + other.residual_sum,
            self.residual_square + other.residual_square,
        )

    def pack_row(self) -> Tensor:
        """All of it as one row of float64, which adds up over ranks; counts stay exact."""
        parts = [self.fired, self.residual_sum, self.residual_square, *self.losses.values()]
        row = [part.reshape(-1).double() for part in parts]
        return torch.cat([*row, row[0].new_full((1,), self.tokens)])

    def unpack_row(self, row: Tensor, tokens: int | None = None) -> StepStats:
        """What ``row``, made by :meth:`pack_row` of one with the same names, holds; asks the device unless ``tokens``."""
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
    """What torch's Adam would hold, by its names.

    ``moments`` {`m_` and `v_` of `enc`, `dec` (F, D), `b` (F,), `b_dec` (D,)}; the encoder's come in the shape of
    ``W_enc`` (D, F), all of them as views; ``step`` a scalar.
    """
    out = {}
    for parameter, tensor_name in (("W_enc", "enc"), ("W_dec", "dec"), ("b_enc", "b"), ("b_dec", "b_dec")):
        for key, moment in (("exp_avg", "m"), ("exp_avg_sq", "v")):
            value = moments[f"{moment}_{tensor_name}"]
            out[f"{parameter}.{key}"] = value.T if tensor_name == "enc" else value
        out[f"{parameter}.step"] = step.clone()
    return out


class TrainStep(ABC):
    """Steps one coder; micro-batches add up until :meth:`optimizer_step` or :meth:`zero_grad`."""

    @abstractmethod
    def forward_backward(self, x_ND: Tensor, progress: StepContext, objective: Objective | None = None) -> StepStats:
        """Forward and gradients of a micro-batch of what the coder sees; the reference alone takes an objective."""

    @abstractmethod
    def gradients(self) -> list[Tensor]:
        """The gradients as they add up, to be summed over ranks in place before :meth:`norm_bound`."""

    @abstractmethod
    def norm_bound(self) -> Tensor | float:
        """At least the norm of the projected gradient, and not finite where that is not."""

    @abstractmethod
    def optimizer_step(self, lr: float) -> Tensor:
        """Update at learning rate ``lr``; gives the projected gradient's norm before clipping."""

    @abstractmethod
    def zero_grad(self) -> None:
        """Forget the gradients."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """The optimizer's tensors as ``{parameter.key: tensor}``."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state_dict` gave; the coder's parameters are restored before."""


class DeviceStep(TrainStep):
    """One whose steps never ask the device for a number, so that the host can run ahead of it."""

    @abstractmethod
    def norm_bound(self) -> Tensor:
        """As a scalar on the device."""

    @abstractmethod
    def optimizer_step(self, lr: float, ok: Tensor | None = None) -> Tensor:
        """Update where ``ok``, a bool on the device, allows it; gives the projected gradient's norm."""


class ReferenceStep(TrainStep):
    """The reference: any coder, any device, gradients by autograd, a torch optimizer."""

    def __init__(self, coder: SparseCoder, optimizer: Optimizer) -> None:
        self._coder, self._optimizer = coder, optimizer
        self._norm = torch.zeros(())

    def forward_backward(self, x_ND: Tensor, progress: StepContext, objective: Objective | None = None) -> StepStats:
        """Through the coder's own forward."""
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
        """Every parameter's, as it lies in memory."""
        return [to_memory_order(p.grad) for p in self._coder.parameters() if p.grad is not None]

    def norm_bound(self) -> float:
        """The norm itself, of the gradients as they now lie."""
        self._norm = self._optimizer.project_gradients()
        return float(self._norm)

    def optimizer_step(self, lr: float) -> Tensor:
        """By the torch optimizer."""
        self._optimizer.step(lr, self._norm)
        self.zero_grad()
        return self._norm

    def zero_grad(self) -> None:
        """Zero the gradients."""
        self._optimizer.zero_grad()

    def state_dict(self) -> dict[str, Tensor]:
        """The torch optimizer's."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Into the torch optimizer."""
        self._optimizer.load_state_dict(state)
