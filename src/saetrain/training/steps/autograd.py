"""Training step of any coder with gradients from autograd: any device, any optimizer, no compiler."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor

from saetrain.coders.base import SparseCoder
from saetrain.ops import plain_products, reuse_gradients
from saetrain.optim import (
    LazyAdam,
    OptimSettings,
    build_optimizer,
    load_named_state,
    named_state,
    to_memory_order,
)
from saetrain.training.steps.base import KernelSettings, Objective, StepRequest, StepStats, TrainStep
from saetrain.types import StepContext

# These warnings are about sparse tensors being in beta; tests compare the sparse products with the plain ones.
warnings.filterwarnings("ignore", message="Sparse (CSR tensor support|invariant checks)")


class AutogradStep(TrainStep):
    """Training step of one coder.

    ``dtype``: dtype of the products; sums and weights are fp32. ``is_plain``: use only PyTorch's own operations, which
    are slow, as the reference of the other steps.
    """

    def __init__(
        self, coder: SparseCoder, settings: OptimSettings, dtype: torch.dtype = torch.float32, *, is_plain: bool = False
    ) -> None:
        self._coder, self._dtype, self._is_plain = coder, dtype, is_plain
        self._max_grad_norm = settings.max_grad_norm
        self._optimizer = build_optimizer(
            dict(coder.named_parameters()),
            settings,
            encoder_parameters=coder.encoder_parameters,
            latent_dims={} if coder.updates_idle_latents else coder.latent_dims,
        )
        self._norm = torch.zeros(())
        self._spare_gradients: list[Tensor] = []

    @classmethod
    def unsupported(cls, request: StepRequest) -> str | None:
        """Return None, because autograd supports every coder."""
        return None

    @classmethod
    def build(
        cls, coder: SparseCoder, optim: OptimSettings, kernels: KernelSettings, *, no_accumulation: bool
    ) -> AutogradStep:
        """Return the step of ``coder``."""
        dtype = torch.bfloat16 if kernels.compute_dtype == "bfloat16" else torch.float32
        return cls(coder, optim, dtype, is_plain=kernels.kernels == "reference")

    def forward_backward(
        self, x_ND: Tensor, ctx: StepContext, y_ND: Tensor | None = None, objective: Objective | None = None
    ) -> StepStats:
        """Accumulate the gradients of a micro-batch."""
        coder, y_ND = self._coder, x_ND if y_ND is None else y_ND
        products = plain_products() if self._is_plain else nullcontext()
        use_autocast = self._dtype != torch.float32
        reuse = reuse_gradients(self._spare_gradients)
        with products, reuse, torch.autocast(x_ND.device.type, dtype=self._dtype, enabled=use_autocast):
            encoded = coder.encode_train(x_ND, ctx)
            y_hat_ND = coder.decode(encoded.codes, x_ND)
            losses = coder.losses(y_ND, encoded, y_hat_ND, ctx)
            if objective is not None:
                losses = objective(y_hat_ND, losses)
            total = torch.stack(list(losses.values())).sum()
        total.backward()
        with torch.no_grad():
            residual = y_ND - y_hat_ND
            return StepStats(
                fired=encoded.codes.firing_counts(),
                tokens=len(x_ND),
                losses={name: loss.detach() for name, loss in losses.items()},
                residual_sum=residual.sum(dim=0),
                residual_square=torch.linalg.vector_norm(residual).square(),
                sums={name: value.detach() for name, value in encoded.sums.items()},
            )

    def gradients(self) -> list[Tensor]:
        """Return contiguous views of the gradients of all parameters."""
        return [to_memory_order(p.grad) for p in self._coder.parameters() if p.grad is not None]

    def norm_bound(self) -> float:
        """Project the accumulated gradients and return their exact norm."""
        if self._coder.has_unit_norm_decoder:
            self._coder.remove_parallel_gradient()
        self._norm = torch.nn.utils.get_total_norm([p.grad for p in self._coder.parameters() if p.grad is not None])
        return float(self._norm)

    def optimizer_step(self, lr: float) -> Tensor:
        """Clip, update the parameters and renormalize the decoder; return the norm of the projected gradient."""
        # Scaling by 1 would read and write all gradients without effect.
        if 0 < self._max_grad_norm < float(self._norm):
            torch.nn.utils.clip_grads_with_norm_(self._coder.parameters(), self._max_grad_norm, self._norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        if self._coder.has_unit_norm_decoder:
            # None means all latents.
            updated = self._optimizer.updated_latents if isinstance(self._optimizer, LazyAdam) else None
            self._coder.renormalize_decoder(updated)
        self.zero_grad()
        return self._norm

    def zero_grad(self) -> None:
        """Discard the gradients; the next backward pass writes new ones instead of adding to zeros."""
        self._spare_gradients = [gradient for gradient in self.gradients() if gradient.dim() == 2]
        self._optimizer.zero_grad()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state of the torch optimizer."""
        return named_state(self._optimizer)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the state of the torch optimizer."""
        load_named_state(self._optimizer, state)
