"""AuxK loss in training steps with explicit gradients: the dead latents and the weight of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from saetrain.coders.auxk import AuxKCoder, default_k_aux
from saetrain.ops.auxk import AuxKGradients, compute_auxk_gradients
from saetrain.ops.sparse import next_power_of_2
from saetrain.types import StepContext


@dataclass(frozen=True)
class DeadLatents:
    """``rows`` (A,) int64: indices of the ``count`` dead latents, followed by padding with arbitrary indices."""

    rows: Tensor
    count: Tensor | int

    @classmethod
    def from_mask(cls, mask_F: Tensor) -> DeadLatents:
        """Return the latents of the mask without padding; synchronizes with the device to get their number."""
        rows = mask_F.nonzero().squeeze(1)
        return cls(rows, len(rows))

    @classmethod
    def from_bounded_mask(cls, max_count: int, mask_F: Tensor) -> DeadLatents:
        """Return the at most ``max_count`` latents of the mask, padded to a size that needs no synchronization."""
        # Powers of two, because memory and kernels are cached per size.
        size = min(len(mask_F), next_power_of_2(max_count))
        positions = torch.where(mask_F, mask_F.cumsum(0) - 1, size)
        rows = torch.zeros(size + 1, dtype=torch.long, device=mask_F.device)
        rows.scatter_(0, positions, torch.arange(len(mask_F), device=mask_F.device))
        return cls(rows[:size], mask_F.sum())

    def inverse_index(self, latents: int) -> Tensor:
        """Return the position of each latent in ``rows``, (F,) int32; -1 for latents that are not dead."""
        size = len(self.rows)
        number = torch.arange(size, dtype=torch.int32, device=self.rows.device)
        index = torch.full((latents + 1,), -1, dtype=torch.int32, device=self.rows.device)
        index.scatter_(0, torch.where(number < self.count, self.rows, latents), number)
        return index[:latents]


def auxk_forward_backward(
    coder: AuxKCoder,
    weights: Mapping[str, Tensor],
    centred_ND: Tensor,
    residual_ND: Tensor,
    dead: DeadLatents,
    ctx: StepContext,
) -> AuxKGradients:
    """Return the weighted AuxK loss of ``dead`` and its gradients, as :meth:`AuxKCoder.losses` defines the loss.

    ``weights`` {`enc`, `dec`: (F, D)} and ``centred_ND`` have the dtype of the products; ``residual_ND`` is fp32.
    """
    size = len(dead.rows)
    # Padding gets a pre-activation of -inf, so that ReLU makes its code and its gradient zero.
    is_padding = torch.arange(size, device=dead.rows.device) >= dead.count
    return compute_auxk_gradients(
        centred_ND,
        residual_ND,
        weights["enc"][dead.rows],
        coder.b_enc.detach()[dead.rows].masked_fill_(is_padding, -torch.inf),
        weights["dec"][dead.rows],
        k=min(default_k_aux(coder.d_in), size),
        weight=coder.auxk_weight(dead.count, ctx),
    )
