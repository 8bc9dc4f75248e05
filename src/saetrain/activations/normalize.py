"""Normalizer: mean, scale, principal axes and variance of the activations, measured before training; norm limits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from saetrain.activations.extract import Activations
from saetrain.errors import SaetrainError
from saetrain.types import Site

OUTLIER_FACTOR = 10.0
"""A token is a norm outlier if its norm exceeds this factor times the median (as in dictionary_learning, PR #52)."""


@dataclass(frozen=True)
class Normalizer:
    """x' = ((x - mean) / scale) axes, with scale such that E‖x'‖² = D.

    ``mean`` (D,) fp32; ``scale`` scalar; ``axes`` (D, D) fp32, whose orthonormal columns are the principal axes;
    ``variance`` E‖x - mean‖² in raw units.

    Adam scales each coordinate separately, so training is better along the principal axes (docs/recipe.md).
    """

    mean: Tensor
    scale: float
    axes: Tensor
    variance: float

    def __call__(self, x_ND: Tensor, *, bf16: bool = False) -> Tensor:
        """Return x' (N, D) in fp32 for raw activations (N, D) of any float dtype; ``bf16``: rotate in bf16."""
        x_fp32 = x_ND.float()
        # fp32 input takes one pass over memory; other input is already copied, so it is normalized in place.
        if x_fp32 is x_ND:
            centred = torch.add(-self.mean / self.scale, x_fp32, alpha=1 / self.scale)
        else:
            centred = x_fp32.sub_(self.mean).div_(self.scale)
        return (centred.bfloat16() @ self._axes_bf16).float() if bf16 else centred @ self.axes

    @cached_property
    def _axes_bf16(self) -> Tensor:
        return self.axes.bfloat16()

    def denormalize(self, x_ND: Tensor) -> Tensor:
        """Convert x' (N, D) to raw units, in fp32; differentiable."""
        return torch.add(self.mean, x_ND @ self.axes.T, alpha=self.scale)

    def tensor_constants(self) -> dict[str, Tensor]:
        """Return the constants that are tensors."""
        return {"mean": self.mean, "axes": self.axes}

    def scalar_constants(self) -> dict[str, float]:
        """Return the other constants."""
        return {"scale": self.scale, "variance": self.variance}

    @property
    def scaled_variance(self) -> float:
        """E‖x'‖², the variance in the units that the coder sees."""
        return self.variance / self.scale**2

    @property
    def mean_to_std(self) -> float:
        """‖mean‖ / ‖std‖. Values well above 1 cause dead latents unless the inputs are centred."""
        return float(self.mean.norm()) / self.variance**0.5


def compute_norm_limits(sample: Activations) -> dict[str, float]:
    """Return {hookpoint: OUTLIER_FACTOR times the median norm of the sample}."""
    return {name: OUTLIER_FACTOR * float(value.float().norm(dim=1).median()) for name, value in sample.values.items()}


def fit_normalizers(sample: Activations, limits: Mapping[str, float], sites: Iterable[Site]) -> dict[str, Normalizer]:
    """Return {name of a site's inputs or outputs: normalizer}, fitted to kept tokens within the limits; sums are fp64.

    Raises SaetrainError when the activations of one of them do not vary.
    """
    accept = torch.ones(len(sample), dtype=torch.bool, device=next(iter(sample.values.values())).device)
    for name, limit in limits.items():
        accept &= sample.values[name].float().norm(dim=1) <= limit
    sides = {}
    for site in sites:
        sides[site.x_name], sides[site.y_name] = site.select_xy(sample.values)
    out: dict[str, Normalizer] = {}
    for name, value in sides.items():
        x = value[accept].double()
        mean = x.mean(dim=0)
        x -= mean
        variance = float(x.pow(2).sum(dim=1).mean())
        if not variance > 0:
            raise SaetrainError(
                f"--hookpoints {name}: its activations are the same on every token; choose another module or other text"
            )
        scale = (variance / x.shape[1]) ** 0.5
        axes = compute_principal_axes(x.T @ x).float().contiguous()
        out[name] = Normalizer(mean.float(), scale, axes, variance)
    return out


def compute_principal_axes(gram_DD: Tensor) -> Tensor:
    """Return the eigenvectors of ``gram_DD`` as the columns of (D, D), stable under rounding for equal eigenvalues."""
    width = len(gram_DD)
    # A tiny slope makes equal eigenvalues distinct; they are equal (zero) if there are fewer tokens than D.
    tie_breaker = torch.linspace(0, 1e-6, width, dtype=gram_DD.dtype, device=gram_DD.device)
    _, axes = torch.linalg.eigh(gram_DD + (gram_DD.trace() / width * tie_breaker).diag())
    largest = axes.abs().argmax(dim=0, keepdim=True)
    return axes * axes.gather(0, largest).sign()
