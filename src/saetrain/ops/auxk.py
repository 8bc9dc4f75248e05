"""AuxK loss over the dead latents with explicit gradients (Gao et al., arXiv 2406.04093 §A.2).

The products are dense, because few latents are dead and k_aux is large.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_BYTES_CPU, CHUNK_BYTES_ACCELERATOR = 16 << 20, 512 << 20
"""Bytes of pre-activations per chunk. On a CPU a chunk fits in the cache; elsewhere large chunks update the sums less
often."""


@dataclass(frozen=True)
class AuxKGradients:
    """AuxK loss (a scalar) and its gradients for A dead latents: ``W_enc`` and ``W_dec`` (A, D), ``b_enc`` (A,)."""

    loss: Tensor
    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor


def compute_auxk_gradients(
    x_ND: Tensor, residual_ND: Tensor, W_enc_AD: Tensor, b_enc_A: Tensor, W_dec_AD: Tensor, *, k: int, weight: Tensor
) -> AuxKGradients:
    """Return ``weight`` · Σ‖residual - ê‖² with ê = ReLU(TopK_k(x W_encᵀ + b_enc)) W_dec, and its gradients, in fp32.

    ``x_ND`` is the encoder input (centred, decoder bias subtracted). Products run in the dtype of ``x_ND``.
    """
    W_enc, W_dec = W_enc_AD.to(x_ND.dtype), W_dec_AD.to(x_ND.dtype)
    sums = AuxKGradients(
        weight.new_zeros(()),
        torch.zeros_like(W_enc_AD, dtype=torch.float32),
        torch.zeros_like(W_dec_AD, dtype=torch.float32),
        torch.zeros_like(b_enc_A),
    )
    chunk_bytes = CHUNK_BYTES_CPU if x_ND.device.type == "cpu" else CHUNK_BYTES_ACCELERATOR
    rows = max(64, chunk_bytes // (4 * len(b_enc_A)))
    for x, residual in zip(x_ND.split(rows), residual_ND.split(rows), strict=True):
        _add_chunk(sums, x, residual, W_enc, b_enc_A, W_dec, k, weight)
    return sums


def _add_chunk(
    sums: AuxKGradients,
    x: Tensor,
    residual: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    k: int,
    weight: Tensor,
) -> None:
    dtype = x.dtype
    pre = (x @ W_enc.T).float() + b_enc
    code = pre.relu()
    if k < len(b_enc):
        # The k-th largest entry is kept, and all entries that are equal to it.
        code = code * (pre >= pre.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True))
    error = (code.to(dtype) @ W_dec).float() - residual
    grad_estimate = (2 * weight * error).to(dtype)
    grad_pre = (grad_estimate @ W_dec.T).float() * (code > 0)
    sums.loss.add_(weight * error.pow(2).sum())
    sums.W_enc.add_(grad_pre.to(dtype).T @ x)
    sums.W_dec.add_(code.to(dtype).T @ grad_estimate)
    sums.b_enc.add_(grad_pre.sum(dim=0))
