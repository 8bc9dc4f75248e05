"""Search in Triton: the k largest pre-activations of each token, exactly, in two stages.

N tokens, F latents, K active. Nothing here waits for the device or asks it for a size.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _key(value):
    """Unsigned integers in the order of the floats; above 0 for every float."""
    bits = value.to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _value(key):
    """The floats again."""
    bits = tl.where(key >= 0x80000000, key & 0x7FFFFFFF, key ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _row_keys(pre, bias, row, columns, F):
    """Keys of the row's pre-activations in these columns, 0 behind the last."""
    inside = columns < F
    value = tl.load(pre + row * F + columns, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + columns, mask=inside, other=0.0)
    return tl.where(inside, _key(value), 0)


@triton.jit
def _kth(keys, K: tl.constexpr):
    """The K-th largest of a block of keys, bit by bit from the top."""
    least = tl.zeros((), tl.uint32)
    for bit in range(32):
        higher = least | (tl.full((), 0x80000000, tl.uint32) >> bit)
        count = tl.sum((keys >= higher).to(tl.int32), axis=0)
        least = tl.where(count >= K, higher, least)
    return least


@triton.jit
def _kth_of_row(pre, bias, row, F, K: tl.constexpr, BLOCK: tl.constexpr):
    """The same over a whole row, read once for each bit."""
    least = tl.zeros((), tl.uint32)
    for bit in range(32):
        higher = least | (tl.full((), 0x80000000, tl.uint32) >> bit)
        count = tl.zeros((), tl.int32)
        for at in range(0, F, BLOCK):
            keys = _row_keys(pre, bias, row, at + tl.arange(0, BLOCK), F)
            count += tl.sum((keys >= higher).to(tl.int32), axis=0)
        least = tl.where(count >= K, higher, least)
    return least


@triton.jit
def _hand_out(keys, indices, bound, room, placed, values_out, indices_out, K: tl.constexpr):
    """Write what exceeds ``bound`` and the first ``room`` of its equals behind ``placed``; gives how many of each."""
    equal = keys == bound
    take = (keys > bound) | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= room))
    place = placed + tl.cumsum(take.to(tl.int32), axis=0) - 1
    fits = take & (place < K)
    tl.store(values_out + place, tl.maximum(_value(keys), 0.0, propagate_nan=tl.PropagateNan.ALL), mask=fits)
    tl.store(indices_out + place, indices, mask=fits)
    return tl.sum(equal.to(tl.int32), axis=0), tl.sum(take.to(tl.int32), axis=0)


@triton.jit
def select(
    pre,  # (n, F) in the products' format
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
    """The K-th largest of GROUPS maxima bounds the K-th largest of all from below: only what reaches it is searched."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    maxima = tl.zeros((GROUPS,), tl.uint32)
    for at in range(0, F, GROUPS):
        maxima = tl.maximum(maxima, _row_keys(pre, bias, row, at + group, F))
    bound = _kth(maxima, K)
    found = tl.zeros((), tl.int32)
    for at in range(0, F, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        keys = _row_keys(pre, bias, row, columns, F)
        hit = keys >= bound
        place = found + tl.cumsum(hit.to(tl.int32), axis=0) - 1
        kept = hit & (place < CAPACITY)
        tl.store(candidate_keys + row * CAPACITY + place, keys, mask=kept)
        tl.store(candidates + row * CAPACITY + place, columns, mask=kept)
        found += tl.sum(hit.to(tl.int32), axis=0)
    # What other threads of the program have stored is read below.
    tl.debug_barrier()
    if found <= CAPACITY:
        at_candidate = tl.arange(0, CAPACITY)
        kept = at_candidate < found
        keys = tl.load(candidate_keys + row * CAPACITY + at_candidate, mask=kept, other=0)
        column = tl.load(candidates + row * CAPACITY + at_candidate, mask=kept, other=0)
        bound = _kth(keys, K)
        room = K - tl.sum((keys > bound).to(tl.int32), axis=0)
        _hand_out(keys, column, bound, room, 0, values + row * K, indices + row * K, K)
    else:
        bound = _kth_of_row(pre, bias, row, F, K, BLOCK)
        above = tl.zeros((), tl.int32)
        for at in range(0, F, BLOCK):
            keys = _row_keys(pre, bias, row, at + tl.arange(0, BLOCK), F)
            above += tl.sum((keys > bound).to(tl.int32), axis=0)
        room = K - above
        placed = tl.zeros((), tl.int32)
        for at in range(0, F, BLOCK):
            columns = at + tl.arange(0, BLOCK)
            keys = _row_keys(pre, bias, row, columns, F)
            equals, taken = _hand_out(keys, columns, bound, room, placed, values + row * K, indices + row * K, K)
            room = tl.maximum(room - equals, 0)
            placed += taken
