"""The optimizer's order by hand, the learning rate's schedule and rule, and decay where it belongs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from saetrain.coders.topk import TopK
from saetrain.optim import (
    AUTO_WEIGHT_DECAY,
    ENCODER_LR_RATIO,
    LR_DECAY_SHARE,
    LR_POWER_K,
    LR_POWER_LATENTS,
    LR_POWER_STEPS,
    LR_POWER_TOKENS,
    LR_RULE_BASE,
    Optimizer,
    OptimSettings,
    RunSize,
    describe_small_sgd_lr,
    describe_unusual_lr,
    lr_factor,
    recommended_lr,
    resolve_warmup_steps,
)

D, F = 5, 9


def make(latents: int = F, **settings: object) -> tuple[TopK, Optimizer]:
    coder = TopK(D, latents, min(2, latents), seed=1)
    optimizer = Optimizer(
        dict(coder.named_parameters()),
        OptimSettings(**settings),  # type: ignore[arg-type]
        project=coder.remove_parallel_gradient,
        renormalize=coder.renormalize_decoder,
    )
    return coder, optimizer


def give_gradients(coder: TopK, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    grads = {name: torch.randn(p.shape, generator=generator) for name, p in coder.named_parameters()}
    for name, parameter in coder.named_parameters():
        parameter.grad = torch.empty_like(parameter).copy_(grads[name])
    return grads


def test_one_step_by_hand_project_clip_step_renormalise() -> None:
    coder, optimizer = make(max_grad_norm=0.5)
    before = {name: p.detach().clone() for name, p in coder.named_parameters()}
    grads = give_gradients(coder)
    norm = optimizer.project_gradients()
    optimizer.step(0.01, norm)

    along = (grads["W_dec"] * before["W_dec"]).sum(dim=1, keepdim=True)
    grads["W_dec"] = grads["W_dec"] - along * before["W_dec"]
    expected_norm = torch.cat([g.flatten() for g in grads.values()]).norm()
    torch.testing.assert_close(norm, expected_norm)
    scale = 0.5 / (expected_norm + 1e-6)
    assert scale < 1, "the clip must be at work here"
    for name, grad in grads.items():
        clipped = grad * scale
        # Adam's first step, bias corrected: m = g, v = g².
        rate = 0.01 * (ENCODER_LR_RATIO if name.endswith("_enc") else 1)
        expected = before[name] - rate * clipped / (clipped.abs() + 1e-8)
        if name == "W_dec":
            expected = expected / expected.norm(dim=1, keepdim=True)
        torch.testing.assert_close(dict(coder.named_parameters())[name].detach(), expected, msg=name)


def test_clipping_shows_in_what_adam_remembers() -> None:
    """Adam's first step hides the scale of its gradient, its moments do not."""
    moments = {}
    for limit in (0.5, 0.0):
        coder, optimizer = make(max_grad_norm=limit)
        give_gradients(coder)
        norm = optimizer.project_gradients()
        optimizer.step(0.01, norm)
        moments[limit] = optimizer.state_dict()["W_enc.exp_avg"].clone()
    torch.testing.assert_close(moments[0.5], moments[0.0] * 0.5 / (norm + 1e-6))


def test_the_projected_gradient_leaves_the_norm_alone() -> None:
    coder, optimizer = make()
    give_gradients(coder)
    optimizer.project_gradients()
    assert coder.W_dec.grad is not None
    assert (coder.W_dec.grad * coder.W_dec).sum(dim=1).abs().max() < 1e-5
    for step in range(3):
        give_gradients(coder, step)
        optimizer.step(0.1, optimizer.project_gradients())
        torch.testing.assert_close(coder.W_dec.norm(dim=1), torch.ones(F))


def test_weight_decay_shrinks_the_encoder_alone() -> None:
    after = {}
    for decay in (0.0, 0.1):
        coder, optimizer = make(weight_decay=decay)
        start = coder.W_enc.detach().clone()
        give_gradients(coder)
        optimizer.step(0.5, optimizer.project_gradients())
        after[decay] = {name: p.detach().clone() for name, p in coder.named_parameters()}
    expected = after[0.0].pop("W_enc") - ENCODER_LR_RATIO * 0.5 * 0.1 * start
    torch.testing.assert_close(after[0.1].pop("W_enc"), expected)
    for name, value in after[0.0].items():
        assert torch.equal(after[0.1][name], value), name


@pytest.mark.parametrize("latents", [F, D, 1])
def test_adam_leaves_latents_without_a_gradient_alone(latents: int) -> None:
    coder, optimizer = make(latents, weight_decay=0.1)
    idle = torch.arange(latents) % 3 == 1
    for step in range(3):
        give_gradients(coder, step)
        if step == 2:
            before = {key: value.clone() for key, value in {**optimizer.state_dict(), **coder.state_dict()}.items()}
            for name in ("W_enc", "W_dec", "b_enc"):
                grad = getattr(coder, name).grad
                (grad.T if name == "W_enc" else grad)[idle] = 0
        optimizer.step(0.05, optimizer.project_gradients())
    for key, value in {**optimizer.state_dict(), **coder.state_dict()}.items():
        if not key.startswith("b_dec") and not key.endswith(".step"):
            new, old = (value.T, before[key].T) if key.startswith("W_enc") else (value, before[key])
            assert torch.equal(new[idle], old[idle]), key
            assert (new[~idle] != old[~idle]).reshape(int((~idle).sum()), -1).any(dim=1).all(), key


def test_sgd_keeps_the_momentum_of_all_latents() -> None:
    coder, optimizer = make(optimizer="sgd")
    give_gradients(coder)
    optimizer.step(0.05, optimizer.project_gradients())
    before = coder.b_enc.detach().clone()
    for parameter in coder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.05, optimizer.project_gradients())
    assert (coder.b_enc != before).all()


@pytest.mark.parametrize("latents", [F, D])
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_state_goes_on_exactly(name: str, latents: int) -> None:
    (one, first), (two, second) = make(latents, optimizer=name), make(latents, optimizer=name)
    for step in range(6):
        give_gradients(one, step)
        first.step(0.05, first.project_gradients())
        if step == 2:
            two.load_state_dict(one.state_dict())
            second.load_state_dict({key: value.clone() for key, value in first.state_dict().items()})
        if step > 2:
            give_gradients(two, step)
            second.step(0.05, second.project_gradients())
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def test_state_is_restored_on_the_parameters_device() -> None:
    """Meta stands for a GPU: what a checkpoint holds is read on the CPU."""
    coder, optimizer = make()
    give_gradients(coder)
    optimizer.step(0.05, optimizer.project_gradients())
    state = optimizer.state_dict()
    elsewhere = TopK(D, F, 2).to("meta")
    moved = Optimizer(
        dict(elsewhere.named_parameters()), OptimSettings(), project=lambda: None, renormalize=lambda: None
    )
    moved.load_state_dict(state)
    assert {value.device.type for value in moved.state_dict().values()} == {"meta"}


def test_weight_decay_comes_with_the_rule_unless_given() -> None:
    assert OptimSettings().effective_weight_decay == 0.0
    assert OptimSettings(lr="auto").effective_weight_decay == AUTO_WEIGHT_DECAY > 0
    assert OptimSettings(lr="auto", weight_decay=0.0).effective_weight_decay == 0.0
    assert OptimSettings(weight_decay=0.02).effective_weight_decay == 0.02


def test_schedule_rises_holds_and_falls_to_nothing() -> None:
    steps, warmup = 100, 10
    factors = [lr_factor(step, steps, warmup) for step in range(steps)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[:11] == sorted(factors[:11])
    assert factors[10:20] == [1.0] * 10
    assert factors[20:] == sorted(factors[20:], reverse=True)
    assert factors[21] < 1
    assert 0 < factors[99] < 0.02, "the last step is small, and not lost"
    assert lr_factor(0, 1, 0) > 0


def test_warmup_is_a_twentieth_of_the_run_at_most_1000() -> None:
    assert [resolve_warmup_steps(OptimSettings(), steps) for steps in (5, 400, 50_000)] == [0, 20, 1000]
    assert resolve_warmup_steps(OptimSettings(lr_warmup_steps=7), 400) == 7


SIZE = RunSize(num_latents=2**14, k=32, tokens_per_step=2048, steps=500)


def test_the_rule_by_hand() -> None:
    assert recommended_lr(RunSize(3072, 32, 1024, 400)) == pytest.approx(0.016)
    assert recommended_lr(RunSize(12288, 64, 4096, 4000)) == pytest.approx(
        0.016 * 4**-0.4 * 2**0.1 * 4**0.25 * 10**-0.2
    )


def test_the_page_has_the_rule_of_the_code() -> None:
    page = (Path(__file__).parents[2] / "docs" / "recipe.md").read_text()
    rule = (
        f"{LR_RULE_BASE:g} · (F/3072)^{LR_POWER_LATENTS:g} · (k/32)^{LR_POWER_K:g} · "
        f"(N/1024)^{LR_POWER_TOKENS:g} · (S/400)^{LR_POWER_STEPS:g}"
    )
    assert rule in page
    assert f"linearly to zero over the last {100 * LR_DECAY_SHARE:.0f} %" in page
    assert f"| weight decay | {AUTO_WEIGHT_DECAY:g} on" in page


def test_the_rule_falls_with_width_and_length_and_rises_with_k() -> None:
    rule = recommended_lr(SIZE)
    assert recommended_lr(replace(SIZE, num_latents=2**16)) < rule < recommended_lr(replace(SIZE, num_latents=2**12))
    assert recommended_lr(replace(SIZE, steps=5000)) < rule < recommended_lr(replace(SIZE, steps=50))
    assert recommended_lr(replace(SIZE, k=16)) < rule < recommended_lr(replace(SIZE, k=64))


@pytest.mark.parametrize(
    ("factor", "said"), [(1.0, None), (2.9, None), (3.1, "3.1 times"), (0.32, "1/3.1 of"), (50.0, "50.0 times")]
)
def test_rates_far_off_the_rule_are_remarked(factor: float, said: str | None) -> None:
    remark = describe_unusual_lr(factor * recommended_lr(SIZE), recommended_lr(SIZE), "a run")
    assert (remark is None) if said is None else (remark is not None and said in remark and "--lr auto" in remark)


def test_sgd_says_what_rates_train() -> None:
    assert "too small for --optimizer sgd" in str(describe_small_sgd_lr(0.001))
    assert describe_small_sgd_lr(1.0) is None
