"""The TopK step's kernels in Triton: decode, and the update of each latent.

N tokens, D width, F latents, K active. Encoder and decoder are (F, D), one latent after the other, in fp32, with
optional bf16 copies for the products. No atomics: sums over tokens run in a fixed order within a latent, so that the
same inputs give the same bits. Nothing here waits for the device or asks it for a size.
"""

from __future__ import annotations

import subprocess

import triton
import triton.language as tl

BUILD_ERRORS = (triton.TritonError, RuntimeError, ValueError, OSError, subprocess.SubprocessError)
"""What Triton raises where a kernel can't be compiled, loaded or launched; a GPU that fails raises some of it too."""


@triton.jit
def _half(value):
    """In bf16, rounded to nearest even as torch does: the interpreter would cut off."""
    bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
    bits = tl.where(value == value, bits + 0x7FFF + ((bits >> 16) & 1), bits)
    return ((bits >> 16) << 16).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def reconstruct(
    x,  # (N, D) fp32, less the decoder's bias
    W_dec,  # (F, D) in the products' format
    values,  # (N, K)
    indices,  # (N, K) int32
    scale,  # scalar: the loss is scale / 2 times the squared residual
    residual,  # (N, D) fp32 out
    residual_copy,  # (N, D) out, in the products' format
    slopes,  # (N, K) out: the loss' gradient by each pre-activation
    norms,  # (N,) out: the residual's
    D,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Decode, residual and the latents' gradients of one token."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    decoded = tl.zeros((BLOCK_D,), tl.float32)
    for at in range(0, K, BLOCK_K):
        active = at + tl.arange(0, BLOCK_K)
        mask = active < K
        value = tl.load(values + token * K + active, mask=mask, other=0.0)
        latent = tl.load(indices + token * K + active, mask=mask, other=0).to(tl.int64)
        rows = tl.load(W_dec + latent[:, None] * D + d[None, :], mask=mask[:, None] & inside[None, :], other=0.0)
        decoded += tl.sum(value[:, None] * rows.to(tl.float32), axis=0)
    left = tl.where(inside, tl.load(x + token * D + d, mask=inside, other=0.0) - decoded, 0.0)
    tl.store(residual + token * D + d, left, mask=inside)
    if residual_copy.dtype.element_ty == tl.bfloat16:
        tl.store(residual_copy + token * D + d, _half(left), mask=inside)
    tl.store(norms + token, tl.sqrt(tl.sum(left * left, axis=0)))
    factor = -tl.load(scale)
    for at in range(0, K, BLOCK_K):
        active = at + tl.arange(0, BLOCK_K)
        mask = active < K
        value = tl.load(values + token * K + active, mask=mask, other=0.0)
        latent = tl.load(indices + token * K + active, mask=mask, other=0).to(tl.int64)
        rows = tl.load(W_dec + latent[:, None] * D + d[None, :], mask=mask[:, None] & inside[None, :], other=0.0)
        slope = factor * tl.sum(rows.to(tl.float32) * left[None, :], axis=1)
        tl.store(slopes + token * K + active, tl.where(value > 0, slope, 0.0), mask=mask)


@triton.jit
def bound_norms(
    starts,  # (F + 1,) int64: where a latent's pairs begin
    pair_token,  # (P,) int32
    pair_value,  # (P,)
    pair_slope,  # (P,)
    x_norms,  # (N,)
    residual_norms,  # (N,)
    scale,
    bias,  # (F,) out: the gradient of b_enc
    squares,  # (F,) out: at least the squared norm of the latent's gradients
    BLOCK: tl.constexpr,
):
    """A sum of rows is no longer than the sum of their lengths, which needs no row."""
    latent = tl.program_id(0)
    first = tl.load(starts + latent)
    stop = tl.load(starts + latent + 1)
    dec = tl.zeros((BLOCK,), tl.float32)
    enc = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for at in range(first, stop, BLOCK):
        pair = at + tl.arange(0, BLOCK)
        mask = pair < stop
        token = tl.load(pair_token + pair, mask=mask, other=0)
        slope = tl.load(pair_slope + pair, mask=mask, other=0.0)
        dec += tl.load(pair_value + pair, mask=mask, other=0.0) * tl.load(residual_norms + token, mask=mask, other=0.0)
        enc += tl.abs(slope) * tl.load(x_norms + token, mask=mask, other=0.0)
        total += slope
    scaled = tl.load(scale) * tl.sum(dec, axis=0)
    length = tl.sum(enc, axis=0)
    gradient = tl.sum(total, axis=0)
    tl.store(bias + latent, gradient)
    tl.store(squares + latent, scaled * scaled + length * length + gradient * gradient)


@triton.jit
def _rows_of(
    first,
    stop,
    pair_token,
    pair_value,
    pair_slope,
    x,
    residual,
    factor,
    D,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Gradient rows (encoder, decoder) of pairs first … stop, in their order."""
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    enc = tl.zeros((BLOCK_D,), tl.float32)
    dec = tl.zeros((BLOCK_D,), tl.float32)
    for at in range(first, stop, BLOCK_P):
        pair = at + tl.arange(0, BLOCK_P)
        mask = pair < stop
        token = tl.load(pair_token + pair, mask=mask, other=0).to(tl.int64)
        slope = tl.load(pair_slope + pair, mask=mask, other=0.0)
        value = factor * tl.load(pair_value + pair, mask=mask, other=0.0)
        place = token[:, None] * D + d[None, :]
        here = mask[:, None] & inside[None, :]
        enc += tl.sum(slope[:, None] * tl.load(x + place, mask=here, other=0.0).to(tl.float32), axis=0)
        dec += tl.sum(value[:, None] * tl.load(residual + place, mask=here, other=0.0).to(tl.float32), axis=0)
    return enc, dec


@triton.jit
def partial(
    segment_latent,  # (S,) int32: whose segment this is; -1 where there is none
    segment_first,  # (S,) int64: its first pair
    starts,
    pair_token,
    pair_value,
    pair_slope,
    x,  # (N, D) what the encoder multiplies, in the products' format
    residual,  # (N, D) in the products' format
    scale,
    part_enc,  # (S, D) out
    part_dec,  # (S, D) out
    D,
    SEGMENT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Gradient rows of a segment of the pairs of a latent that fires often: one program alone would take too long."""
    segment = tl.program_id(0).to(tl.int64)
    latent = tl.load(segment_latent + segment)
    if latent >= 0:
        first = tl.load(segment_first + segment)
        stop = tl.minimum(first + SEGMENT, tl.load(starts + latent + 1))
        factor = -tl.load(scale)
        enc, dec = _rows_of(first, stop, pair_token, pair_value, pair_slope, x, residual, factor, D, BLOCK_D, BLOCK_P)
        d = tl.arange(0, BLOCK_D)
        tl.store(part_enc + segment * D + d, enc, mask=d < D)
        tl.store(part_dec + segment * D + d, dec, mask=d < D)


@triton.jit
def _gradient(
    latent, starts, pair_token, pair_value, pair_slope, segments, part_enc, part_dec, x, residual, scale,
    extra_row, extra_enc, extra_dec, D, EXTRA: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Both gradient rows of a latent, from its pairs or from the parts of its segments."""
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    first = tl.load(starts + latent)
    stop = tl.load(starts + latent + 1)
    part = tl.load(segments + latent)
    last = tl.load(segments + latent + 1)
    # No pairs are left to the loop where there are parts.
    stop = tl.where(last > part, first, stop)
    enc, dec = _rows_of(
        first, stop, pair_token, pair_value, pair_slope, x, residual, -tl.load(scale), D, BLOCK_D, BLOCK_P
    )
    for number in range(part, last):
        enc += tl.load(part_enc + number * D + d, mask=inside, other=0.0)
        dec += tl.load(part_dec + number * D + d, mask=inside, other=0.0)
    if EXTRA:
        row = tl.load(extra_row + latent).to(tl.int64)
        has = inside & (d * 0 + row >= 0)
        enc += tl.load(extra_enc + row * D + d, mask=has, other=0.0)
        dec += tl.load(extra_dec + row * D + d, mask=has, other=0.0)
    return enc, dec


@triton.jit
def _adam(m, v, gradient, root, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr):
    """New moments and the step at rate 1, before the first correction."""
    m += (1 - BETA1) * (gradient - m)
    v = BETA2 * v + (1 - BETA2) * gradient * gradient
    return m, v, m / (tl.sqrt(v) * root + EPS)


MEASURE = tl.constexpr(0)
STORE = tl.constexpr(1)
ADD = tl.constexpr(2)
UPDATE = tl.constexpr(3)


@triton.jit
def latents(
    gate,  # scalar int32: nothing is done where it is 0
    starts, pair_token, pair_value, pair_slope,
    segments,  # (F + 1,) int64: where a latent's parts begin; it has none where one program sums its pairs
    part_enc, part_dec,  # (S, D)
    x, residual,  # (N, D) in the products' format
    scale,
    extra_row,  # (F,) int32 row of further gradients (AuxK), or -1
    extra_enc, extra_dec,
    bias,  # (F,) the gradient of b_enc, the further ones in it
    grad_enc, grad_dec,  # (F, D) in memory: written by STORE and ADD, read with STORED
    W_enc, W_dec, b_enc, half_enc, half_dec,
    m_enc, v_enc, m_dec, v_dec, m_b, v_b,
    squares,  # (F,) out: of the projected gradient
    rates,  # (4,): the decoder's, the encoder's, 1 - decay, 1 / root of the second correction
    clip,  # scalar that gradients are multiplied with
    D,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr,
    MODE: tl.constexpr, STORED: tl.constexpr, EXTRA: tl.constexpr, HALF: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Both gradient rows of a latent, then what the mode asks for: their norm, to keep them, or the whole update."""
    if tl.load(gate) == 0:
        return
    latent = tl.program_id(0).to(tl.int64)
    b = tl.load(bias + latent)
    # A step on which a latent does not fire leaves it alone, its moments too.
    if (MODE == MEASURE or MODE == UPDATE) and b == 0:  # noqa: SIM109
        tl.store(squares + latent, 0.0)
        return
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    at = latent * D + d
    if STORED:
        enc = tl.load(grad_enc + at, mask=inside, other=0.0)
        dec = tl.load(grad_dec + at, mask=inside, other=0.0)
    else:
        enc, dec = _gradient(
            latent, starts, pair_token, pair_value, pair_slope, segments, part_enc, part_dec, x, residual, scale,
            extra_row, extra_enc, extra_dec, D, EXTRA, BLOCK_D, BLOCK_P,
        )  # fmt: skip
    # Triton's compiler knows no `in`.
    if MODE == STORE or MODE == ADD:  # noqa: SIM109
        if MODE == ADD:
            enc += tl.load(grad_enc + at, mask=inside, other=0.0)
            dec += tl.load(grad_dec + at, mask=inside, other=0.0)
        tl.store(grad_enc + at, enc, mask=inside)
        tl.store(grad_dec + at, dec, mask=inside)
    else:
        w_dec = tl.load(W_dec + at, mask=inside, other=0.0)
        dec -= tl.sum(dec * w_dec, axis=0) * w_dec
        tl.store(squares + latent, tl.sum(enc * enc, axis=0) + tl.sum(dec * dec, axis=0) + b * b)
        if MODE == UPDATE:
            _update(
                latent, at, inside, enc, dec, b, w_dec, W_enc, W_dec, b_enc, half_enc, half_dec,
                m_enc, v_enc, m_dec, v_dec, m_b, v_b, rates, tl.load(clip), BETA1, BETA2, EPS, HALF,
            )  # fmt: skip


@triton.jit
def _update(
    latent, at, inside, enc, dec, b, w_dec, W_enc, W_dec, b_enc, half_enc, half_dec,
    m_enc, v_enc, m_dec, v_dec, m_b, v_b, rates, clip,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Adam over one latent, and its decoder row back to unit norm."""
    rate, encoder_rate, keep, root = tl.load(rates), tl.load(rates + 1), tl.load(rates + 2), tl.load(rates + 3)
    m = tl.load(m_dec + at, mask=inside, other=0.0)
    v = tl.load(v_dec + at, mask=inside, other=0.0)
    m, v, move = _adam(m, v, clip * dec, root, BETA1, BETA2, EPS)
    w_dec = tl.where(inside, w_dec - rate * move, 0.0)
    w_dec /= tl.maximum(tl.sqrt(tl.sum(w_dec * w_dec, axis=0)), 1.17549435e-38)
    # Only behind the sum, to which warps with a copy of the row may come late and must find the old moments.
    tl.store(m_dec + at, m, mask=inside)
    tl.store(v_dec + at, v, mask=inside)
    tl.store(W_dec + at, w_dec, mask=inside)
    m = tl.load(m_enc + at, mask=inside, other=0.0)
    v = tl.load(v_enc + at, mask=inside, other=0.0)
    m, v, move = _adam(m, v, clip * enc, root, BETA1, BETA2, EPS)
    tl.store(m_enc + at, m, mask=inside)
    tl.store(v_enc + at, v, mask=inside)
    w_enc = keep * tl.load(W_enc + at, mask=inside, other=0.0) - encoder_rate * move
    tl.store(W_enc + at, w_enc, mask=inside)
    if HALF:
        tl.store(half_dec + at, _half(w_dec), mask=inside)
        tl.store(half_enc + at, _half(w_enc), mask=inside)
    m, v, move = _adam(tl.load(m_b + latent), tl.load(v_b + latent), clip * b, root, BETA1, BETA2, EPS)
    tl.store(m_b + latent, m)
    tl.store(v_b + latent, v)
    tl.store(b_enc + latent, tl.load(b_enc + latent) - encoder_rate * move)
