"""Relations between latents: the nearest decoder rows, and which latents fire together more often than by chance."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from saetrain.features.pairs import PairFile
from saetrain.ops.sparse import topk_two_stage

# These warnings are about sparse tensors being in beta.
warnings.filterwarnings("ignore", message="Sparse (CSR tensor support|invariant checks)")
NEIGHBOURS = 8
MIN_TOGETHER = 3
"""Tokens of the sample on which two latents must fire together."""
MAX_PRODUCTS, MAX_SAMPLE_PAIRS = 30_000_000, 4_000_000
"""Limits of the sample for co-firing: Σ L0² and Σ L0 over its tokens."""
BLOCK_ENTRIES = 1 << 23
"""Entries of a block of a matrix between latents (F, F), or between latents and tokens (F, V)."""


def find_neighbours(W_dec_FD: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return (latents, cosines), both (F, min(NEIGHBOURS, F - 1)): the nearest decoder rows, nearest first."""
    rows_FD = normalize(W_dec_FD, dim=1, eps=1e-30)
    n_latents, found = len(rows_FD), []
    for start in range(0, n_latents, block_rows(n_latents)):
        block = rows_FD[start : start + block_rows(n_latents)]
        cosines = block @ rows_FD.T
        own = torch.arange(len(block), device=block.device)
        cosines[own, own + start] = -torch.inf
        found.append(find_largest(cosines, min(NEIGHBOURS, n_latents - 1)))
    values, indices = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
    return indices.astype(np.int32), values


def block_rows(columns: int) -> int:
    """Return the rows of a block with BLOCK_ENTRIES entries."""
    return max(1, BLOCK_ENTRIES // columns)


def find_largest(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return (values, indices) of the ``count`` largest entries of each row, from the largest."""
    if count == 0:
        return matrix[:, :0], torch.zeros_like(matrix[:, :0], dtype=torch.long)
    values, indices = topk_two_stage(matrix, count)
    order = values.argsort(dim=1, descending=True)
    return values.gather(1, order), indices.gather(1, order)


def cosine_of_encoder(W_enc_DF: Tensor, W_dec_FD: Tensor) -> np.ndarray:
    """Return the cosine between each latent's column of the encoder and row of the decoder, (F,); nan if D differs."""
    if len(W_enc_DF) != W_dec_FD.shape[1]:
        return np.full(len(W_dec_FD), np.nan, dtype=np.float32)
    return torch.cosine_similarity(W_enc_DF.T, W_dec_FD, dim=1, eps=1e-30).cpu().numpy()


def find_cofiring(pairs: PairFile, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (latents, lift), both (F, min(NEIGHBOURS, F)), the latents that fire most with each latent; -1 is none.

    On a sample of T kept tokens, latents i and j fire n_i, n_j and n_ij times. They are ranked by n_ij / √(n_i n_j),
    and their lift is T n_ij / (n_i n_j). ``kept``: bool per row of the stream.
    """
    n_latents, total = len(pairs.counts), int(pairs.counts.sum())
    stride = max(1, -(-pairs.n_products // MAX_PRODUCTS), -(-total // MAX_SAMPLE_PAIRS))
    latent, token = pairs.sample_tokens(stride)
    tokens, row = np.unique(token, return_inverse=True)
    size = (max(len(tokens), 1), n_latents)
    index = torch.from_numpy(np.stack([row, latent]).astype(np.int64))
    fires_TF = torch.sparse_coo_tensor(index, torch.ones(len(latent)), size, check_invariants=False).coalesce()
    counts = torch.from_numpy(np.bincount(latent, minlength=n_latents)).float()
    sampled = int(np.count_nonzero(kept[::stride]))
    found = []
    for start in range(0, n_latents, block_rows(n_latents)):
        stop = min(start + block_rows(n_latents), n_latents)
        chosen = np.flatnonzero((latent >= start) & (latent < stop))
        index = torch.from_numpy(np.stack([latent[chosen] - start, row[chosen]]).astype(np.int64))
        block = torch.sparse_coo_tensor(index, torch.ones(len(chosen)), (stop - start, size[0]), check_invariants=False)
        together = torch.sparse.mm(block.coalesce(), fires_TF).to_dense()
        together[torch.arange(stop - start), torch.arange(start, stop)] = 0
        together.masked_fill_(together < MIN_TOGETHER, 0)
        score = together * counts.clamp_min(1).rsqrt()
        _, indices = find_largest(score, min(NEIGHBOURS, n_latents))
        common = together.gather(1, indices)
        lift = sampled * common / (counts[start:stop, None] * counts[indices]).clamp_min(1)
        found.append((torch.where(common > 0, indices, -1), lift))
    latents, lift = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
    return latents.astype(np.int32), lift
