"""TopK training step in PyTorch with explicit gradients: any device, any optimizer, no compiler."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from saetrain.coders.topk import TopK
from saetrain.ops import sparse
from saetrain.ops.cpu_features import DENSE_LIMIT, dense_limit
from saetrain.optim import OptimSettings
from saetrain.training.auxk import DeadLatents, auxk_forward_backward
from saetrain.training.steps.base import Objective, ReferenceStep, StepStats
from saetrain.types import StepContext

# These warnings are about sparse tensors being in beta; tests compare the sparse products with the reference.
warnings.filterwarnings("ignore", message="Sparse (CSR tensor support|invariant checks)")


class TorchStep(ReferenceStep):
    """Training step of one TopK coder; ``dtype`` is the dtype of the products, sums and weights are fp32."""

    def __init__(self, coder: TopK, settings: OptimSettings, dtype: torch.dtype) -> None:
        super().__init__(coder, settings)
        self._topk, self._dtype = coder, dtype
        for parameter in coder.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self._weight_copies: dict[str, Tensor] | None = None
        self._overwrites_grads = True

    @property
    def _weights(self) -> dict[str, Tensor]:
        """Encoder and decoder weights as (F, D) in the dtype of the products."""
        if self._weight_copies is None:
            coder = self._topk
            whole = {"enc": coder.W_enc.detach().T, "dec": coder.W_dec.detach()}
            self._weight_copies = {name: value.to(self._dtype) for name, value in whole.items()}
        return self._weight_copies

    @torch.no_grad()
    def forward_backward(self, x_ND: Tensor, progress: StepContext, objective: Objective | None = None) -> StepStats:
        """Accumulate gradients in ``.grad``, with sparse products or, if k is large relative to F, dense ones."""
        assert objective is None, "the explicit gradients are those of the coder's own loss"
        coder = self._topk
        centred = x_ND - coder.b_dec
        encoder_input = centred.to(self._dtype)
        values, indices = sparse.encode_topk(encoder_input, self._weights["enc"], coder.b_enc, coder.k)
        loss_scale = 2 / (progress.n_tokens * progress.data_variance)
        backward = self._backward_dense if coder.num_latents <= DENSE_LIMIT * coder.k else self._backward_sparse
        residual, grad_b_enc = backward(centred, encoder_input, values, indices, loss_scale)
        residual_sum = residual.sum(dim=0)
        self._add_bias_gradients(grad_b_enc, residual_sum, loss_scale)
        square = torch.linalg.vector_norm(residual).square()
        losses = {"recon": square * (loss_scale / 2)}
        if coder.auxk_alpha and progress.dead_mask is not None:
            losses["auxk"] = self._add_auxk(encoder_input, residual, progress)
        active = (values > 0).reshape(-1).long()
        fired = torch.zeros(coder.num_latents, dtype=torch.long, device=x_ND.device)
        fired.scatter_add_(0, indices.reshape(-1), active)
        return StepStats(fired, len(x_ND), losses, residual_sum, square)

    def _backward_sparse(
        self, centred_ND: Tensor, encoder_input_ND: Tensor, values: Tensor, indices: Tensor, loss_scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Add the weight gradients from sparse products; return the residual (N, D) and the gradient of ``b_enc``."""
        coder, grads, use_bf16 = self._topk, self._weight_gradients(), self._dtype != torch.float32
        residual = centred_ND - sparse.decode(values, indices, self._weights["dec"])
        if use_bf16 and coder.num_latents <= dense_limit(use_bf16) * coder.k:
            grad_pre = sparse.sampled_matmul_dense(residual.to(self._dtype), indices, self._weights["dec"])
        else:
            grad_pre = sparse.sampled_matmul(residual, indices, coder.W_dec)
        grad_pre.mul_(-loss_scale).mul_(values > 0)
        pairs = sparse.sort_pairs(indices, coder.num_latents)
        codes_csr = pairs.to_csr(values * -loss_scale, len(values))
        torch.addmm(grads["dec"], codes_csr, residual, beta=self._grad_beta, out=grads["dec"])
        grad_pre_csr = pairs.to_csr(grad_pre, len(grad_pre))
        torch.addmm(grads["enc"], grad_pre_csr, centred_ND, beta=self._grad_beta, out=grads["enc"])
        return residual, grad_pre_csr @ grad_pre.new_ones(len(grad_pre))

    def _backward_dense(
        self, centred_ND: Tensor, encoder_input_ND: Tensor, values: Tensor, indices: Tensor, loss_scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute the results of :meth:`_backward_sparse` with dense products."""
        grads, W_dec = self._weight_gradients(), self._weights["dec"]
        code = encoder_input_ND.new_zeros(len(values), self._topk.num_latents)
        code.scatter_(1, indices, values.to(self._dtype))
        residual = (code @ W_dec).float().neg_().add_(centred_ND)
        residual_copy = residual.to(self._dtype)
        grad_pre = (residual_copy @ W_dec.T).mul_(code > 0)
        # ``loss_scale`` is applied last, because the product is the smallest tensor.
        for name, product in (("dec", code.T @ residual_copy), ("enc", grad_pre.T @ encoder_input_ND)):
            self._accumulate_grad(grads[name], product.float().mul_(-loss_scale))
        return residual, grad_pre.sum(dim=0, dtype=torch.float32) * -loss_scale

    @property
    def _grad_beta(self) -> float:
        """Factor of the stored gradients before the next ones are added: 0 after a step, to overwrite them."""
        return 0.0 if self._overwrites_grads else 1.0

    def _accumulate_grad(self, gradient: Tensor, value: Tensor) -> None:
        if self._overwrites_grads:
            gradient.copy_(value)
        else:
            gradient.add_(value)

    def _weight_gradients(self) -> dict[str, Tensor]:
        """Return ``.grad`` of encoder and decoder as (F, D)."""
        coder = self._topk
        assert coder.W_enc.grad is not None
        assert coder.W_dec.grad is not None
        return {"enc": coder.W_enc.grad.T, "dec": coder.W_dec.grad}

    def _add_bias_gradients(self, grad_b_enc_F: Tensor, residual_sum_D: Tensor, loss_scale: Tensor) -> None:
        """Add the bias gradients; that of ``b_dec`` flows through the reconstruction and the encoder input."""
        coder = self._topk
        assert coder.b_enc.grad is not None
        assert coder.b_dec.grad is not None
        self._accumulate_grad(coder.b_enc.grad, grad_b_enc_F)
        self._accumulate_grad(coder.b_dec.grad, -(loss_scale * residual_sum_D + coder.W_enc @ grad_b_enc_F))
        self._overwrites_grads = False

    def _add_auxk(self, encoder_input_ND: Tensor, residual_ND: Tensor, progress: StepContext) -> Tensor:
        """Add AuxK's gradients to the rows of the dead latents; return the weighted loss."""
        assert progress.dead_mask is not None
        coder, grads = self._topk, self._weight_gradients()
        dead = DeadLatents.from_mask(progress.dead_mask)
        auxk_grads = auxk_forward_backward(coder, self._weights, encoder_input_ND, residual_ND, dead, progress)
        grads["enc"].index_add_(0, dead.rows, auxk_grads.W_enc)
        grads["dec"].index_add_(0, dead.rows, auxk_grads.W_dec)
        assert coder.b_enc.grad is not None
        coder.b_enc.grad.index_add_(0, dead.rows, auxk_grads.b_enc)
        return auxk_grads.loss

    def optimizer_step(self, lr: float) -> Tensor:
        """Update the parameters with the torch optimizer, and discard the copies of the weights."""
        norm = super().optimizer_step(lr)
        self._weight_copies = None
        return norm

    def zero_grad(self) -> None:
        """Let the next micro-batch overwrite the gradients, which is faster than zeroing them."""
        self._overwrites_grads = True

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the state of the torch optimizer, and discard the copies of the weights."""
        super().load_state_dict(state)
        self._weight_copies = None
