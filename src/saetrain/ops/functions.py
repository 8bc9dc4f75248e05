"""Sparse products as autograd functions, and the same products in PyTorch's own operations as their reference.

Products run in the dtype of ``torch.autocast`` if it is enabled, else in that of their inputs. Sums, codes and
gradients are fp32. No tensor of size N x F is stored if F is large relative to k.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from saetrain.ops import sparse
from saetrain.ops.auxk import compute_auxk_gradients
from saetrain.ops.cpu_features import DENSE_LIMIT, dense_limit
from saetrain.types import Codes

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
        pre_NF = torch.addmm(b_F, x_ND if centre_D is None else x_ND - centre_D, W_FD.T)
        values, indices = torch.topk(pre_NF, k, dim=1, sorted=False)
        return Codes(values.relu(), indices, len(W_FD))
    cache: dict[str, Any] = {}
    values, indices = _LinearTopK.apply(x_ND, W_FD, b_F, centre_D, k, cache)
    return Codes(values, indices, len(W_FD), cache=cache)


def decode_codes(codes: Codes, W_FD: Tensor) -> Tensor:
    """Return Σ over a token's latents of value · W[latent], (N, D) fp32; differentiable in values and weight."""
    # Autocast may have left the values in bf16.
    values = codes.values.float()
    if codes.indices is None:
        return values @ W_FD
    if codes.offsets is not None:
        return embedding_bag(
            codes.indices, W_FD, codes.offsets, per_sample_weights=values, mode="sum", include_last_offset=True
        )
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


def _sorted_pairs(cache: dict[str, Any], indices_NK: Tensor, latents: int) -> sparse.SparsePairs:
    """Return the pairs of a code, which both products of a step use, sorted by latent."""
    if "pairs" not in cache:
        cache["pairs"] = sparse.sort_pairs(indices_NK, latents)
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
