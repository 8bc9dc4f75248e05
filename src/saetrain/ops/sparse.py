"""Products of a TopK step in PyTorch, on any device: chunked top-k, sparse decode, gradients as sparse products.

``W`` matrices are (F, D), one row per latent. No tensor of size N x F is stored, and no gradient of that size is
computed. The reference of each function is the dense product in its docstring.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

CHUNK_BYTES = 4 << 20
"""Bytes of pre-activations per chunk on a CPU, so that a chunk is still in the cache during the top-k search."""
CHUNK_TOKENS = 8192
"""Tokens per chunk on other devices."""
EMBEDDING_BAG_SUM = 0
"""Code of embedding_bag's mode `sum`."""


@dataclass(frozen=True)
class SparsePairs:
    """The P (token, latent) pairs of the code of N tokens, sorted by latent, then by token.

    ``starts`` (F + 1,) int64 first pair of each latent; ``order`` (P,) int64 positions in the flat code; ``tokens``
    (P,) int64.
    """

    starts: Tensor
    order: Tensor
    tokens: Tensor

    def to_csr(self, values: Tensor, n_tokens: int) -> Tensor:
        """Return the values of the pairs as a sparse CSR matrix (F, N)."""
        size = (len(self.starts) - 1, n_tokens)
        entries = values.reshape(-1)[self.order]
        return torch.sparse_csr_tensor(self.starts, self.tokens, entries, size, check_invariants=False)


def encode_topk(x_ND: Tensor, W_FD: Tensor, b_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return (values fp32, indices int64), both (N, k): ReLU of the k largest entries of each row of ``x Wᵀ + b``.

    ``x_ND`` and ``W_FD`` have the dtype of the products.
    """
    tokens, latents = len(x_ND), len(W_FD)
    chunk_tokens = tokens_per_chunk(x_ND, latents)
    bias = b_F.to(x_ND.dtype)
    pre = x_ND.new_empty(min(chunk_tokens, tokens), latents)
    values = torch.empty(tokens, k, dtype=torch.float32, device=x_ND.device)
    indices = torch.empty(tokens, k, dtype=torch.long, device=x_ND.device)
    for start in range(0, tokens, chunk_tokens):
        stop = min(start + chunk_tokens, tokens)
        chunk = torch.addmm(bias, x_ND[start:stop], W_FD.T, out=pre[: stop - start])
        found, indices[start:stop] = topk_two_stage(chunk, k)
        values[start:stop] = found
    return values.relu_(), indices


def encode_above(x_ND: Tensor, W_FD: Tensor, b_F: Tensor, floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pairs of ``x Wᵀ + b`` above ``floor``, (F,) or a scalar, in the order of the tokens.

    Values (P,) fp32, latents (P,) int64 and tokens (P,) int64; ``x_ND`` and ``W_FD`` have the dtype of the products.
    """
    tokens, latents = len(x_ND), len(W_FD)
    chunk_tokens = tokens_per_chunk(x_ND, latents)
    bias = b_F.to(x_ND.dtype)
    pre = x_ND.new_empty(min(chunk_tokens, tokens), latents)
    values, pairs = [], []
    for start in range(0, max(tokens, 1), chunk_tokens):
        stop = min(start + chunk_tokens, tokens)
        chunk = torch.addmm(bias, x_ND[start:stop], W_FD.T, out=pre[: stop - start])
        found = (chunk > floor).flatten().nonzero().squeeze(1)
        values.append(chunk.flatten()[found].float())
        pairs.append(found + start * latents)
    pair = torch.cat(pairs)
    token_P = pair.div(latents, rounding_mode="floor")
    return torch.cat(values), pair - token_P * latents, token_P


def tokens_per_chunk(x_ND: Tensor, latents: int) -> int:
    """Return the number of tokens per chunk of pre-activations."""
    return max(16, CHUNK_BYTES // (latents * x_ND.element_size())) if x_ND.device.type == "cpu" else CHUNK_TOKENS


def topk_two_stage(pre_NF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Compute ``torch.topk`` in two stages: the k groups with the largest maxima contain the k largest entries.

    Group g of G contains columns g, g + G, g + 2G, …; columns after the last full row of groups are always candidates.
    The values are exact. Among equal entries any may be chosen, as in torch.topk.
    """
    latents = pre_NF.shape[1]
    size = group_size(latents, k)
    if size == 1:
        return torch.topk(pre_NF, k, dim=1, sorted=False)
    groups = latents // size
    rest = latents - groups * size
    grid = pre_NF[:, : groups * size].unflatten(1, (size, groups))
    best_groups = grid.amax(dim=1).topk(k, dim=1, sorted=False).indices
    candidates = grid.gather(2, best_groups.unsqueeze(1).expand(-1, size, -1)).flatten(1)
    if rest:
        candidates = torch.cat([candidates, pre_NF[:, groups * size :]], dim=1)
    values, positions = candidates.topk(k, dim=1, sorted=False)
    indices = best_groups.gather(1, positions % k) + positions.div(k, rounding_mode="floor") * groups
    if rest:
        indices = torch.where(positions >= k * size, positions - k * size + groups * size, indices)
    return values, indices


def group_size(latents: int, k: int) -> int:
    """Return the columns per group of :func:`topk_two_stage`; 1 means a single stage.

    A size near the square root of F / k minimizes the work of both stages.
    """
    if latents < 16 * k:
        return 1
    return min(32, int(2 ** round(math.log2(math.sqrt(latents / k)))))


def decode(values_NK: Tensor, indices_NK: Tensor, W_FD: Tensor) -> Tensor:
    """Return Σ_k values · W[indices], (N, D) fp32; products run in the dtype of ``W_FD``."""
    out = embedding_bag(indices_NK, W_FD, per_sample_weights=values_NK.to(W_FD.dtype), mode="sum")
    return out.float()


def decode_ragged(values_P: Tensor, latent_P: Tensor, offsets: Tensor, W_FD: Tensor) -> Tensor:
    """Compute :func:`decode` for ragged codes with ``offsets`` (N + 1,)."""
    out = embedding_bag(
        latent_P, W_FD, offsets, per_sample_weights=values_P.to(W_FD.dtype), mode="sum", include_last_offset=True
    )
    return out.float()


def sampled_matmul(rows_ND: Tensor, indices_NK: Tensor, W_FD: Tensor) -> Tensor:
    """Return ``(rows Wᵀ)[indices]``, (N, K) fp32: the dot products of each token's row with its latents' rows of W."""
    tokens, k = indices_NK.shape
    offsets = torch.arange(0, tokens * k, k, device=rows_ND.device)
    token_ids = torch.arange(tokens, device=rows_ND.device).repeat_interleave(k)
    return multiply_pairs(rows_ND, token_ids, indices_NK.reshape(-1), offsets, W_FD).view(tokens, k)


def multiply_pairs(rows_ND: Tensor, token_P: Tensor, latent_P: Tensor, offsets_N: Tensor, W_FD: Tensor) -> Tensor:
    """Return the dot products of rows ``token`` of ``rows_ND`` and rows ``latent`` of ``W_FD``, (P,) fp32.

    The pairs are sorted by token; those of token n begin at ``offsets[n]``.
    """
    # The backward of embedding_bag with respect to its weights computes this product without gathering rows.
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows_ND, W_FD, latent_P, offsets_N, token_P, EMBEDDING_BAG_SUM, -1
    ).float()


def sampled_matmul_dense(rows_ND: Tensor, indices_NK: Tensor, W_FD: Tensor) -> Tensor:
    """Compute :func:`sampled_matmul` from dense products in chunks, which is faster if k is not small relative to F."""
    rows = tokens_per_chunk(rows_ND, len(W_FD))
    parts = zip(rows_ND.split(rows), indices_NK.split(rows), strict=True)
    return torch.cat([(part @ W_FD.T).gather(1, indices) for part, indices in parts]).float()


def sort_pairs(indices: Tensor, latents: int, token_P: Tensor | None = None) -> SparsePairs:
    """Sort the pairs of a code by latent: ``indices`` (N, K), or ``indices`` (P,) with the token of each pair."""
    flat = indices.reshape(-1)
    order = torch.argsort(flat, stable=True)
    starts = count_offsets(flat, latents)
    tokens = order.div(indices.shape[1], rounding_mode="floor") if token_P is None else token_P[order]
    return SparsePairs(starts, order, tokens)


def count_offsets(index_P: Tensor, size: int) -> Tensor:
    """Return where the entries of each index below ``size`` begin if they are sorted by index, (size + 1,) int64."""
    offsets = index_P.new_zeros(size + 1)
    # bincount would synchronize with a GPU to read the largest index.
    return offsets.scatter_add_(0, index_P + 1, torch.ones_like(index_P)).cumsum_(0)


def next_power_of_2(number: int) -> int:
    """Return the smallest power of two that is at least ``number``, and at least 1."""
    return 1 << max(number - 1, 0).bit_length()
