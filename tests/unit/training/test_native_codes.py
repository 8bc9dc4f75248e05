"""NativeStep with another number of active latents per token does what autograd does."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from saetrain.coders import SparseCoder
from saetrain.coders.batchtopk import BatchTopK
from saetrain.coders.jumprelu import JumpReLU
from saetrain.coders.matryoshka import Matryoshka
from saetrain.optim import OptimSettings
from saetrain.training.steps.autograd import AutogradStep
from saetrain.training.steps.native import NativeStep
from saetrain.types import StepContext, TokenGroups

TOKENS, WIDTH, LATENTS = 96, 40, 300
CODERS: dict[str, Callable[[], BatchTopK | JumpReLU]] = {
    "batchtopk": lambda: BatchTopK(WIDTH, LATENTS, 5, auxk_alpha=0.1),
    "matryoshka": lambda: Matryoshka(WIDTH, LATENTS, 5, (20, 75, 150, LATENTS)),
    "matryoshka with AuxK": lambda: Matryoshka(WIDTH, LATENTS, 5, (1, LATENTS), 0.1),
    "one latent per token": lambda: BatchTopK(WIDTH, LATENTS, 1),
    "all latents": lambda: BatchTopK(WIDTH, 24, 24),
    "jumprelu": lambda: JumpReLU(WIDTH, LATENTS, 5, l0_weight=0.5, bandwidth=0.5, dead_pre_weight=0.0),
    "jumprelu with many latents in the window": lambda: JumpReLU(WIDTH, LATENTS, 5, 2.0, 3.0, 0.0),
    "jumprelu with few latents in the window": lambda: JumpReLU(WIDTH, LATENTS, 5, 2.0, 0.01, 0.0),
}


def build_context(coder: SparseCoder, n_groups: int) -> StepContext:
    """Return a context with every ninth latent dead, and groups whose rows are mixed."""
    dead = torch.arange(coder.num_latents) % 9 == 0 if coder.uses_dead_latents else None
    position = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(1))
    groups = TokenGroups(position, TOKENS // n_groups, n_groups)
    return StepContext(0, TOKENS, dead, torch.tensor(float(WIDTH)), torch.tensor(1.0), groups=groups)


BF16_CODERS: dict[str, Callable[[], BatchTopK | JumpReLU]] = {
    "batchtopk": CODERS["batchtopk"],
    "batchtopk with dense products": lambda: BatchTopK(WIDTH, LATENTS, LATENTS // 4),
    "matryoshka": CODERS["matryoshka"],
    "jumprelu": CODERS["jumprelu"],
    "jumprelu with dense products": lambda: JumpReLU(WIDTH, LATENTS, LATENTS // 4, 0.5, 0.5, 0.0),
}


@pytest.mark.parametrize("name", BF16_CODERS)
def test_bf16_steps_are_close_to_those_of_fp32(name: str) -> None:
    coder, expected = BF16_CODERS[name](), BF16_CODERS[name]()
    step = NativeStep(coder, OptimSettings(), use_bf16=True, no_accumulation=True)
    exact = NativeStep(expected, OptimSettings(), use_bf16=False, no_accumulation=True)
    assert step.uses_dense_products == ("dense" in name)
    ctx, generator = build_context(coder, 3), torch.Generator().manual_seed(0)
    for _ in range(3):
        x = torch.randn(TOKENS, WIDTH, generator=generator)
        found, wanted = step.forward_backward(x, ctx), exact.forward_backward(x, ctx)
        for key, loss in wanted.losses.items():
            torch.testing.assert_close(found.losses[key], loss, rtol=0.03, atol=0)
        assert (found.fired - wanted.fired).abs().sum() <= 0.03 * wanted.fired.sum()
        assert exact.norm_bound() <= 1.05 * step.norm_bound()
        torch.testing.assert_close(step.optimizer_step(1e-4), exact.optimizer_step(1e-4), rtol=0.02, atol=0)
    moved = [(coder.get_parameter(key) - weight).abs().mean() for key, weight in expected.named_parameters()]
    assert max(moved) < 3e-5, moved


@pytest.mark.parametrize("overflow", [False, True])
def test_many_equal_pre_activations_fit_the_memory(overflow: bool) -> None:
    coder = BatchTopK(16, 2048, 1)
    with torch.no_grad():
        coder.b_enc.fill_(3.4e38 if overflow else 1.0)
        coder.W_enc.mul_(1e38 if overflow else 0.0)
    step = NativeStep(coder, OptimSettings(), use_bf16=False, no_accumulation=True)
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    stats = step.forward_backward(x, StepContext(0, 256, None, torch.tensor(16.0), torch.tensor(1.0)))
    if not overflow:
        assert stats.fired.tolist() == [1] * 256 + [0] * (2048 - 256) or int(stats.fired.sum()) == 256
    assert math.isfinite(stats.losses["recon"]) != overflow


@pytest.mark.parametrize("no_accumulation", [True, False])
@pytest.mark.parametrize("n_groups", [1, 3])
@pytest.mark.parametrize("name", CODERS)
def test_steps_are_those_of_autograd(name: str, n_groups: int, no_accumulation: bool) -> None:
    coder, expected = CODERS[name](), CODERS[name]()
    settings = OptimSettings()
    step = NativeStep(coder, settings, use_bf16=False, no_accumulation=no_accumulation)
    reference = AutogradStep(expected, settings, is_plain=True)
    ctx = build_context(coder, n_groups)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        x = torch.randn(TOKENS, WIDTH, generator=generator)
        found, wanted = step.forward_backward(x, ctx), reference.forward_backward(x, ctx)
        assert found.losses.keys() == wanted.losses.keys()
        for key, loss in wanted.losses.items():
            torch.testing.assert_close(found.losses[key], loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(found.fired, wanted.fired)
        torch.testing.assert_close(found.sums, wanted.sums)
        torch.testing.assert_close(found.residual_sum, wanted.residual_sum, rtol=0, atol=1e-4)
        bound, norm = step.norm_bound(), reference.norm_bound()
        assert norm <= bound * 1.0001
        torch.testing.assert_close(float(step.optimizer_step(1e-4)), norm, rtol=1e-4, atol=0)
        reference.optimizer_step(1e-4)
        for key, weight in expected.named_parameters():
            # Adam turns a gradient near zero into a whole step of any sign.
            assert (coder.get_parameter(key) - weight).abs().mean() < 1e-6, key


def test_a_threshold_that_is_too_high_does_not_change_the_code() -> None:
    coders = BatchTopK(WIDTH, LATENTS, 5), BatchTopK(WIDTH, LATENTS, 5)
    steps = [NativeStep(coder, OptimSettings(), use_bf16=False, no_accumulation=True) for coder in coders]
    coders[1].threshold.fill_(1e6)
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    first, second = (step.forward_backward(x, build_context(coders[0], 1)) for step in steps)
    assert torch.equal(first.fired, second.fired)
    assert first.sums == second.sums
    assert int(first.fired.sum()) == 5 * TOKENS


@pytest.mark.parametrize("use_bf16", [False, True])
@pytest.mark.parametrize("name", BF16_CODERS)
@pytest.mark.parametrize("where", ["input", "weight"])
def test_nan_reaches_the_loss(where: str, name: str, use_bf16: bool) -> None:
    coder = BF16_CODERS[name]()
    x = torch.randn(TOKENS, WIDTH)
    if where == "input":
        x[3, 4] = math.nan
    else:
        with torch.no_grad():
            coder.W_enc[3, 4] = math.nan
            coder.b_enc[0] = 50
    step = NativeStep(coder, OptimSettings(), use_bf16=use_bf16, no_accumulation=True)
    assert math.isnan(step.forward_backward(x, build_context(coder, 1)).losses["recon"])
