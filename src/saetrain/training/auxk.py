"""AuxK's part of a step whose gradients are written out: which latents, how many of them, and with what weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from saetrain.coders.topk import TopK, default_k_aux
from saetrain.ops.auxk import AuxKGradients, compute_auxk_gradients
from saetrain.ops.reference import next_power_of_2
from saetrain.types import StepContext


@dataclass(frozen=True)
class DeadLatents:
    """``rows`` (A,) int64: dead latents, and behind the ``count`` of them any others, which take no part."""

    rows: Tensor
    count: Tensor | int

    @classmethod
    def from_mask(cls, mask_F: Tensor) -> DeadLatents:
        """Exactly those of the mask; how many is a shape, so the device is asked."""
        rows = mask_F.nonzero().squeeze(1)
        return cls(rows, len(rows))

    @classmethod
    def from_bounded_mask(cls, max_count: int, mask_F: Tensor) -> DeadLatents:
        """Those of the mask, of which there are no more than ``max_count``, in a shape that needs no answer."""
        # Few different sizes, for memory and kernels are kept by size.
        size = min(len(mask_F), next_power_of_2(max_count))
        positions = torch.where(mask_F, mask_F.cumsum(0) - 1, size)
        rows = torch.zeros(size + 1, dtype=torch.long, device=mask_F.device)
        rows.scatter_(0, positions, torch.arange(len(mask_F), device=mask_F.device))
        return cls(rows[:size], mask_F.sum())

    def inverse_index(self, latents: int) -> Tensor:
        """(F,) int32: where each latent stands in ``rows``; -1 for those that are not dead."""
        size = len(self.rows)
        number = torch.arange(size, dtype=torch.int32, device=self.rows.device)
        index = torch.full((latents + 1,), -1, dtype=torch.int32, device=self.rows.device)
        index.scatter_(0, torch.where(number < self.count, self.rows, latents), number)
        return index[:latents]


def auxk_forward_backward(
    coder: TopK,
    weights: Mapping[str, Tensor],
    centered_ND: Tensor,
    residual_ND: Tensor,
    dead: DeadLatents,
    progress: StepContext,
) -> AuxKGradients:
    """The weighted loss and gradients of ``dead``, as ``TopK.losses`` defines them.

    ``weights`` {`enc`, `dec`: (F, D)} and ``centered_ND`` in the products' dtype; ``residual_ND`` fp32.
    """
    k_aux, size = default_k_aux(coder.d_in), len(dead.rows)
    tiny = torch.finfo(torch.float32).tiny
    dead_share = dead.count / k_aux
    dead_share = dead_share.clamp_max(1.0) if isinstance(dead_share, Tensor) else min(dead_share, 1.0)
    weight = coder.auxk_alpha * dead_share / progress.n_tokens
    # Those that take no part are below all others, and what ReLU makes 0 has no gradient.
    is_padding = torch.arange(size, device=dead.rows.device) >= dead.count
    return compute_auxk_gradients(
        centered_ND,
        residual_ND,
        weights["enc"][dead.rows],
        coder.b_enc.detach()[dead.rows].masked_fill_(is_padding, -torch.inf),
        weights["dec"][dead.rows],
        k=min(k_aux, size),
        weight=weight / progress.residual_variance.clamp_min(tiny),
    )
