"""Exact top-k of the pre-activations of each token in Triton, in two stages.

N tokens, F latents, K active latents per token. No kernel needs a size that only the device knows.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _float_to_key(value):
    """Convert floats to unsigned integers of the same order, all above 0."""
    bits = value.to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _key_to_float(key):
    """Convert keys of :func:`_float_to_key` back to floats."""
    bits = tl.where(key >= 0x80000000, key & 0x7FFFFFFF, key ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _load_row_keys(pre, bias, row, columns, F):
    """Return the keys of the row's pre-activations in these columns, 0 after the last column."""
    inside = columns < F
    value = tl.load(pre + row * F + columns, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + columns, mask=inside, other=0.0)
    return tl.where(inside, _float_to_key(value), 0)


@triton.jit
def _find_kth_key(keys, K: tl.constexpr):
    """Return the K-th largest of a block of keys, found bit by bit from the top."""
    kth = tl.zeros((), tl.uint32)
    for bit in range(32):
        higher = kth | (tl.full((), 0x80000000, tl.uint32) >> bit)
        count = tl.sum((keys >= higher).to(tl.int32), axis=0)
        kth = tl.where(count >= K, higher, kth)
    return kth


@triton.jit
def _find_kth_key_in_row(pre, bias, row, F, K: tl.constexpr, BLOCK: tl.constexpr):
    """Return the K-th largest key of a whole row, which is read once per bit."""
    kth = tl.zeros((), tl.uint32)
    for bit in range(32):
        higher = kth | (tl.full((), 0x80000000, tl.uint32) >> bit)
        count = tl.zeros((), tl.int32)
        for start in range(0, F, BLOCK):
            keys = _load_row_keys(pre, bias, row, start + tl.arange(0, BLOCK), F)
            count += tl.sum((keys >= higher).to(tl.int32), axis=0)
        kth = tl.where(count >= K, higher, kth)
    return kth


@triton.jit
def _store_selected(keys, indices, bound, ties_left, n_stored, values_out, indices_out, K: tl.constexpr):
    """Append the keys above ``bound`` and the first ``ties_left`` equal keys at ``n_stored``.

    Return the number of equal keys and the number of stored keys.
    """
    equal = keys == bound
    is_selected = (keys > bound) | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= ties_left))
    slots = n_stored + tl.cumsum(is_selected.to(tl.int32), axis=0) - 1
    fits = is_selected & (slots < K)
    tl.store(values_out + slots, tl.maximum(_key_to_float(keys), 0.0, propagate_nan=tl.PropagateNan.ALL), mask=fits)
    tl.store(indices_out + slots, indices, mask=fits)
    return tl.sum(equal.to(tl.int32), axis=0), tl.sum(is_selected.to(tl.int32), axis=0)


@triton.jit
def select_topk_kernel(
    pre,  # (n, F) in the dtype of the products
    bias,  # (F,)
    values,  # (n, K) out: ReLU of the K largest of pre + bias, in the order of their latents
    indices,  # (n, K) int32 out
    candidate_keys,  # (n, C) uint32
    candidates,  # (n, C) int32
    F,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Select the K largest entries of one row.

    The K-th largest of GROUPS maxima is a lower bound of the K-th largest of all, so only entries that reach it are
    searched. If more than CAPACITY entries reach it, the whole row is searched.
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    maxima = tl.zeros((GROUPS,), tl.uint32)
    for start in range(0, F, GROUPS):
        maxima = tl.maximum(maxima, _load_row_keys(pre, bias, row, start + group, F))
    bound = _find_kth_key(maxima, K)
    n_found = tl.zeros((), tl.int32)
    for start in range(0, F, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        keys = _load_row_keys(pre, bias, row, columns, F)
        hit = keys >= bound
        slots = n_found + tl.cumsum(hit.to(tl.int32), axis=0) - 1
        kept = hit & (slots < CAPACITY)
        tl.store(candidate_keys + row * CAPACITY + slots, keys, mask=kept)
        tl.store(candidates + row * CAPACITY + slots, columns, mask=kept)
        n_found += tl.sum(hit.to(tl.int32), axis=0)
    # The code below reads what other threads of the program have stored.
    tl.debug_barrier()
    if n_found <= CAPACITY:
        slot = tl.arange(0, CAPACITY)
        kept = slot < n_found
        keys = tl.load(candidate_keys + row * CAPACITY + slot, mask=kept, other=0)
        column = tl.load(candidates + row * CAPACITY + slot, mask=kept, other=0)
        bound = _find_kth_key(keys, K)
        ties_left = K - tl.sum((keys > bound).to(tl.int32), axis=0)
        _store_selected(keys, column, bound, ties_left, 0, values + row * K, indices + row * K, K)
    else:
        bound = _find_kth_key_in_row(pre, bias, row, F, K, BLOCK)
        n_above = tl.zeros((), tl.int32)
        for start in range(0, F, BLOCK):
            keys = _load_row_keys(pre, bias, row, start + tl.arange(0, BLOCK), F)
            n_above += tl.sum((keys > bound).to(tl.int32), axis=0)
        ties_left = K - n_above
        n_stored = tl.zeros((), tl.int32)
        for start in range(0, F, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            keys = _load_row_keys(pre, bias, row, columns, F)
            n_equal, n_taken = _store_selected(
                keys, columns, bound, ties_left, n_stored, values + row * K, indices + row * K, K
            )
            ties_left = tl.maximum(ties_left - n_equal, 0)
            n_stored += n_taken
