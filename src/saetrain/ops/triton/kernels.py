"""Triton kernels of the TopK step (Gao et al., arXiv 2406.04093): decode, and the update of each latent.

N tokens, D width, F latents, K active latents per token. Encoder and decoder are (F, D) in fp32, one row per latent,
with optional bf16 copies for the products. There are no atomics: sums over tokens run in a fixed order within a latent,
so that the same inputs give the same bits. No kernel needs a size that only the device knows.
"""

from __future__ import annotations

import subprocess

import triton
import triton.language as tl

BUILD_ERRORS = (triton.TritonError, RuntimeError, ValueError, OSError, subprocess.SubprocessError)
"""Exceptions of Triton when it can't compile, load or launch a kernel; a failing GPU raises some of them too."""


@triton.jit
def _round_to_bf16(value):
    """Round to the nearest even bf16, as torch does; Triton's interpreter would truncate."""
    bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
    bits = tl.where(value == value, bits + 0x7FFF + ((bits >> 16) & 1), bits)
    return ((bits >> 16) << 16).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def compute_residuals_kernel(
    x,  # (N, D) fp32, minus the decoder bias
    W_dec,  # (F, D) in the dtype of the products
    values,  # (N, K)
    indices,  # (N, K) int32
    loss_scale,  # scalar: the loss is loss_scale / 2 times the squared residual
    residual,  # (N, D) fp32 out
    residual_copy,  # (N, D) out, in the dtype of the products
    grad_pre,  # (N, K) out: gradient of the loss with respect to the pre-activations
    residual_norms,  # (N,) out
    D,
    K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute reconstruction, residual and pre-activation gradients of one token."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    decoded = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, K, BLOCK_K):
        active = start + tl.arange(0, BLOCK_K)
        mask = active < K
        value = tl.load(values + token * K + active, mask=mask, other=0.0)
        latent = tl.load(indices + token * K + active, mask=mask, other=0).to(tl.int64)
        rows = tl.load(W_dec + latent[:, None] * D + d[None, :], mask=mask[:, None] & inside[None, :], other=0.0)
        decoded += tl.sum(value[:, None] * rows.to(tl.float32), axis=0)
    error = tl.where(inside, tl.load(x + token * D + d, mask=inside, other=0.0) - decoded, 0.0)
    tl.store(residual + token * D + d, error, mask=inside)
    if residual_copy.dtype.element_ty == tl.bfloat16:
        tl.store(residual_copy + token * D + d, _round_to_bf16(error), mask=inside)
    tl.store(residual_norms + token, tl.sqrt(tl.sum(error * error, axis=0)))
    factor = -tl.load(loss_scale)
    for start in range(0, K, BLOCK_K):
        active = start + tl.arange(0, BLOCK_K)
        mask = active < K
        value = tl.load(values + token * K + active, mask=mask, other=0.0)
        latent = tl.load(indices + token * K + active, mask=mask, other=0).to(tl.int64)
        rows = tl.load(W_dec + latent[:, None] * D + d[None, :], mask=mask[:, None] & inside[None, :], other=0.0)
        grad = factor * tl.sum(rows.to(tl.float32) * error[None, :], axis=1)
        tl.store(grad_pre + token * K + active, tl.where(value > 0, grad, 0.0), mask=mask)


@triton.jit
def bound_norms_kernel(
    starts,  # (F + 1,) int64: first pair of each latent
    pair_token,  # (P,) int32
    pair_value,  # (P,)
    pair_grad_pre,  # (P,)
    x_norms,  # (N,)
    residual_norms,  # (N,)
    loss_scale,
    grad_b_enc,  # (F,) out: the gradient of b_enc
    squared_bounds,  # (F,) out: upper bound of the squared norm of each latent's gradients
    BLOCK: tl.constexpr,
):
    """Bound the gradient norm of one latent by the sum of the norms of its rows, without reading the rows."""
    latent = tl.program_id(0)
    first = tl.load(starts + latent)
    stop = tl.load(starts + latent + 1)
    dec = tl.zeros((BLOCK,), tl.float32)
    enc = tl.zeros((BLOCK,), tl.float32)
    grad_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, stop, BLOCK):
        pair = start + tl.arange(0, BLOCK)
        mask = pair < stop
        token = tl.load(pair_token + pair, mask=mask, other=0)
        grad_pre = tl.load(pair_grad_pre + pair, mask=mask, other=0.0)
        dec += tl.load(pair_value + pair, mask=mask, other=0.0) * tl.load(residual_norms + token, mask=mask, other=0.0)
        enc += tl.abs(grad_pre) * tl.load(x_norms + token, mask=mask, other=0.0)
        grad_sum += grad_pre
    dec_bound = tl.load(loss_scale) * tl.sum(dec, axis=0)
    enc_bound = tl.sum(enc, axis=0)
    gradient = tl.sum(grad_sum, axis=0)
    tl.store(grad_b_enc + latent, gradient)
    tl.store(squared_bounds + latent, dec_bound * dec_bound + enc_bound * enc_bound + gradient * gradient)


@triton.jit
def _sum_gradient_rows(
    first,
    stop,
    pair_token,
    pair_value,
    pair_grad_pre,
    x,
    residual,
    factor,
    D,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Return the gradient rows (encoder, decoder) of pairs first … stop, summed in their order."""
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    enc = tl.zeros((BLOCK_D,), tl.float32)
    dec = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(first, stop, BLOCK_P):
        pair = start + tl.arange(0, BLOCK_P)
        mask = pair < stop
        token = tl.load(pair_token + pair, mask=mask, other=0).to(tl.int64)
        grad_pre = tl.load(pair_grad_pre + pair, mask=mask, other=0.0)
        value = factor * tl.load(pair_value + pair, mask=mask, other=0.0)
        offsets = token[:, None] * D + d[None, :]
        row_mask = mask[:, None] & inside[None, :]
        enc += tl.sum(grad_pre[:, None] * tl.load(x + offsets, mask=row_mask, other=0.0).to(tl.float32), axis=0)
        dec += tl.sum(value[:, None] * tl.load(residual + offsets, mask=row_mask, other=0.0).to(tl.float32), axis=0)
    return enc, dec


@triton.jit
def sum_segments_kernel(
    segment_latent,  # (S,) int32: latent of each segment, -1 for unused segments
    segment_first,  # (S,) int64: first pair of each segment
    starts,
    pair_token,
    pair_value,
    pair_grad_pre,
    x,  # (N, D) encoder input, in the dtype of the products
    residual,  # (N, D) in the dtype of the products
    loss_scale,
    segment_sum_enc,  # (S, D) out
    segment_sum_dec,  # (S, D) out
    D,
    SEGMENT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Sum the gradient rows of one segment of a latent's pairs; for frequent latents a single program would be slow."""
    segment = tl.program_id(0).to(tl.int64)
    latent = tl.load(segment_latent + segment)
    if latent >= 0:
        first = tl.load(segment_first + segment)
        stop = tl.minimum(first + SEGMENT, tl.load(starts + latent + 1))
        factor = -tl.load(loss_scale)
        enc, dec = _sum_gradient_rows(
            first, stop, pair_token, pair_value, pair_grad_pre, x, residual, factor, D, BLOCK_D, BLOCK_P
        )
        d = tl.arange(0, BLOCK_D)
        tl.store(segment_sum_enc + segment * D + d, enc, mask=d < D)
        tl.store(segment_sum_dec + segment * D + d, dec, mask=d < D)


@triton.jit
def _load_gradient_rows(
    latent, starts, pair_token, pair_value, pair_grad_pre,
    segment_starts, segment_sum_enc, segment_sum_dec, x, residual, loss_scale,
    extra_row, extra_enc, extra_dec, D, EXTRA: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Return both gradient rows of a latent, from its pairs or from the sums of its segments."""
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    first = tl.load(starts + latent)
    stop = tl.load(starts + latent + 1)
    first_segment = tl.load(segment_starts + latent)
    stop_segment = tl.load(segment_starts + latent + 1)
    # If the latent has segments, they cover all its pairs, so the loop below runs over none.
    stop = tl.where(stop_segment > first_segment, first, stop)
    enc, dec = _sum_gradient_rows(
        first, stop, pair_token, pair_value, pair_grad_pre, x, residual, -tl.load(loss_scale), D, BLOCK_D, BLOCK_P
    )
    for segment in range(first_segment, stop_segment):
        enc += tl.load(segment_sum_enc + segment * D + d, mask=inside, other=0.0)
        dec += tl.load(segment_sum_dec + segment * D + d, mask=inside, other=0.0)
    if EXTRA:
        row = tl.load(extra_row + latent).to(tl.int64)
        has_extra = inside & (d * 0 + row >= 0)
        enc += tl.load(extra_enc + row * D + d, mask=has_extra, other=0.0)
        dec += tl.load(extra_dec + row * D + d, mask=has_extra, other=0.0)
    return enc, dec


@triton.jit
def _compute_adam_step(
    m, v, gradient, inv_sqrt_correction, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr
):
    """Return the new moments and the step at learning rate 1, without the bias correction of the first moment."""
    m += (1 - BETA1) * (gradient - m)
    v = BETA2 * v + (1 - BETA2) * gradient * gradient
    return m, v, m / (tl.sqrt(v) * inv_sqrt_correction + EPS)


MEASURE = tl.constexpr(0)
STORE = tl.constexpr(1)
ADD = tl.constexpr(2)
UPDATE = tl.constexpr(3)
"""Modes of the latent pass."""


@triton.jit
def latent_pass_kernel(
    ok,  # scalar int32: 0 skips the kernel
    starts, pair_token, pair_value, pair_grad_pre,
    segment_starts,  # (F + 1,) int64: first segment of each latent; a latent with few pairs has none
    segment_sum_enc, segment_sum_dec,  # (S, D)
    x, residual,  # (N, D) in the dtype of the products
    loss_scale,
    extra_row,  # (F,) int32: row of each latent in the additional gradients (AuxK), or -1
    extra_enc, extra_dec,
    grad_b_enc,  # (F,) gradient of b_enc, including AuxK's
    grad_enc, grad_dec,  # (F, D): written by STORE and ADD, read if STORED
    W_enc, W_dec, b_enc, W_enc_bf16, W_dec_bf16,
    m_enc, v_enc, m_dec, v_dec, m_b, v_b,
    squared_norms,  # (F,) out: squared norms of the projected gradients
    rates,  # (4,): lr / correction1, encoder lr / correction1, 1 - encoder lr · decay, 1 / sqrt(correction2)
    clip,  # scalar factor of the gradients
    D,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr,
    MODE: tl.constexpr, STORED: tl.constexpr, EXTRA: tl.constexpr, BF16: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Compute both gradient rows of one latent, then measure, store, accumulate or apply them, depending on MODE."""
    if tl.load(ok) == 0:
        return
    latent = tl.program_id(0).to(tl.int64)
    b = tl.load(grad_b_enc + latent)
    # A latent that did not fire keeps its weights and moments.
    if (MODE == MEASURE or MODE == UPDATE) and b == 0:  # noqa: SIM109
        tl.store(squared_norms + latent, 0.0)
        return
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    offsets = latent * D + d
    if STORED:
        enc = tl.load(grad_enc + offsets, mask=inside, other=0.0)
        dec = tl.load(grad_dec + offsets, mask=inside, other=0.0)
    else:
        enc, dec = _load_gradient_rows(
            latent, starts, pair_token, pair_value, pair_grad_pre,
            segment_starts, segment_sum_enc, segment_sum_dec, x, residual, loss_scale,
            extra_row, extra_enc, extra_dec, D, EXTRA, BLOCK_D, BLOCK_P,
        )  # fmt: skip
    # Triton's compiler does not support `in`.
    if MODE == STORE or MODE == ADD:  # noqa: SIM109
        if MODE == ADD:
            enc += tl.load(grad_enc + offsets, mask=inside, other=0.0)
            dec += tl.load(grad_dec + offsets, mask=inside, other=0.0)
        tl.store(grad_enc + offsets, enc, mask=inside)
        tl.store(grad_dec + offsets, dec, mask=inside)
    else:
        w_dec = tl.load(W_dec + offsets, mask=inside, other=0.0)
        dec -= tl.sum(dec * w_dec, axis=0) * w_dec
        tl.store(squared_norms + latent, tl.sum(enc * enc, axis=0) + tl.sum(dec * dec, axis=0) + b * b)
        if MODE == UPDATE:
            _update_latent(
                latent, offsets, inside, enc, dec, b, w_dec, W_enc, W_dec, b_enc, W_enc_bf16, W_dec_bf16,
                m_enc, v_enc, m_dec, v_dec, m_b, v_b, rates, tl.load(clip), BETA1, BETA2, EPS, BF16,
            )  # fmt: skip


@triton.jit
def _update_latent(
    latent, offsets, inside, enc, dec, b, w_dec, W_enc, W_dec, b_enc, W_enc_bf16, W_dec_bf16,
    m_enc, v_enc, m_dec, v_dec, m_b, v_b, rates, clip,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """Apply Adam to the parameters of one latent, and rescale its decoder row to unit norm."""
    lr, encoder_lr, decay_factor, inv_sqrt_correction = (
        tl.load(rates),
        tl.load(rates + 1),
        tl.load(rates + 2),
        tl.load(rates + 3),
    )
    m = tl.load(m_dec + offsets, mask=inside, other=0.0)
    v = tl.load(v_dec + offsets, mask=inside, other=0.0)
    m, v, move = _compute_adam_step(m, v, clip * dec, inv_sqrt_correction, BETA1, BETA2, EPS)
    w_dec = tl.where(inside, w_dec - lr * move, 0.0)
    w_dec /= tl.maximum(tl.sqrt(tl.sum(w_dec * w_dec, axis=0)), 1.17549435e-38)
    # Store only after the sum above, because warps with a copy of the row may still have to read the old moments.
    tl.store(m_dec + offsets, m, mask=inside)
    tl.store(v_dec + offsets, v, mask=inside)
    tl.store(W_dec + offsets, w_dec, mask=inside)
    m = tl.load(m_enc + offsets, mask=inside, other=0.0)
    v = tl.load(v_enc + offsets, mask=inside, other=0.0)
    m, v, move = _compute_adam_step(m, v, clip * enc, inv_sqrt_correction, BETA1, BETA2, EPS)
    tl.store(m_enc + offsets, m, mask=inside)
    tl.store(v_enc + offsets, v, mask=inside)
    w_enc = decay_factor * tl.load(W_enc + offsets, mask=inside, other=0.0) - encoder_lr * move
    tl.store(W_enc + offsets, w_enc, mask=inside)
    if BF16:
        tl.store(W_dec_bf16 + offsets, _round_to_bf16(w_dec), mask=inside)
        tl.store(W_enc_bf16 + offsets, _round_to_bf16(w_enc), mask=inside)
    m, v, move = _compute_adam_step(
        tl.load(m_b + latent), tl.load(v_b + latent), clip * b, inv_sqrt_correction, BETA1, BETA2, EPS
    )
    tl.store(m_b + latent, m)
    tl.store(v_b + latent, v)
    tl.store(b_enc + latent, tl.load(b_enc + latent) - encoder_lr * move)
