"""sparsify's training step on a GPU, for machines on which its trainer and its dependencies are not installed.

The step follows eai-sparsify 1.3.3 (``sparse_coder.py``, ``fused_encoder.py``, ``trainer.py``): a dense encoder with
ReLU and ``torch.topk`` under bf16 autocast, the encoder's gradient by ``index_add_`` over one row per active pair, a
decoder with fp32 weights, ``torch.optim.Adam`` with default options, unit norms before each step, a projection of the
gradient after it, and one number copied to the host per step. The decoder is ``embedding_bag``, as in the package
without Triton. If the package's files are available, its own encoder and decoder are used.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, linear

from saetrain.coders.topk import TopK

PACKAGE_VARIABLE = "SPARSIFY"
"""Environment variable with the path of the package's folder or wheel."""
LR = 2e-4


@dataclass(frozen=True)
class Package:
    """The package's modules for encoding and decoding."""

    encoder: Any
    decoder: Any


@cache
def load_package() -> Package | None:
    """Load the package's own modules, without its trainer; None if ``PACKAGE_VARIABLE`` is not set."""
    named = os.environ.get(PACKAGE_VARIABLE)
    if not named:
        return None
    folder = Path(named)
    if folder.suffix == ".whl":
        folder = Path(tempfile.mkdtemp()) / "sparsify"
        with zipfile.ZipFile(named) as wheel:
            wheel.extractall(folder.parent)
    return Package(_load_module(folder / "fused_encoder.py"), _load_module(folder / "xformers.py"))


def _load_module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"sparsify_{path.stem}", path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Encode(torch.autograd.Function):
    """Dense forward pass, and a backward pass over the active pairs only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return values and indices, both (N, k)."""
        values, indices = linear(x, weight, bias).relu().topk(k, dim=-1, sorted=False)
        ctx.save_for_backward(x, weight, bias, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Make one row of gradients per active pair, and add the rows per latent."""
        x, weight, bias, indices = ctx.saved_tensors
        flat = indices.flatten()
        rows = (grad_values.unsqueeze(2) * x.unsqueeze(1)).flatten(0, 1).type_as(weight)
        by_weight = torch.zeros_like(weight).index_add_(0, flat, rows)
        by_bias = torch.zeros_like(bias).index_add_(0, flat, grad_values.flatten().type_as(bias))
        by_x = embedding_bag(indices, weight, per_sample_weights=grad_values.type_as(weight), mode="sum")
        return by_x, by_weight, by_bias, None


class Step:
    """Training steps that start with a coder's weights."""

    def __init__(self, coder: TopK, package: Package | None) -> None:
        self._k, self._package = coder.k, package
        initial = (coder.W_enc.detach().T.contiguous(), coder.b_enc, coder.W_dec, coder.b_dec)
        self.weights = [nn.Parameter(value.detach().clone()) for value in initial]
        self._adam = torch.optim.Adam(self.weights, lr=LR)
        latents, device = coder.num_latents, coder.b_dec.device
        self._silent = torch.zeros(latents, dtype=torch.long, device=device)
        self._fired = torch.zeros(latents, dtype=torch.bool, device=device)

    def __call__(self, x: Tensor) -> float:
        """Run one step and return the FVU."""
        W_enc, b_enc, W_dec, b_dec = self.weights
        with torch.no_grad():
            W_dec.div_(W_dec.norm(dim=1, keepdim=True) + torch.finfo(W_dec.dtype).eps)
        variance = (x - x.mean(0)).pow(2).sum()
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            if self._package is None:
                values, indices = Encode.apply(x - b_dec, W_enc, b_enc, self._k)
                decoded = embedding_bag(indices, W_dec, per_sample_weights=values.to(W_dec.dtype), mode="sum")
            else:
                values, indices, _ = self._package.encoder.fused_encoder(x - b_dec, W_enc, b_enc, self._k, "topk")
                decoded = self._package.decoder.xformers_embedding_bag(indices, W_dec, values.to(W_dec.dtype))
            loss = (x - (decoded + b_dec)).pow(2).sum() / variance
        self._fired[indices.flatten()] = True
        fvu = float(loss.detach())
        loss.backward()
        with torch.no_grad():
            assert W_dec.grad is not None
            W_dec.grad -= (W_dec.grad * W_dec).sum(dim=1, keepdim=True) * W_dec
        self._adam.step()
        self._adam.zero_grad()
        self._silent += len(x)
        self._silent[self._fired] = 0
        self._fired.zero_()
        return fvu
