"""AuxK's part of a step whose gradients are written out: which latents, how many of them, and with what weight."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from saetrain.coders.topk import TopK, auxk_size
from saetrain.kernels.auxk import AuxGradients, auxk_gradients
from saetrain.types import Progress


def auxk_step(
    coder: TopK,
    weights: Mapping[str, Tensor],
    product_ND: Tensor,
    residual_ND: Tensor,
    dead: Tensor,
    progress: Progress,
) -> AuxGradients:
    """The weighted loss and gradients of the latents ``dead`` (A,) int64, as ``TopK.losses`` defines them.

    ``weights`` {`enc`, `dec`: (F, D)} and ``product_ND`` in the products' dtype; ``residual_ND`` fp32.
    """
    wanted = auxk_size(coder.d_in)
    tiny = torch.finfo(torch.float32).tiny
    weight = coder.auxk_alpha * min(len(dead) / wanted, 1.0) / progress.n_tokens
    return auxk_gradients(
        product_ND,
        residual_ND,
        weights["enc"][dead],
        coder.b_enc.detach()[dead],
        weights["dec"][dead],
        k=min(wanted, len(dead)),
        weight=weight / progress.residual_variance.clamp_min(tiny),
    )
