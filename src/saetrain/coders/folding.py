"""Folding the inputs' centre and scale into a coder's biases, so that it takes raw activations.

With x' = (x - m) / s and a code f' of x': f = s f', W unchanged, b_enc = s b_enc', b_dec = s b_dec' + m. Exact for an
encoder that subtracts b_dec and is positively homogeneous, as ReLU and TopK are.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from saetrain.coders.base import SparseCoder


@torch.no_grad()
def folded(coder: SparseCoder, mean_D: Tensor, scale: float) -> SparseCoder:
    """A coder of raw activations that shares ``coder``'s weights and has biases of its own."""
    out = copy.copy(coder)
    out._parameters = dict(coder._parameters)
    out.b_enc = torch.nn.Parameter(coder.b_enc.detach() * scale, requires_grad=False)
    out.b_dec = torch.nn.Parameter(coder.b_dec.detach() * scale + mean_D, requires_grad=False)
    return out


@torch.no_grad()
def unfold_(coder: SparseCoder, mean_D: Tensor, scale: float) -> None:
    """Undo :func:`folded` in place: a coder of raw activations becomes one of centred and scaled ones."""
    coder.b_enc.div_(scale)
    coder.b_dec.sub_(mean_D).div_(scale)
