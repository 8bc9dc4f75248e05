"""Search for the largest pre-activations of groups of tokens by the C++ kernels."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from saetrain.ops.native.bindings import GroupSelection, load_library
from saetrain.ops.selection import select_largest
from saetrain.types import TokenGroups

BLOCK_TOKENS = 64
"""Most tokens of a block, after which superfluous candidates are dropped."""
MAX_BLOCK_PAIRS = 1 << 22
"""Most pre-activations of a block."""
BOUND_SHARE = 0.9
"""Only pre-activations above this share of the threshold are candidates at first."""


class GroupSearch:
    """Search for the largest positive pre-activations of each group of tokens, in micro-batches of ``tokens``.

    ``values`` fp32, ``indices`` int32 and ``offsets`` (N + 1,) int64 are the ragged codes that it finds, in the order
    of the tokens, then of the latents; there are at most ``max_pairs``. ``wanted``: pairs to find in each group.
    """

    def __init__(self, tokens: int, latents: int, n_groups: int, wanted: int) -> None:
        self._latents, self._wanted = latents, wanted
        self._block = max(torch.get_num_threads(), min(BLOCK_TOKENS, MAX_BLOCK_PAIRS // latents))
        self.max_pairs = n_groups * wanted
        size = self.max_pairs + wanted + self._block * latents
        self.values, self.indices = torch.empty(size), torch.empty(size, dtype=torch.int32)
        self._keys = torch.empty(size, dtype=torch.int32)
        self.offsets = torch.zeros(tokens + 1, dtype=torch.long)

    def run(
        self,
        x_ND: Tensor,
        W_enc_FD: Tensor,
        b_enc_F: Tensor,
        pre_CF: Tensor,
        groups: TokenGroups,
        threshold: float,
    ) -> list[float]:
        """Find the codes of ``x W_encᵀ + b_enc``; return the smallest kept value of each group, NaN if any is NaN.

        The rows are in the sample order. ``pre_CF`` is a buffer for the pre-activations of C tokens.
        ``threshold``: about the smallest value of earlier groups; if it is much too high, the products run twice.
        """
        smallest, start, used = [], 0, 0
        for size in groups.group_N.bincount(minlength=groups.n_groups).tolist():
            rows, counts = slice(start, start + size), self.offsets[start + 1 : start + 1 + size]
            bound = BOUND_SHARE * threshold
            found = self._collect(x_ND[rows], W_enc_FD, b_enc_F, pre_CF, counts, used, bound)
            total = torch.tensor(found.total)
            groups.sum_over_ranks(total)
            if int(total) < self._wanted and bound > 0:
                found = self._collect(x_ND[rows], W_enc_FD, b_enc_F, pre_CF, counts, used, 0.0)
            if groups.is_shared:
                smallest_here = self._prune_with_ranks(found, counts, used, groups, groups.position_N[rows])
            else:
                smallest_here = self._prune(found, used)
            smallest.append(math.nan if found.has_nan else smallest_here)
            counts.copy_(counts.cumsum(0).add_(used))
            start, used = start + size, used + found.total
        return smallest

    def _collect(
        self,
        rows_GD: Tensor,
        W_enc_FD: Tensor,
        b_enc_F: Tensor,
        pre_CF: Tensor,
        counts_G: Tensor,
        used: int,
        bound: float,
    ) -> GroupSelection:
        """Collect the candidates of one group after the first ``used`` pairs."""
        found = GroupSelection(
            F=self._latents,
            wanted=self._wanted,
            block=self._block,
            threads=torch.get_num_threads(),
            bound=max(bound, torch.finfo(torch.float32).tiny),
            values=self.values[used:].data_ptr(),
            indices=self.indices[used:].data_ptr(),
            counts=counts_G.data_ptr(),
            keys=self._keys.data_ptr(),
        )
        library, is_bf16 = load_library(), rows_GD.dtype == torch.bfloat16
        collect = library.saetrain_collect_bf16 if is_bf16 else library.saetrain_collect_f32
        for chunk in rows_GD.split(len(pre_CF)):
            out = torch.mm(chunk, W_enc_FD.T, out=pre_CF[: len(chunk)])
            collect(ctypes.byref(found), out.data_ptr(), b_enc_F.data_ptr(), len(chunk))
        return found

    def _prune(self, found: GroupSelection, used: int) -> float:
        """Keep the wanted candidates, of equal ones the first; return the smallest, or 0 if there are too few."""
        pointer, library = ctypes.byref(found), load_library()
        if found.total < self._wanted:
            return 0.0
        least = library.saetrain_smallest_wanted(pointer)
        library.saetrain_prune_group(pointer, least, self._wanted - library.saetrain_count_above(pointer, least))
        # The search returns a bound that only the wanted candidates reach, which may be below all of them.
        return float(self.values[used : used + found.total].min())

    def _prune_with_ranks(
        self, found: GroupSelection, counts_G: Tensor, used: int, groups: TokenGroups, position_G: Tensor
    ) -> float:
        """Keep the candidates that are among the wanted ones of all ranks; return the smallest over all ranks."""
        values, indices = self.values[used : used + found.total], self.indices[used : used + found.total]
        row_P = torch.arange(len(counts_G)).repeat_interleave(counts_G)
        order_P = position_G[row_P] % groups.group_tokens * self._latents + indices
        selection = select_largest(
            values,
            torch.zeros_like(order_P),
            order_P,
            torch.tensor([self._wanted]),
            groups.group_tokens * self._latents,
            groups.sum_over_ranks,
        )
        kept = selection.mask_P
        counts_G.zero_().scatter_add_(0, row_P[kept], torch.ones_like(row_P[kept]))
        found.total = int(kept.sum())
        values[: found.total], indices[: found.total] = values[kept], indices[kept]
        return float(selection.smallest_G)
