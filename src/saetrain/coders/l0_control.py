"""Control of the mean L0: buffers that steps change by the deviation of the L0 from the wanted one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

TARGET_RATE, MAX_TARGET_DEVIATION, TARGET_RANGE = 0.005, 0.1, (0.5, 1.5)
"""Change of a target per step and per relative deviation of the L0; the largest deviation that counts, so that the
first steps do not move the target far; and the range of a target, relative to the wanted L0."""
COEFFICIENT_RATE, MAX_COEFFICIENT_DEVIATION = 0.05, 1.0
"""Relative change of a coefficient per step and per relative deviation of the L0; the largest deviation that counts."""
COEFFICIENT_RANGE = (1e-8, 1e4)
"""A coefficient of 0 or infinity would never change again."""


def sum_l0(l0_N: Tensor) -> dict[str, Tensor]:
    """Return the sums over tokens that the controls need, in fp64, which is exact in any order."""
    return {"l0": l0_N.sum().double(), "tokens": torch.full((), len(l0_N), dtype=torch.double, device=l0_N.device)}


def _find_deviation(sums: Mapping[str, Tensor], k: int, largest: float) -> Tensor:
    return (sums["l0"] / sums["tokens"] / k - 1).clamp(-largest, largest)


@torch.no_grad()
def move_target_(target: Tensor, sums: Mapping[str, Tensor], k: int) -> None:
    """Lower a target L0, relative to k, in place if the L0 of the step is above k, and raise it if it is below."""
    target.sub_(TARGET_RATE * _find_deviation(sums, k, MAX_TARGET_DEVIATION)).clamp_(*TARGET_RANGE)


@torch.no_grad()
def scale_coefficient_(coefficient: Tensor, sums: Mapping[str, Tensor], k: int) -> None:
    """Raise the coefficient of a sparsity loss in place if the L0 of the step is above k, and lower it if it is below.

    coefficient ← coefficient · exp(COEFFICIENT_RATE · (L0 / k - 1)), an integral control in log space.
    """
    deviation = _find_deviation(sums, k, MAX_COEFFICIENT_DEVIATION)
    coefficient.mul_((COEFFICIENT_RATE * deviation).exp().to(coefficient)).clamp_(*COEFFICIENT_RANGE)
