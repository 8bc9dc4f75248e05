"""Launches of the Triton kernels on torch's memory: fixed shapes, no answer of the device is waited for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saetrain.kernels import gpu, gpu_search
from saetrain.kernels.plain import power_of_two

CHUNK_BYTES = 512 << 20
"""Pre-activations that are held at once."""
TILE, WIDE_TILE = 4096, 8192
"""Numbers of gathered rows that a program holds at once, up to and above a width of 1024."""
SEGMENT = 256
"""Pairs of a latent that one program sums; those of a latent that fires on every token would keep it for long."""
BLOCK = 1024
"""Columns, or pairs of numbers, that a program looks at together."""


@dataclass(frozen=True)
class Pairs:
    """The active (token, latent) pairs, one latent after the other, tokens in order.

    ``starts`` (F + 1,) int64; ``token`` (N·K,) int32; ``value`` and ``slope`` (N·K,) fp32; ``segments`` (F + 1,) int64
    and ``segment_latent``, ``segment_first`` (S,): pieces of latents with more than SEGMENT pairs.
    """

    starts: Tensor
    token: Tensor
    value: Tensor
    slope: Tensor
    segments: Tensor
    segment_latent: Tensor
    segment_first: Tensor


def rows_at_once(width: int) -> int:
    """Rows of ``width`` that fit a program's tile."""
    return max(1, min(16, (TILE if width <= 1024 else WIDE_TILE) // power_of_two(width)))


def over_rows(width: int) -> dict[str, int | bool]:
    """How a program over rows of ``width`` is launched: with as many warps as keep what it holds in registers.

    No more than have numbers of their own; products and sums are fused, which is Triton's default so far.
    """
    block = power_of_two(width)
    warps = min(8 if width <= 1024 else 16, max(1, block // 32))
    return {"BLOCK_D": block, "num_warps": warps, "enable_fp_fusion": True}


def topk_relu(x_ND: Tensor, W_FD: Tensor, b_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values fp32, indices int32), both (N, k): ReLU of the k largest of ``x Wᵀ + b``, in the order of their latents.

    ``x_ND`` and ``W_FD`` in the products' format; among equals the lower index is taken.
    """
    tokens, latents = len(x_ND), len(W_FD)
    # No fewer than a program reads at once, for what is read at once hides the wait for memory.
    groups = min(power_of_two(latents), max(power_of_two(4 * k), BLOCK))
    rows = min(tokens, max(16, CHUNK_BYTES // (latents * x_ND.element_size())))
    pre = x_ND.new_empty(rows, latents)
    values, indices = b_F.new_empty(tokens, k), b_F.new_empty(tokens, k, dtype=torch.int32)
    keys = b_F.new_empty(rows, groups, dtype=torch.int32).view(torch.uint32)
    candidates = b_F.new_empty(rows, groups, dtype=torch.int32)
    for start in range(0, tokens, rows):
        stop = min(start + rows, tokens)
        chunk = torch.mm(x_ND[start:stop], W_FD.T, out=pre[: stop - start])
        gpu_search.select[(stop - start,)](
            chunk, b_F, values[start:stop], indices[start:stop], keys, candidates, latents, k,
            GROUPS=groups, CAPACITY=groups, BLOCK=min(BLOCK, power_of_two(latents)), enable_fp_fusion=True,
        )  # fmt: skip
    return values, indices


def reconstruct(
    x_ND: Tensor, W_FD: Tensor, values_NK: Tensor, indices_NK: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Residual (N, D) in fp32 and in the format of ``W_FD``, the latents' gradients (N, K), the residual's norms (N,).

    ``x_ND`` has the decoder's bias taken off; the loss is ``scale`` / 2 times the squared residual.
    """
    tokens, width = x_ND.shape
    k = values_NK.shape[1]
    residual, slopes, norms = torch.empty_like(x_ND), torch.empty_like(values_NK), x_ND.new_empty(tokens)
    copy = residual if W_FD.dtype == torch.float32 else torch.empty_like(x_ND, dtype=W_FD.dtype)
    gpu.reconstruct[(tokens,)](
        x_ND, W_FD, values_NK, indices_NK, scale, residual, copy, slopes, norms, width, k,
        BLOCK_K=rows_at_once(width), **over_rows(width),
    )  # fmt: skip
    return residual, copy, slopes, norms


def sort_pairs(values_NK: Tensor, indices_NK: Tensor, slopes_NK: Tensor, latents: int) -> Pairs:
    """The active pairs by latent; inactive ones lie behind the last."""
    device, k = values_NK.device, values_NK.shape[1]
    latent = torch.where(values_NK > 0, indices_NK, latents).flatten()
    ordered, order = torch.sort(latent, stable=True)
    starts = torch.searchsorted(ordered, torch.arange(latents + 1, device=device, dtype=ordered.dtype))
    count = starts.diff()
    pieces = torch.where(count > SEGMENT, (count + SEGMENT - 1) // SEGMENT, 0)
    segments = torch.zeros_like(starts)
    torch.cumsum(pieces, dim=0, out=segments[1:])
    # A latent of c pairs has fewer than 2 c / SEGMENT segments, so that their number is bounded without asking.
    number = torch.arange(2 * len(latent) // SEGMENT + 1, device=device)
    owner = torch.searchsorted(segments[1:], number, right=True).clamp_max(latents - 1)
    first = starts[owner] + (number - segments[owner]) * SEGMENT
    return Pairs(
        starts,
        torch.div(order, k, rounding_mode="floor").int(),
        values_NK.flatten()[order],
        slopes_NK.flatten()[order],
        segments,
        torch.where(number < segments[-1], owner, -1).int(),
        first,
    )


def bounds(pairs: Pairs, x_norms: Tensor, residual_norms: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of ``b_enc`` (F,), and at least the squared norm of each latent's gradients (F,)."""
    latents = len(pairs.starts) - 1
    bias, squares = x_norms.new_empty(latents), x_norms.new_empty(latents)
    gpu.bound_norms[(latents,)](
        pairs.starts,
        pairs.token,
        pairs.value,
        pairs.slope,
        x_norms,
        residual_norms,
        scale,
        bias,
        squares,
        BLOCK=128,
        enable_fp_fusion=True,
    )
    return bias, squares


def parts(pairs: Pairs, x_ND: Tensor, residual_ND: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient rows (S, D) of the segments of latents that fire often; both inputs in the products' format."""
    width, count = x_ND.shape[1], len(pairs.segment_latent)
    found = [torch.empty(count, width, device=x_ND.device) for _ in range(2)]
    gpu.partial[(count,)](
        pairs.segment_latent, pairs.segment_first, pairs.starts, pairs.token, pairs.value, pairs.slope,
        x_ND, residual_ND, scale, *found, width,
        SEGMENT=SEGMENT, BLOCK_P=rows_at_once(width), **over_rows(width),
    )  # fmt: skip
    return found[0], found[1]
