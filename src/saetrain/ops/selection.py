"""The largest entries of groups that may be spread over ranks: a radix search with all-reduced histograms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

RADIX_BITS = 11
"""Bits per round of the search; a positive float32 has 31 bits, so three rounds find it."""
FLOAT_BITS = 31


@dataclass(frozen=True)
class Selection:
    """``mask_P`` (P,) bool: the selected entries; ``smallest_G`` (G,) fp32: the smallest selected entry of each group.

    ``smallest_G`` is 0 for a group with fewer positive entries than wanted.
    """

    mask_P: Tensor
    smallest_G: Tensor


def select_largest(
    values_P: Tensor,
    group_P: Tensor,
    order_P: Tensor,
    wanted_G: Tensor,
    max_order: int,
    sum_over_ranks: Callable[[Tensor], object] = lambda tensor: None,
) -> Selection:
    """Select the ``wanted_G`` (G,) int64 largest of the positive entries ``values_P`` (P,) fp32 of each of G groups.

    ``group_P`` (P,) int64 is the group of each entry. Among equal entries, those with the smallest ``order_P`` (P,)
    int64 are selected, which is unique within a group and below ``max_order``. ``sum_over_ranks`` adds an int64 tensor
    in place over the ranks that hold the other entries of the groups; ``wanted_G`` is the same on all of them.
    """
    key_P = values_P.contiguous().view(torch.int32).long()
    found = _find_nth_largest(key_P, group_P, wanted_G, FLOAT_BITS, sum_over_ranks)
    smallest_G = torch.where(found.is_complete_G, found.key_G.int().view(torch.float32), 0.0)
    limit_P = found.key_G[group_P]
    mask_P = key_P >= limit_P
    if bool((found.n_equal_G > found.n_kept_G).any()):
        equal = (key_P == limit_P).nonzero().squeeze(1)
        rank_P = max_order - order_P[equal]
        bits = max_order.bit_length()
        ties = _find_nth_largest(rank_P, group_P[equal], found.n_kept_G, bits, sum_over_ranks)
        mask_P[equal] = rank_P >= ties.key_G[group_P[equal]]
    return Selection(mask_P & (wanted_G[group_P] > 0), smallest_G)


@dataclass(frozen=True)
class _NthLargest:
    """``key_G``: the n-th largest key, or the smallest if there are fewer; ``is_complete_G``: there are n keys.

    ``n_equal_G``: number of keys equal to it; ``n_kept_G``: how many of these are among the n largest.
    """

    key_G: Tensor
    is_complete_G: Tensor
    n_equal_G: Tensor
    n_kept_G: Tensor


def _find_nth_largest(
    key_P: Tensor, group_P: Tensor, n_G: Tensor, bits: int, sum_over_ranks: Callable[[Tensor], object]
) -> _NthLargest:
    """Find the n-th largest key below 2^bits of each group, from its most significant digit on."""
    n_bins, n_groups = 1 << RADIX_BITS, len(n_G)
    prefix_G, rest_G, is_complete_G = torch.zeros_like(n_G), n_G.clamp_min(1), torch.ones_like(n_G, dtype=torch.bool)
    n_equal_G = torch.zeros_like(n_G)
    rounds = -(-bits // RADIX_BITS)
    for number in reversed(range(rounds)):
        shift = number * RADIX_BITS
        if number < rounds - 1:
            matching = (key_P >> (shift + RADIX_BITS)) == prefix_G[group_P]
            key_P, group_P = key_P[matching], group_P[matching]
        histogram = n_G.new_zeros(n_groups * n_bins)
        bin_P = group_P * n_bins + ((key_P >> shift) & (n_bins - 1))
        histogram.scatter_add_(0, bin_P, torch.ones_like(bin_P))
        sum_over_ranks(histogram)
        # Number of keys whose digit is at least d.
        at_least = histogram.view(n_groups, n_bins).flip(1).cumsum(1).flip(1)
        if number == rounds - 1:
            is_complete_G = at_least[:, 0] >= rest_G
            rest_G = torch.minimum(rest_G, at_least[:, 0]).clamp_min(1)
        digit_G = ((at_least >= rest_G.unsqueeze(1)).sum(dim=1) - 1).clamp_min(0)
        n_equal_G = histogram.view(n_groups, n_bins).gather(1, digit_G.unsqueeze(1)).squeeze(1)
        rest_G = rest_G - (at_least.gather(1, digit_G.unsqueeze(1)).squeeze(1) - n_equal_G)
        prefix_G = (prefix_G << RADIX_BITS) | digit_G
    return _NthLargest(prefix_G, is_complete_G, n_equal_G, rest_G)
