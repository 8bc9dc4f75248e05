"""AuxK's part of a step whose gradients are written out: which latents, how many of them, and with what weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from saetrain.coders.topk import TopK, auxk_size
from saetrain.kernels.auxk import AuxGradients, auxk_gradients
from saetrain.kernels.plain import power_of_two
from saetrain.types import StepContext


@dataclass(frozen=True)
class DeadLatents:
    """``rows`` (A,) int64: dead latents, and behind the ``count`` of them any others, which take no part."""

    rows: Tensor
    count: Tensor | int

    @classmethod
    def of(cls, mask_F: Tensor) -> DeadLatents:
        """Exactly those of the mask; how many is a shape, so the device is asked."""
        rows = mask_F.nonzero().squeeze(1)
        return cls(rows, len(rows))

    @classmethod
    def at_most(cls, most: int, mask_F: Tensor) -> DeadLatents:
        """Those of the mask, of which there are no more than ``most``, in a shape that needs no answer."""
        # Few different sizes, for memory and kernels are kept by size.
        size = min(len(mask_F), power_of_two(most))
        place = torch.where(mask_F, mask_F.cumsum(0) - 1, size)
        rows = torch.zeros(size + 1, dtype=torch.long, device=mask_F.device)
        rows.scatter_(0, place, torch.arange(len(mask_F), device=mask_F.device))
        return cls(rows[:size], mask_F.sum())

    def places(self, latents: int) -> Tensor:
        """(F,) int32: where each latent stands in ``rows``; -1 for those that are not dead."""
        size = len(self.rows)
        number = torch.arange(size, dtype=torch.int32, device=self.rows.device)
        found = torch.full((latents + 1,), -1, dtype=torch.int32, device=self.rows.device)
        found.scatter_(0, torch.where(number < self.count, self.rows, latents), number)
        return found[:latents]


def auxk_step(
    coder: TopK,
    weights: Mapping[str, Tensor],
    product_ND: Tensor,
    residual_ND: Tensor,
    dead: DeadLatents,
    progress: StepContext,
) -> AuxGradients:
    """The weighted loss and gradients of ``dead``, as ``TopK.losses`` defines them.

    ``weights`` {`enc`, `dec`: (F, D)} and ``product_ND`` in the products' dtype; ``residual_ND`` fp32.
    """
    wanted, size = auxk_size(coder.d_in), len(dead.rows)
    tiny = torch.finfo(torch.float32).tiny
    share = dead.count / wanted
    share = share.clamp_max(1.0) if isinstance(share, Tensor) else min(share, 1.0)
    weight = coder.auxk_alpha * share / progress.n_tokens
    # Those that take no part are below all others, and what ReLU makes 0 has no gradient.
    outside = torch.arange(size, device=dead.rows.device) >= dead.count
    return auxk_gradients(
        product_ND,
        residual_ND,
        weights["enc"][dead.rows],
        coder.b_enc.detach()[dead.rows].masked_fill_(outside, -torch.inf),
        weights["dec"][dead.rows],
        k=min(wanted, size),
        weight=weight / progress.residual_variance.clamp_min(tiny),
    )
