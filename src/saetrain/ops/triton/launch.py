"""Launches of the Triton kernels on torch tensors, with fixed shapes and without synchronizing with the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saetrain.ops.sparse import next_power_of_2
from saetrain.ops.triton import kernels as triton_kernels
from saetrain.ops.triton import topk as triton_topk

CHUNK_BYTES = 512 << 20
"""Bytes of pre-activations per chunk."""
TILE_ELEMENTS, WIDE_TILE_ELEMENTS = 4096, 8192
"""Elements of gathered rows per program, for widths up to 1024 and above."""
SEGMENT_PAIRS = 256
"""Pairs per program. Latents with more pairs are split into segments, because one program would take too long."""
BLOCK = 1024
"""Columns per iteration of a program."""


@dataclass(frozen=True)
class SegmentedPairs:
    """The active (token, latent) pairs, sorted by latent, then by token.

    ``starts`` (F + 1,) int64 first pair of each latent; ``token`` (N·K,) int32; ``value`` and ``grad_pre`` (N·K,) fp32;
    ``segment_starts`` (F + 1,) int64, ``segment_latent`` (S,) int32 and ``segment_first`` (S,) int64: segments of the
    latents with more than SEGMENT_PAIRS pairs.
    """

    starts: Tensor
    token: Tensor
    value: Tensor
    grad_pre: Tensor
    segment_starts: Tensor
    segment_latent: Tensor
    segment_first: Tensor


def rows_per_tile(width: int) -> int:
    """Return the number of rows of ``width`` per tile of a program."""
    return max(1, min(16, (TILE_ELEMENTS if width <= 1024 else WIDE_TILE_ELEMENTS) // next_power_of_2(width)))


def row_launch_options(width: int) -> dict[str, int | bool]:
    """Return the launch options of a program over rows of ``width``.

    There are enough warps to keep the rows in registers, but no warp without elements. Multiply-adds are fused,
    which is Triton's current default.
    """
    block = next_power_of_2(width)
    warps = min(8 if width <= 1024 else 16, max(1, block // 32))
    return {"BLOCK_D": block, "num_warps": warps, "enable_fp_fusion": True}


def encode_topk(x_ND: Tensor, W_FD: Tensor, b_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return (values fp32, indices int32), both (N, k): ReLU of the k largest entries of each row of ``x Wᵀ + b``.

    The entries are in the order of their latents; among equal ones, those with lower indices are chosen. ``x_ND`` and
    ``W_FD`` have the dtype of the products.
    """
    tokens, latents = len(x_ND), len(W_FD)
    # At least one block of columns, because large reads hide the latency of memory.
    groups = min(next_power_of_2(latents), max(next_power_of_2(4 * k), BLOCK))
    rows = min(tokens, max(16, CHUNK_BYTES // (latents * x_ND.element_size())))
    pre = x_ND.new_empty(rows, latents)
    values, indices = b_F.new_empty(tokens, k), b_F.new_empty(tokens, k, dtype=torch.int32)
    keys = b_F.new_empty(rows, groups, dtype=torch.int32).view(torch.uint32)
    candidates = b_F.new_empty(rows, groups, dtype=torch.int32)
    for start in range(0, tokens, rows):
        stop = min(start + rows, tokens)
        chunk = torch.mm(x_ND[start:stop], W_FD.T, out=pre[: stop - start])
        triton_topk.select_topk_kernel[(stop - start,)](
            chunk, b_F, values[start:stop], indices[start:stop], keys, candidates, latents, k,
            GROUPS=groups, CAPACITY=groups, BLOCK=min(BLOCK, next_power_of_2(latents)), enable_fp_fusion=True,
        )  # fmt: skip
    return values, indices


def compute_residuals(
    x_ND: Tensor, W_FD: Tensor, values_NK: Tensor, indices_NK: Tensor, loss_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the residual (N, D) in fp32 and in the dtype of ``W_FD``, pre-activation gradients (N, K), and norms (N,).

    ``x_ND`` excludes the decoder bias; the loss is ``loss_scale`` / 2 times the squared residual.
    """
    tokens, width = x_ND.shape
    k = values_NK.shape[1]
    residual, grad_pre, norms = torch.empty_like(x_ND), torch.empty_like(values_NK), x_ND.new_empty(tokens)
    residual_copy = residual if W_FD.dtype == torch.float32 else torch.empty_like(x_ND, dtype=W_FD.dtype)
    triton_kernels.compute_residuals_kernel[(tokens,)](
        x_ND, W_FD, values_NK, indices_NK, loss_scale, residual, residual_copy, grad_pre, norms, width, k,
        BLOCK_K=rows_per_tile(width), **row_launch_options(width),
    )  # fmt: skip
    return residual, residual_copy, grad_pre, norms


def sort_pairs(values_NK: Tensor, indices_NK: Tensor, grad_pre_NK: Tensor, latents: int) -> SegmentedPairs:
    """Sort the active pairs by latent; inactive pairs come after the last latent."""
    device, k = values_NK.device, values_NK.shape[1]
    latent = torch.where(values_NK > 0, indices_NK, latents).flatten()
    ordered, order = torch.sort(latent, stable=True)
    starts = torch.searchsorted(ordered, torch.arange(latents + 1, device=device, dtype=ordered.dtype))
    count = starts.diff()
    n_segments = torch.where(count > SEGMENT_PAIRS, (count + SEGMENT_PAIRS - 1) // SEGMENT_PAIRS, 0)
    segment_starts = torch.zeros_like(starts)
    torch.cumsum(n_segments, dim=0, out=segment_starts[1:])
    # A latent of c pairs has fewer than 2 c / SEGMENT_PAIRS segments, so their number is bounded without synchronizing.
    number = torch.arange(2 * len(latent) // SEGMENT_PAIRS + 1, device=device)
    owner = torch.searchsorted(segment_starts[1:], number, right=True).clamp_max(latents - 1)
    first = starts[owner] + (number - segment_starts[owner]) * SEGMENT_PAIRS
    return SegmentedPairs(
        starts,
        torch.div(order, k, rounding_mode="floor").int(),
        values_NK.flatten()[order],
        grad_pre_NK.flatten()[order],
        segment_starts,
        torch.where(number < segment_starts[-1], owner, -1).int(),
        first,
    )


def bound_latent_norms(
    pairs: SegmentedPairs, x_norms: Tensor, residual_norms: Tensor, loss_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradient of ``b_enc`` (F,), and an upper bound of the squared norm of each latent's gradients (F,)."""
    latents = len(pairs.starts) - 1
    grad_b_enc, squared_bounds = x_norms.new_empty(latents), x_norms.new_empty(latents)
    triton_kernels.bound_norms_kernel[(latents,)](
        pairs.starts,
        pairs.token,
        pairs.value,
        pairs.grad_pre,
        x_norms,
        residual_norms,
        loss_scale,
        grad_b_enc,
        squared_bounds,
        BLOCK=128,
        enable_fp_fusion=True,
    )
    return grad_b_enc, squared_bounds


def sum_segments(pairs: SegmentedPairs, x_ND: Tensor, residual_ND: Tensor, loss_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient rows (encoder, decoder) of the segments, both (S, D).

    ``x_ND`` and ``residual_ND`` have the dtype of the products.
    """
    width, count = x_ND.shape[1], len(pairs.segment_latent)
    sums = [torch.empty(count, width, device=x_ND.device) for _ in range(2)]
    triton_kernels.sum_segments_kernel[(count,)](
        pairs.segment_latent, pairs.segment_first, pairs.starts, pairs.token, pairs.value, pairs.grad_pre,
        x_ND, residual_ND, loss_scale, *sums, width,
        SEGMENT=SEGMENT_PAIRS, BLOCK_P=rows_per_tile(width), **row_launch_options(width),
    )  # fmt: skip
    return sums[0], sums[1]
