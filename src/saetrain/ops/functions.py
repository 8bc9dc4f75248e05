"""Sparse products as autograd functions, and the same products in PyTorch's own operations as their reference.

Products run in the dtype of ``torch.autocast`` if it is enabled, else in that of their inputs. Sums, codes and
gradients are fp32. No tensor of size N x F is stored if F is large relative to k.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from saetrain.ops import sparse
from saetrain.ops.auxk import compute_auxk_gradients
from saetrain.ops.cpu_features import DENSE_LIMIT, dense_limit
from saetrain.types import Codes

MAX_PLAIN_ENTRIES = 1 << 25
"""Pre-activations that exist at once where products are plain, as in inference."""

_is_plain: ContextVar[bool] = ContextVar("is_plain", default=False)
_spare_gradients: ContextVar[list[Tensor] | None] = ContextVar("spare_gradients", default=None)


@contextlib.contextmanager
def reuse_gradients(spare: list[Tensor]) -> Iterator[None]:
    """Write weight gradients of the block's products into tensors of ``spare``, which are removed from the list.

    Fresh memory is slow on a CPU, because the system clears every page at its first use.
    """
    token = _spare_gradients.set(spare)
    try:
        yield
    finally:
        _spare_gradients.reset(token)


@contextlib.contextmanager
def plain_products() -> Iterator[None]:
    """Use only PyTorch's own operations within the block: slow, but the reference of the fast products."""
    token = _is_plain.set(True)
    try:
        yield
    finally:
        _is_plain.reset(token)


def linear_topk(x_ND: Tensor, W_FD: Tensor, b_F: Tensor, k: int, centre_D: Tensor | None = None) -> Codes:
    """Return ReLU of the k largest entries of each row of ``(x - centre) Wᵀ + b`` as sparse codes.

    A row with fewer than k positive entries contains zeros, whose indices have no meaning. Differentiable in ``W_FD``,
    ``b_F`` and ``centre_D``; not in ``x_ND``, so that no gradient of its size is computed.
    """
    if uses_plain_products():
        found = [torch.topk(pre_CF, k, dim=1, sorted=False) for pre_CF in _plain_chunks(x_ND, W_FD, b_F, centre_D)]
        values, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
        return Codes(values.relu(), indices, len(W_FD))
    cache: dict[str, Any] = {}
    values, indices = _LinearTopK.apply(x_ND, W_FD, b_F, centre_D, k, cache)
    return Codes(values, indices, len(W_FD), cache=cache)


Keep = Callable[[Tensor, Tensor, Tensor], Tensor | None]
"""Function of the pairs above a floor (values fp32, latents, tokens) that returns those to keep, (P,) bool.

It returns None if the floor is too high, so that the pairs above 0 are needed."""


def linear_above(
    x_ND: Tensor, W_FD: Tensor, b_F: Tensor, floor: Tensor, centre_D: Tensor | None = None, keep: Keep | None = None
) -> Codes:
    """Return the entries of ``(x - centre) Wᵀ + b`` above ``floor``, (F,) or a scalar, as ragged codes.

    ``keep`` selects among them. Differentiable in ``W_FD``, ``b_F`` and ``centre_D``; not in ``x_ND`` and ``floor``.
    """
    if uses_plain_products():
        found, start = [], 0
        for pre_CF in _plain_chunks(x_ND, W_FD, b_F, centre_D):
            token_P, latent_P = (pre_CF > floor).nonzero().unbind(1)
            found.append((pre_CF[token_P, latent_P].float(), latent_P, token_P + start))
            start += len(pre_CF)
        values, latent_P, token_P = (torch.cat(parts) for parts in zip(*found, strict=True))
        kept = None if keep is None else keep(values.detach(), latent_P, token_P)
        if keep is not None and kept is None:
            return linear_above(x_ND, W_FD, b_F, torch.zeros_like(floor), centre_D, keep)
        if kept is not None:
            values, latent_P, token_P = values[kept], latent_P[kept], token_P[kept]
        return Codes(values, latent_P, len(W_FD), sparse.count_offsets(token_P, len(x_ND)))
    cache: dict[str, Any] = {}
    values, latent_P, token_P = _LinearAbove.apply(x_ND, W_FD, b_F, centre_D, floor, keep, cache)
    cache["tokens"] = token_P
    return Codes(values, latent_P, len(W_FD), sparse.count_offsets(token_P, len(x_ND)), cache)


def _plain_chunks(x_ND: Tensor, W_FD: Tensor, b_F: Tensor, centre_D: Tensor | None) -> Iterator[Tensor]:
    """Yield ``(x - centre) Wᵀ + b`` in chunks of at most MAX_PLAIN_ENTRIES entries."""
    for rows in x_ND.split(max(1, MAX_PLAIN_ENTRIES // len(W_FD))):
        yield torch.addmm(b_F, rows if centre_D is None else rows - centre_D, W_FD.T)


def decode_codes(codes: Codes, W_FD: Tensor) -> Tensor:
    """Return Σ over a token's latents of value · W[latent], (N, D) fp32; differentiable in values and weight."""
    # Autocast may have left the values in bf16.
    values = codes.values.float()
    if codes.indices is None:
        return (values @ W_FD).float()
    if codes.offsets is not None and uses_plain_products():
        return sparse.decode_ragged(values, codes.indices, codes.offsets, W_FD)
    if codes.offsets is not None:
        return _RaggedDecode.apply(values, codes.indices, codes.offsets, W_FD, codes.cache)
    if uses_plain_products():
        return embedding_bag(codes.indices, W_FD, per_sample_weights=values, mode="sum")
    return _SparseDecode.apply(values, codes.indices, W_FD, codes.cache)


def explicit_auxk(
    x_ND: Tensor, residual_ND: Tensor, W_enc_AD: Tensor, b_enc_A: Tensor, W_dec_AD: Tensor, *, k: int, weight: Tensor
) -> Tensor:
    """Return the loss of :func:`saetrain.ops.auxk.compute_auxk_gradients`, differentiable in the weights."""
    x_ND = x_ND.to(_product_dtype(x_ND))
    return _AuxK.apply(x_ND, residual_ND, W_enc_AD, b_enc_A, W_dec_AD, k, weight)


def uses_plain_products() -> bool:
    """Return whether only PyTorch's own operations are used: on request, and where no gradient is computed."""
    return _is_plain.get() or not torch.is_grad_enabled()


def _product_dtype(tensor: Tensor) -> torch.dtype:
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def _is_dense(latents: int, k: int) -> bool:
    """Return whether dense products are faster than sparse ones."""
    return latents <= DENSE_LIMIT * k


def _scatter_codes(values_NK: Tensor, indices_NK: Tensor, latents: int) -> Tensor:
    return values_NK.new_zeros(len(values_NK), latents).scatter_(1, indices_NK, values_NK)


def _scatter_pairs(values_P: Tensor, token_P: Tensor, latent_P: Tensor, shape: tuple[int, int]) -> Tensor:
    out = values_P.new_zeros(shape)
    out[token_P, latent_P] = values_P
    return out


def _sorted_pairs(
    cache: dict[str, Any], indices: Tensor, latents: int, token_P: Tensor | None = None
) -> sparse.SparsePairs:
    """Return the pairs of a code, which both products of a step use, sorted by latent."""
    if "pairs" not in cache:
        cache["pairs"] = sparse.sort_pairs(indices, latents, token_P)
    return cache["pairs"]


def _multiply_csr(csr_FN: Tensor, dense_ND: Tensor, spare: list[Tensor] | None) -> Tensor:
    """Return the product (F, D), in memory of ``spare`` if it fits; unlike ``@``, this does not fill it with zeros."""
    shape = csr_FN.shape[0], dense_ND.shape[1]
    fitting = next((number for number, tensor in enumerate(spare or []) if tensor.shape == shape), None)
    out = dense_ND.new_empty(shape) if spare is None or fitting is None else spare.pop(fitting)
    return torch.addmm(out, csr_FN, dense_ND, beta=0, out=out)


class _LinearTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor, centre: Tensor | None, k: int, cache: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        centred = x if centre is None else x - centre
        encoder_input = centred.to(_product_dtype(x))
        values, indices = sparse.encode_topk(encoder_input, W.to(encoder_input.dtype), b, k)
        ctx.save_for_backward(centred, encoder_input, W, values, indices)
        ctx.mark_non_differentiable(indices)
        ctx.cache, ctx.has_centre, ctx.spare = cache, centre is not None, _spare_gradients.get()
        return values, indices

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_values: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        centred, encoder_input, W, values, indices = ctx.saved_tensors
        grad_pre = grad_values * (values > 0)
        if _is_dense(len(W), values.shape[1]):
            grad_pre_NF = _scatter_codes(grad_pre.to(encoder_input.dtype), indices, len(W))
            grad_W, grad_b = (grad_pre_NF.T @ encoder_input).float(), grad_pre_NF.sum(dim=0, dtype=torch.float32)
        else:
            grad_pre_csr = _sorted_pairs(ctx.cache, indices, len(W)).to_csr(grad_pre, len(grad_pre))
            grad_W, grad_b = (
                _multiply_csr(grad_pre_csr, centred, ctx.spare),
                grad_pre_csr @ grad_pre.new_ones(len(grad_pre)),
            )
        return None, grad_W, grad_b, -(grad_b @ W) if ctx.has_centre else None, None, None


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, W: Tensor, cache: dict[str, Any]) -> Tensor:
        product_W = W.to(_product_dtype(values))
        ctx.save_for_backward(values, indices, W, product_W)
        ctx.cache, ctx.spare = cache, _spare_gradients.get()
        if _is_dense(len(W), values.shape[1]):
            return (_scatter_codes(values.to(product_W.dtype), indices, len(W)) @ product_W).float()
        # A weight without a gradient makes embedding_bag skip what only its own backward pass needs.
        return sparse.decode(values.detach(), indices, product_W.detach())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, indices, W, product_W = ctx.saved_tensors
        dtype, k = product_W.dtype, values.shape[1]
        if _is_dense(len(W), k):
            grad_product = grad.to(dtype)
            grad_values = (grad_product @ product_W.T).gather(1, indices).float()
            code_NF = _scatter_codes(values.to(dtype), indices, len(W))
            return grad_values, None, (code_NF.T @ grad_product).float(), None
        if dtype != torch.float32 and len(W) <= dense_limit(True) * k:
            grad_values = sparse.sampled_matmul_dense(grad.to(dtype), indices, product_W)
        else:
            grad_values = sparse.sampled_matmul(grad, indices, W)
        code_csr = _sorted_pairs(ctx.cache, indices, len(W)).to_csr(values, len(values))
        return grad_values, None, _multiply_csr(code_csr, grad, ctx.spare), None


class _LinearAbove(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor,
        centre: Tensor | None,
        floor: Tensor,
        keep: Keep | None,
        cache: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor]:
        centred = x if centre is None else x - centre
        encoder_input = centred.to(_product_dtype(x))
        product_W, kept = W.to(encoder_input.dtype), None
        values, latent_P, token_P = sparse.encode_above(encoder_input, product_W, b, floor)
        if keep is not None:
            kept = keep(values, latent_P, token_P)
            if kept is None:
                values, latent_P, token_P = sparse.encode_above(encoder_input, product_W, b, torch.zeros_like(floor))
                kept = keep(values, latent_P, token_P)
            assert kept is not None
            values, latent_P, token_P = values[kept], latent_P[kept], token_P[kept]
        ctx.save_for_backward(centred, encoder_input, W, latent_P, token_P)
        ctx.mark_non_differentiable(latent_P, token_P)
        ctx.cache, ctx.has_centre, ctx.spare = cache, centre is not None, _spare_gradients.get()
        return values, latent_P, token_P

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_P: Tensor, _: Tensor, __: Tensor) -> tuple[Tensor | None, ...]:
        centred, encoder_input, W, latent_P, token_P = ctx.saved_tensors
        tokens = len(centred)
        if _is_dense(len(W) * tokens, len(grad_P)):
            grad_NF = _scatter_pairs(grad_P.to(encoder_input.dtype), token_P, latent_P, (tokens, len(W)))
            grad_W, grad_b = (grad_NF.T @ encoder_input).float(), grad_NF.sum(dim=0, dtype=torch.float32)
        else:
            grad_csr = _sorted_pairs(ctx.cache, latent_P, len(W), token_P).to_csr(grad_P, tokens)
            grad_W = _multiply_csr(grad_csr, centred, ctx.spare)
            grad_b = grad_csr @ grad_P.new_ones(tokens)
        return None, grad_W, grad_b, -(grad_b @ W) if ctx.has_centre else None, None, None, None


class _RaggedDecode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, latent_P: Tensor, offsets: Tensor, W: Tensor, cache: dict[str, Any]
    ) -> Tensor:
        product_W, tokens = W.to(_product_dtype(values)), len(offsets) - 1
        if "tokens" not in cache:
            cache["tokens"] = torch.arange(tokens, device=offsets.device).repeat_interleave(offsets.diff())
        token_P = cache["tokens"]
        ctx.save_for_backward(values, latent_P, offsets, token_P, W, product_W)
        ctx.cache, ctx.spare = cache, _spare_gradients.get()
        if _is_dense(len(W) * tokens, len(values)):
            code_NF = _scatter_pairs(values.to(product_W.dtype), token_P, latent_P, (tokens, len(W)))
            return (code_NF @ product_W).float()
        # A weight without a gradient makes embedding_bag skip what only its own backward pass needs.
        return sparse.decode_ragged(values.detach(), latent_P, offsets, product_W.detach())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, latent_P, offsets, token_P, W, product_W = ctx.saved_tensors
        if _is_dense(len(W) * len(grad), len(values)):
            grad_product = grad.to(product_W.dtype)
            grad_values = (grad_product @ product_W.T)[token_P, latent_P].float()
            code_NF = _scatter_pairs(values.to(product_W.dtype), token_P, latent_P, (len(grad), len(W)))
            return grad_values, None, None, (code_NF.T @ grad_product).float(), None
        grad_values = sparse.multiply_pairs(grad, token_P, latent_P, offsets[:-1], W)
        code_csr = _sorted_pairs(ctx.cache, latent_P, len(W), token_P).to_csr(values, len(grad))
        return grad_values, None, None, _multiply_csr(code_csr, grad, ctx.spare), None


class _AuxK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, k: int, weight: Tensor
    ) -> Tensor:
        grads = compute_auxk_gradients(x, residual, W_enc, b_enc, W_dec, k=k, weight=weight)
        ctx.save_for_backward(grads.W_enc, grads.b_enc, grads.W_dec)
        return grads.loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(grad * saved for saved in ctx.saved_tensors), None, None
