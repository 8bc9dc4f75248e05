"""Architectures whose L0 is controlled reach --k in training and on other data, and their control is stable."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saetrain.coders import CODERS
from saetrain.coders.l0_control import move_target_, scale_coefficient_
from saetrain.optim import OptimSettings, lr_factor
from saetrain.training.steps.autograd import AutogradStep
from saetrain.types import StepContext

D, F, N = 16, 64, 128


def draw_sparse(generator: torch.Generator, tokens: int) -> Tensor:
    """Sums of a few of 48 directions, with unit mean square per dimension."""
    directions = torch.randn(48, D, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(tokens, 48, generator=generator) * (torch.rand(tokens, 48, generator=generator) < 0.08)
    return 1.2 * (weights @ directions) + 0.05 * torch.randn(tokens, D, generator=generator)


@pytest.mark.parametrize(
    ("architecture", "k", "steps"), [("jumprelu", 3, 600), ("jumprelu", 6, 600), ("standard", 6, 1000)]
)
def test_the_l0_of_training_and_of_other_data_is_k(architecture: str, k: int, steps: int) -> None:
    cls, generator = CODERS[architecture], torch.Generator().manual_seed(1)
    coder = cls.build(cls.Settings(k=k, num_latents=F), D, seed=1)
    step, variance, fired = AutogradStep(coder, OptimSettings()), torch.tensor(float(D)), []
    for number in range(steps):
        ctx = StepContext(number, N, None, variance, variance, total_steps=steps)
        stats = step.forward_backward(draw_sparse(generator, N), ctx)
        step.norm_bound()
        step.optimizer_step(0.01 * lr_factor(number, steps, 50))
        coder.after_step(stats.sums, ctx)
        fired.append(float(stats.fired.sum()) / N)
    assert not 0.95 < fired[0] / k < 1.05, "the L0 was right from the start"
    assert sum(fired[-100:]) / 100 == pytest.approx(k, rel=0.05)
    with torch.no_grad():
        held_out = coder.encode(draw_sparse(generator, 4000)).l0_per_token().float().mean()
    assert float(held_out) == pytest.approx(k, rel=0.05)
    assert float(stats.losses["recon"]) < 0.4


def sums(l0: float) -> dict[str, Tensor]:
    return {"l0": torch.tensor(l0 * 10).double(), "tokens": torch.tensor(10.0).double()}


def test_controls_move_against_the_deviation() -> None:
    target, coefficient = torch.ones(()), torch.ones(())
    move_target_(target, sums(44.0), 40)
    scale_coefficient_(coefficient, sums(44.0), 40)
    assert (float(target), float(coefficient)) == pytest.approx((0.9995, 1.005), abs=1e-4)
    for _ in range(2000):
        move_target_(target, sums(0.0), 40)
    assert float(target) == 1.5
    scale_coefficient_(coefficient.fill_(1.0), sums(4000.0), 40)
    assert float(coefficient) == pytest.approx(1.0513, abs=1e-4)


def test_a_coefficient_at_the_end_of_its_range_comes_back() -> None:
    coefficient = torch.tensor(0.001)
    for _ in range(10_000):
        scale_coefficient_(coefficient, sums(0.0), 40)
    assert 0 < coefficient < 1e-6
    lowest = float(coefficient)
    for _ in range(100):
        scale_coefficient_(coefficient, sums(80.0), 40)
    assert coefficient > 10 * lowest
    for _ in range(10_000):
        scale_coefficient_(coefficient, sums(1000.0), 40)
    assert torch.isfinite(coefficient)
