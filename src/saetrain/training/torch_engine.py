"""The TopK step in PyTorch with its gradients written out: any device, no compiler, any of the optimizers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from saetrain.coders.topk import TopK
from saetrain.kernels import sparse
from saetrain.kernels.processor import DENSE, dense_limit
from saetrain.optim import Optimizer
from saetrain.training.auxk import DeadLatents, auxk_step
from saetrain.training.engine import AutogradEngine, MicroStep, Objective
from saetrain.types import StepContext

# Both say that sparse tensors are young; what is used of them is held to the reference by tests.
warnings.filterwarnings("ignore", message="Sparse (CSR tensor support|invariant checks)")


class TorchEngine(AutogradEngine):
    """One TopK coder; ``dtype`` is that of the products, sums and weights are fp32."""

    def __init__(self, coder: TopK, optimizer: Optimizer, dtype: torch.dtype) -> None:
        super().__init__(coder, optimizer)
        self._topk, self._dtype = coder, dtype
        for parameter in coder.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self._copies: dict[str, Tensor] | None = None
        self._fresh = True

    @property
    def _weights(self) -> dict[str, Tensor]:
        """Encoder and decoder as (F, D) in the products' dtype."""
        if self._copies is None:
            coder = self._topk
            whole = {"enc": coder.W_enc.detach().T, "dec": coder.W_dec.detach()}
            self._copies = {name: value.to(self._dtype) for name, value in whole.items()}
        return self._copies

    @torch.no_grad()
    def micro_step(self, x_ND: Tensor, progress: StepContext, objective: Objective | None = None) -> MicroStep:
        """Sparse, or dense where k is a large part of F; gradients add up in ``.grad``."""
        assert objective is None, "gradients are written out for the coder's own loss alone"
        coder = self._topk
        encoded = x_ND - coder.b_dec
        product = encoded.to(self._dtype)
        values, indices = sparse.encode_topk(product, self._weights["enc"], coder.b_enc, coder.k)
        scale = 2 / (progress.n_tokens * progress.data_variance)
        backward = self._dense if coder.num_latents <= DENSE * coder.k else self._sparse
        residual, slope = backward(encoded, product, values, indices, scale)
        residual_sum = residual.sum(dim=0)
        self._biases(slope, residual_sum, scale)
        square = torch.linalg.vector_norm(residual).square()
        losses = {"recon": square * (scale / 2)}
        if coder.auxk_alpha and progress.dead_mask is not None:
            losses["auxk"] = self._auxk(product, residual, progress)
        active = (values > 0).reshape(-1).long()
        fired = torch.zeros(coder.num_latents, dtype=torch.long, device=x_ND.device)
        fired.scatter_add_(0, indices.reshape(-1), active)
        return MicroStep(fired, len(x_ND), losses, residual_sum, square)

    def _sparse(
        self, encoded_ND: Tensor, product_ND: Tensor, values: Tensor, indices: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both weights' gradients through sparse products; gives the residual (N, D) and the gradient of ``b_enc``."""
        coder, grads, half = self._topk, self._gradients(), self._dtype != torch.float32
        residual = encoded_ND - sparse.decode(values, indices, self._weights["dec"])
        if half and coder.num_latents <= dense_limit(half) * coder.k:
            slopes = sparse.latent_products_dense(residual.to(self._dtype), indices, self._weights["dec"])
        else:
            slopes = sparse.latent_products(residual, indices, coder.W_dec)
        slopes.mul_(-scale).mul_(values > 0)
        pairs = sparse.sort_pairs(indices, coder.num_latents)
        coded = pairs.matrix(values * -scale, len(values))
        torch.addmm(grads["dec"], coded, residual, beta=self._keep, out=grads["dec"])
        sloped = pairs.matrix(slopes, len(slopes))
        torch.addmm(grads["enc"], sloped, encoded_ND, beta=self._keep, out=grads["enc"])
        return residual, sloped @ slopes.new_ones(len(slopes))

    def _dense(
        self, encoded_ND: Tensor, product_ND: Tensor, values: Tensor, indices: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same through dense products."""
        grads, W_dec = self._gradients(), self._weights["dec"]
        code = product_ND.new_zeros(len(values), self._topk.num_latents)
        code.scatter_(1, indices, values.to(self._dtype))
        residual = (code @ W_dec).float().neg_().add_(encoded_ND)
        half = residual.to(self._dtype)
        latent = (half @ W_dec.T).mul_(code > 0)
        # The scale comes last, to what is smallest.
        for name, product in (("dec", code.T @ half), ("enc", latent.T @ product_ND)):
            self._add(grads[name], product.float().mul_(-scale))
        return residual, latent.sum(dim=0, dtype=torch.float32) * -scale

    @property
    def _keep(self) -> float:
        """What to multiply the gradients with before more is added: what a step before has left is overwritten."""
        return 0.0 if self._fresh else 1.0

    def _add(self, gradient: Tensor, value: Tensor) -> None:
        if self._fresh:
            gradient.copy_(value)
        else:
            gradient.add_(value)

    def _gradients(self) -> dict[str, Tensor]:
        """``.grad`` of encoder and decoder as (F, D)."""
        coder = self._topk
        assert coder.W_enc.grad is not None
        assert coder.W_dec.grad is not None
        return {"enc": coder.W_enc.grad.T, "dec": coder.W_dec.grad}

    def _biases(self, slope_F: Tensor, residual_sum_D: Tensor, scale: Tensor) -> None:
        """``b_dec`` is in the reconstruction and, negative, in what the encoder sees: one product with a vector."""
        coder = self._topk
        assert coder.b_enc.grad is not None
        assert coder.b_dec.grad is not None
        self._add(coder.b_enc.grad, slope_F)
        self._add(coder.b_dec.grad, -(scale * residual_sum_D + coder.W_enc @ slope_F))
        self._fresh = False

    def _auxk(self, product_ND: Tensor, residual_ND: Tensor, progress: StepContext) -> Tensor:
        """Add AuxK's gradients to the rows of the dead latents; gives the weighted loss."""
        assert progress.dead_mask is not None
        coder, grads = self._topk, self._gradients()
        dead = DeadLatents.of(progress.dead_mask)
        found = auxk_step(coder, self._weights, product_ND, residual_ND, dead, progress)
        grads["enc"].index_add_(0, dead.rows, found.W_enc)
        grads["dec"].index_add_(0, dead.rows, found.W_dec)
        assert coder.b_enc.grad is not None
        coder.b_enc.grad.index_add_(0, dead.rows, found.b_enc)
        return found.loss

    def apply(self, lr: float) -> Tensor:
        """By the torch optimizer; the weights' copies are made anew."""
        norm = super().apply(lr)
        self._copies = None
        return norm

    def drop(self) -> None:
        """The next micro-batch overwrites the gradients, which costs less than zeroing them."""
        self._fresh = True

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Into the torch optimizer."""
        super().restore(state)
        self._copies = None
