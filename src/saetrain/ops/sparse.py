"""The products of a TopK step in PyTorch, on any device: chunked search, sparse decode, gradients as sparse products.

``W`` matrices are (F, D), one latent after the other. Nothing of the size N x F is kept, and no gradient of that size
is made. The reference of each is the plain product that its docstring names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

CHUNK_BYTES = 4 << 20
"""Pre-activations that are computed at once on a CPU, so that they are still in cache when the largest are searched."""
CHUNK_TOKENS = 8192
"""The same elsewhere, in tokens."""
EMBEDDING_BAG_SUM = 0
"""embedding_bag's mode."""


@dataclass(frozen=True)
class SparsePairs:
    """The active (token, latent) pairs of N tokens, one latent after the other, tokens in order.

    ``starts`` (F + 1,) int64; ``order`` (N·K,) int64 places in the flat code; ``tokens`` (N·K,) int64.
    """

    starts: Tensor
    order: Tensor
    tokens: Tensor

    def to_csr(self, values_NK: Tensor, n_tokens: int) -> Tensor:
        """The pairs' ``values_NK`` as a sparse matrix (F, N)."""
        size = (len(self.starts) - 1, n_tokens)
        values = values_NK.reshape(-1)[self.order]
        return torch.sparse_csr_tensor(self.starts, self.tokens, values, size, check_invariants=False)


def encode_topk(x_ND: Tensor, W_FD: Tensor, b_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values fp32, indices int64), both (N, k): ReLU of the k largest of ``x Wᵀ + b`` in each row.

    ``x_ND`` and ``W_FD`` in the products' dtype.
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


def tokens_per_chunk(x_ND: Tensor, latents: int) -> int:
    """Tokens whose products with all latents are held at once."""
    return max(16, CHUNK_BYTES // (latents * x_ND.element_size())) if x_ND.device.type == "cpu" else CHUNK_TOKENS


def topk_two_stage(pre_NF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``torch.topk`` in two stages: the k groups of the largest maxima hold the k largest entries.

    Group g of G holds columns g, g + G, g + 2G, …; columns behind the last whole row of groups are looked at as they
    are. Exact in the values; among equals any may be chosen, as in torch.topk.
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
    """Columns in a group of :func:`topk_two_stage`: both stages are shortest near the root of F / k; 1 is one stage."""
    if latents < 16 * k:
        return 1
    return min(32, int(2 ** round(math.log2(math.sqrt(latents / k)))))


def decode(values_NK: Tensor, indices_NK: Tensor, W_FD: Tensor) -> Tensor:
    """Σ_k values · W[indices] in fp32, (N, D); the products' dtype is that of ``W_FD``."""
    out = embedding_bag(indices_NK, W_FD, per_sample_weights=values_NK.to(W_FD.dtype), mode="sum")
    return out.float()


def sampled_matmul(rows_ND: Tensor, indices_NK: Tensor, W_FD: Tensor) -> Tensor:
    """(N, K) fp32: the product of each token's row with its latents' rows of W, ``(rows Wᵀ)[indices]``."""
    tokens, k = indices_NK.shape
    offsets = torch.arange(0, tokens * k, k, device=rows_ND.device)
    token_ids = torch.arange(tokens, device=rows_ND.device).repeat_interleave(k)
    # The backward of embedding_bag by its weights is this product, and gathers no row into memory.
    product = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows_ND, W_FD, indices_NK.reshape(-1), offsets, token_ids, EMBEDDING_BAG_SUM, -1
    )
    return product.view(tokens, k).float()


def sampled_matmul_dense(rows_ND: Tensor, indices_NK: Tensor, W_FD: Tensor) -> Tensor:
    """The same by the whole product in chunks, which is faster where k is no small part of F."""
    rows = tokens_per_chunk(rows_ND, len(W_FD))
    parts = zip(rows_ND.split(rows), indices_NK.split(rows), strict=True)
    return torch.cat([(part @ W_FD.T).gather(1, indices) for part, indices in parts]).float()


def sort_pairs(indices_NK: Tensor, latents: int) -> SparsePairs:
    """The code's pairs by latent."""
    flat = indices_NK.reshape(-1)
    order = torch.argsort(flat, stable=True)
    starts = flat.new_zeros(latents + 1)
    # bincount would ask a GPU for the largest index and wait for the answer.
    starts.scatter_add_(0, flat + 1, torch.ones_like(flat)).cumsum_(0)
    return SparsePairs(starts, order, order.div(indices_NK.shape[1], rounding_mode="floor"))
