"""Constants of the inputs, measured before training: centre, scale, principal axes, variance, limit of outliers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from saetrain.activations.extract import Activations
from saetrain.errors import SaetrainError

OUTLIER_FACTOR = 10.0
"""A token is an outlier when its norm exceeds this many medians (the rule of dictionary_learning's PR #52)."""


@dataclass(frozen=True)
class Normalizer:
    """x' = ((x - mean) / scale) axes, with scale such that E‖x'‖² = D.

    ``mean`` (D,) fp32; ``scale`` fp32 scalar; ``axes`` (D, D) fp32, orthonormal columns: the principal axes, along
    which Adam, that scales each coordinate by itself, trains better (docs/recipe.md); ``variance`` E‖x - mean‖² in raw
    units; ``norm_limit`` largest raw norm of a token that counts (inf: no limit).
    """

    mean: Tensor
    scale: float
    axes: Tensor
    variance: float
    norm_limit: float

    def __call__(self, x_ND: Tensor, *, bf16: bool = False) -> Tensor:
        """Raw activations of any float dtype -> x' in fp32; ``half``: turned by a product in bf16."""
        wide = x_ND.float()
        # One pass over memory where they are wide already, and no second piece of memory where they were not.
        if wide is x_ND:
            centred = torch.add(-self.mean / self.scale, wide, alpha=1 / self.scale)
        else:
            centred = wide.sub_(self.mean).div_(self.scale)
        return (centred.bfloat16() @ self._axes_bf16).float() if bf16 else centred @ self.axes

    @cached_property
    def _axes_bf16(self) -> Tensor:
        return self.axes.bfloat16()

    def denormalize(self, x_ND: Tensor) -> Tensor:
        """x' -> raw units, fp32; differentiable."""
        return torch.add(self.mean, x_ND @ self.axes.T, alpha=self.scale)

    def tensor_constants(self) -> dict[str, Tensor]:
        """The constants that are tensors."""
        return {"mean": self.mean, "axes": self.axes}

    def scalar_constants(self) -> dict[str, float | None]:
        """The others, as JSON takes them."""
        limit = self.norm_limit if self.norm_limit != float("inf") else None
        return {"scale": self.scale, "variance": self.variance, "norm_limit": limit}

    @property
    def scaled_variance(self) -> float:
        """E‖x'‖², the variance in the units that the coder sees."""
        return self.variance / self.scale**2

    @property
    def mean_to_std(self) -> float:
        """‖mean‖ / ‖std‖: well above 1 it breeds dead latents unless the inputs are centred."""
        return float(self.mean.norm()) / self.variance**0.5


def compute_norm_limits(sample: Activations) -> dict[str, float]:
    """{hookpoint: OUTLIER_FACTOR medians of the sample's norms}."""
    return {name: OUTLIER_FACTOR * float(value.float().norm(dim=1).median()) for name, value in sample.values.items()}


def fit_normalizers(sample: Activations, limits: dict[str, float]) -> dict[str, Normalizer]:
    """The constants of each hookpoint, from a sample of kept tokens (sums in fp64).

    Raises SaetrainError when a hookpoint's activations do not vary.
    """
    accept = torch.ones(len(sample), dtype=torch.bool, device=next(iter(sample.values.values())).device)
    for name, limit in limits.items():
        accept &= sample.values[name].float().norm(dim=1) <= limit
    out: dict[str, Normalizer] = {}
    for name, value in sample.values.items():
        x = value[accept].double()
        mean = x.mean(dim=0)
        x -= mean
        variance = float(x.pow(2).sum(dim=1).mean())
        if not variance > 0:
            raise SaetrainError(f"--hookpoints {name}: its activations are the same on every token; nothing to learn")
        scale = (variance / x.shape[1]) ** 0.5
        axes = compute_principal_axes(x.T @ x).float().contiguous()
        out[name] = Normalizer(mean.float(), scale, axes, variance, limits.get(name, float("inf")))
    return out


def compute_principal_axes(gram_DD: Tensor) -> Tensor:
    """Eigenvectors (D, D), a column each, that rounding of ``gram_DD`` does not turn where eigenvalues are equal."""
    width = len(gram_DD)
    # A slope far below what matters decides among equals, as there are where tokens are fewer than D.
    tie_breaker = torch.linspace(0, 1e-6, width, dtype=gram_DD.dtype, device=gram_DD.device)
    _, axes = torch.linalg.eigh(gram_DD + (gram_DD.trace() / width * tie_breaker).diag())
    largest = axes.abs().argmax(dim=0, keepdim=True)
    return axes * axes.gather(0, largest).sign()
