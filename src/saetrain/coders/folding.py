"""Fold the normalizer (mean, scale and axes) into a coder, so that it takes raw activations.

With x' = ((x - m) / s) A, where A is orthonormal, and a code f' of x': f = s f', W_enc = A W_enc', W_dec = W_dec' Aᵀ,
b_enc = s b_enc', b_dec = s A b_dec' + m. The result is exact for encoders that subtract b_dec and are positively
homogeneous, such as ReLU and TopK.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from saetrain.coders.base import SparseCoder


@torch.no_grad()
def fold_normalizer(coder: SparseCoder, mean_D: Tensor, scale: float, axes_DD: Tensor) -> SparseCoder:
    """Return a coder of raw activations; ``coder`` is not changed."""
    out = copy.copy(coder)
    weights = {
        # A transposed view, so that the memory has one row per latent, as in the coder.
        "W_enc": (coder.W_enc.T @ axes_DD.T).T,
        "W_dec": coder.W_dec @ axes_DD.T,
        "b_enc": coder.b_enc * scale,
        "b_dec": axes_DD @ coder.b_dec * scale + mean_D,
    }
    out._parameters = {name: torch.nn.Parameter(value, requires_grad=False) for name, value in weights.items()}
    return out


@torch.no_grad()
def unfold_normalizer_(coder: SparseCoder, mean_D: Tensor, scale: float, axes_DD: Tensor) -> None:
    """Undo :func:`fold_normalizer` in place: a coder of raw activations becomes a coder of normalized activations."""
    coder.W_enc.copy_(axes_DD.T @ coder.W_enc)
    coder.W_dec.copy_(coder.W_dec @ axes_DD)
    coder.b_enc.div_(scale)
    coder.b_dec.copy_((coder.b_dec - mean_D) / scale @ axes_DD)
