"""Update of the autograd step: its order by hand, and the traits of the coder that it obeys."""

from __future__ import annotations

import pytest
import torch

from saetrain.coders.topk import TopK
from saetrain.optim import ENCODER_LR_RATIO, OptimSettings
from saetrain.training.steps.autograd import AutogradStep

from .step_checks import make_batch, make_coder, take_step

D, F = 5, 9


class FreeNormTopK(TopK):
    """TopK whose decoder rows have any norm."""

    has_unit_norm_decoder = False


class DenselyUpdatedTopK(TopK):
    """TopK whose idle latents move on with Adam's momentum."""

    updates_idle_latents = True


def make(cls: type[TopK] = TopK, **settings: object) -> tuple[TopK, AutogradStep]:
    coder = cls(D, F, 2, seed=1)
    return coder, AutogradStep(coder, OptimSettings(**settings))  # type: ignore[arg-type]


def set_gradients(coder: TopK, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    grads = {name: torch.randn(p.shape, generator=generator) for name, p in coder.named_parameters()}
    for name, parameter in coder.named_parameters():
        parameter.grad = torch.empty_like(parameter).copy_(grads[name])
    return grads


@pytest.mark.parametrize("cls", [TopK, FreeNormTopK])
def test_one_step_by_hand_project_clip_step_renormalize(cls: type[TopK]) -> None:
    coder, step = make(cls, max_grad_norm=0.5)
    before = {name: p.detach().clone() for name, p in coder.named_parameters()}
    grads = set_gradients(coder)
    bound = step.norm_bound()
    norm = step.optimizer_step(0.01)

    if coder.has_unit_norm_decoder:
        along = (grads["W_dec"] * before["W_dec"]).sum(dim=1, keepdim=True)
        grads["W_dec"] = grads["W_dec"] - along * before["W_dec"]
    expected_norm = torch.cat([g.flatten() for g in grads.values()]).norm()
    torch.testing.assert_close(norm, expected_norm)
    assert bound == float(norm)
    scale = 0.5 / (expected_norm + 1e-6)
    assert scale < 1, "the gradient must be clipped here"
    for name, grad in grads.items():
        clipped = grad * scale
        # Adam's first step, bias corrected: m = g, v = g².
        rate = 0.01 * (ENCODER_LR_RATIO if name.endswith("_enc") else 1)
        expected = before[name] - rate * clipped / (clipped.abs() + 1e-8)
        if name == "W_dec" and coder.has_unit_norm_decoder:
            expected = expected / expected.norm(dim=1, keepdim=True)
        torch.testing.assert_close(dict(coder.named_parameters())[name].detach(), expected, msg=name)


def test_moments_are_those_of_the_clipped_gradient() -> None:
    """Adam's first step hides the scale of its gradient, its moments do not."""
    moments = {}
    for limit in (0.5, 0.0):
        coder, step = make(max_grad_norm=limit)
        set_gradients(coder)
        step.norm_bound()
        norm = step.optimizer_step(0.01)
        moments[limit] = step.state_dict()["W_enc.exp_avg"].clone()
    torch.testing.assert_close(moments[0.5], moments[0.0] * 0.5 / (norm + 1e-6))


def test_projected_gradient_is_orthogonal_to_the_decoder() -> None:
    coder, step = make()
    set_gradients(coder)
    step.norm_bound()
    assert coder.W_dec.grad is not None
    assert (coder.W_dec.grad * coder.W_dec).sum(dim=1).abs().max() < 1e-5
    for seed in range(3):
        set_gradients(coder, seed)
        step.norm_bound()
        step.optimizer_step(0.1)
        torch.testing.assert_close(coder.W_dec.norm(dim=1), torch.ones(F))


def test_sgd_keeps_the_momentum_of_idle_latents() -> None:
    coder, step = make(optimizer="sgd")
    set_gradients(coder)
    step.norm_bound()
    step.optimizer_step(0.05)
    before = coder.b_enc.detach().clone()
    for parameter in coder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step.norm_bound()
    step.optimizer_step(0.05)
    assert (coder.b_enc != before).all()


@pytest.mark.parametrize("cls", [TopK, DenselyUpdatedTopK])
def test_idle_latents_are_updated_if_the_coder_asks_for_it(cls: type[TopK]) -> None:
    shape = (20, 12, 90, 8, 0)
    coder = cls(12, 90, 8)
    coder.load_state_dict(make_coder(shape).state_dict())
    step = AutogradStep(coder, OptimSettings())
    take_step(step, make_batch(shape, 0))
    with torch.no_grad():
        coder.b_enc[:40] = -100.0
    before = coder.W_enc.detach().clone()
    fired = take_step(step, make_batch(shape, 1))
    assert not fired[:40].any()
    changed = (coder.W_enc != before).any(dim=0)
    # Momentum moves the latents that fired in the first step.
    assert bool(changed[:40].any()) == coder.updates_idle_latents
    assert changed[fired > 0].all()
