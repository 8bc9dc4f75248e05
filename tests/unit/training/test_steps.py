"""Every engine computes what autograd does: losses, counts, all gradients, whole steps, resume; over odd shapes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from saetrain.coders.topk import TopK
from saetrain.optim import OptimSettings
from saetrain.training.steps import native
from saetrain.training.steps.autograd import AutogradStep
from saetrain.training.steps.base import TrainStep
from saetrain.training.steps.native import NativeStep
from tests.unit.training.step_checks import (
    CoderAndStep,
    Shape,
    build_reference,
    check_discarded_step,
    check_latents_that_do_not_fire,
    check_resume,
    check_whole_steps,
    make_batch,
    make_coder,
    make_context,
    make_data,
    relative_error,
)

Build = Callable[[TopK, OptimSettings, bool], TrainStep]


def by_torch(use_bf16: bool) -> Build:
    dtype = torch.bfloat16 if use_bf16 else torch.float32
    return lambda coder, settings, no_accumulation: AutogradStep(coder, settings, dtype)


def by_native(use_bf16: bool) -> Build:
    return lambda coder, settings, no_accumulation: NativeStep(
        coder, settings, use_bf16=use_bf16, no_accumulation=no_accumulation
    )


EXACT = {"torch": by_torch(False), "native": by_native(False)}
BF16 = {"torch": by_torch(True), "native": by_native(True)}
NAMES = [*EXACT, *(f"{name} bf16" for name in BF16)]

# (tokens, width, latents, k, dead): odd sizes, k = 1, k = F, dense and sparse shapes, none, some and all dead.
SHAPES = [
    (50, 33, 77, 5, 0),
    (50, 33, 77, 5, 7),
    (1, 8, 16, 1, 3),
    (17, 7, 16, 16, 3),
    (40, 200, 64, 1, 64),
    (300, 128, 500, 32, 30),
    (64, 64, 1601, 8, 100),
    (33, 40, 2100, 2, 0),
    (129, 96, 1300, 100, 20),
]


def make(build: Build, shape: Shape, *, no_accumulation: bool = False, **settings: object) -> CoderAndStep:
    coder = make_coder(shape)
    return coder, build(coder, OptimSettings(**settings), no_accumulation)  # type: ignore[arg-type]


def find_build(name: str) -> Build:
    """Return the builder of a name such as ``native``, ``native bf16`` or ``native accumulated``."""
    builds = BF16 if "bf16" in name else EXACT
    return build_reference if name == "reference" else builds[name.split()[0]]


def gradients(coder: TopK, engine: TrainStep) -> dict[str, Tensor]:
    """All four gradients, (D, F) for the encoder's."""
    if isinstance(engine, NativeStep):
        grads = {name: value.clone() for name, value in engine._grads.items()}
        return {
            "W_enc": grads["g_enc"].T,
            "W_dec": grads["g_dec"],
            "b_enc": grads["g_b"],
            "b_dec": engine._g_b_dec.float(),
        }
    return {name: p.grad.clone() for name, p in coder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_losses_counts_and_gradients_are_autograd_s(name: str, shape: Shape) -> None:
    x = make_data(shape[0], shape[1])
    (plain, one), (coder, two) = make(build_reference, shape), make(EXACT[name], shape)
    expected, found = one.forward_backward(x, make_context(shape)), two.forward_backward(x, make_context(shape))
    assert torch.equal(found.fired, expected.fired)
    assert found.tokens == shape[0]
    assert found.losses.keys() == expected.losses.keys()
    for key, loss in expected.losses.items():
        torch.testing.assert_close(found.losses[key], loss.detach(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found.residual_sum, expected.residual_sum, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.residual_square, expected.residual_square, rtol=1e-5, atol=1e-5)
    wanted = gradients(plain, one)
    for key, gradient in gradients(coder, two).items():
        assert relative_error(gradient, wanted[key]) < 2e-5, key


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", BF16)
def test_products_in_bfloat16_are_near(name: str, shape: Shape, dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the same latents are picked; near ties fall otherwise in bfloat16, so the inputs are made to have none."""
    monkeypatch.setattr(native, "dense_limit", lambda half: 10**9 if dense else 0)
    x = make_data(shape[0], shape[1]).bfloat16().float()
    (plain, one), (coder, two) = make(build_reference, shape), make(BF16[name], shape)
    expected, found = one.forward_backward(x, make_context(shape)), two.forward_backward(x, make_context(shape))
    # A pick that differs is one near tie for another, of which there are a few in a hundred.
    assert int((found.fired - expected.fired).abs().sum()) <= 0.04 * shape[0] * shape[3] + 2
    for key, loss in expected.losses.items():
        torch.testing.assert_close(found.losses[key], loss.detach(), rtol=0.02, atol=1e-6)
    wanted = gradients(plain, one)
    same = torch.equal(found.fired, expected.fired)
    for key, gradient in gradients(coder, two).items():
        assert relative_error(gradient, wanted[key]) < (0.05 if same else 0.3), key


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("limit", [1.0, 0.01, 0.0])
@pytest.mark.parametrize("name", [*EXACT, "native accumulated"])
def test_whole_steps_equal_the_reference(name: str, limit: float, shape: Shape) -> None:
    settings = {"max_grad_norm": limit, "weight_decay": 0.1}
    tested = make(find_build(name), shape, no_accumulation="accumulated" not in name, **settings)
    batches = [make_batch(shape, step) for step in range(4)]
    check_whole_steps(make(build_reference, shape, **settings), tested, batches)


@pytest.mark.parametrize("dense", [None, False, True])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] > 3], ids=str)
def test_the_bound_holds_for_micro_batches_together(
    shape: Shape, dense: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also summed over ranks, as :meth:`gradients` hands it out; ``dense`` None: float32."""
    monkeypatch.setattr(native, "dense_limit", lambda half: 10**9 if dense else 0)
    x, about = make_data(shape[0], shape[1]), make_context(shape)
    engines = [make(by_native(dense is not None), shape, max_grad_norm=1e9)[1] for _ in range(3)]
    one, ranks = engines[0], engines[1:]
    for part in x.split(-(-shape[0] // 4)):
        one.forward_backward(part, about)
    for rank, half in zip(ranks, x.split(-(-shape[0] // 2)), strict=True):
        for part in half.split(-(-len(half) // 2)):
            rank.forward_backward(part, about)
    for mine, other in zip(ranks[0].gradients(), ranks[1].gradients(), strict=True):
        mine += other
    bounds = [engine.norm_bound() for engine in (one, ranks[0])]
    norms = [float(engine.optimizer_step(0.0)) for engine in (one, ranks[0])]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3 if dense is None else 0.1)
    for bound, norm in zip(bounds, norms, strict=True):
        assert native.BOUND_MARGIN_BF16 * bound >= norm


@pytest.mark.parametrize("dense", [False, True])
def test_the_bound_is_one_in_bfloat16_too(dense: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "dense_limit", lambda half: 10**9 if dense else 0)
    for seed in range(40):
        shape = (1 + seed % 3, 33, 77, 1 + seed % 2, 0)
        _, engine = make(by_native(True), shape, no_accumulation=True, max_grad_norm=1e9)
        engine.forward_backward(make_data(shape[0], shape[1], seed), make_context(shape))
        bound = engine.norm_bound()
        assert native.BOUND_MARGIN_BF16 * bound >= float(engine.optimizer_step(0.0))


@pytest.mark.parametrize("parts", [2, 3, 5])
@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_add_up_to_one_batch(name: str, parts: int) -> None:
    shape = (60, 33, 177, 5, 9)
    (whole, one), (cut, two) = make(find_build(name), shape), make(find_build(name), shape)
    x = make_data(shape[0], shape[1])
    expected = one.forward_backward(x, make_context(shape))
    found = [two.forward_backward(part, make_context(shape)) for part in x.chunk(parts)]
    assert torch.equal(sum(part.fired for part in found), expected.fired)  # type: ignore[arg-type]
    wanted = gradients(whole, one)
    for key, gradient in gradients(cut, two).items():
        assert relative_error(gradient, wanted[key]) < (5e-3 if "bf16" in name else 1e-5), key


@pytest.mark.parametrize("no_accumulation", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_state_gives_the_same_bits(name: str, no_accumulation: bool) -> None:
    shape = (60, 33, 177, 5, 9)
    whole, later = (make(find_build(name), shape, no_accumulation=no_accumulation) for _ in range(2))
    check_resume(whole, later, [make_batch(shape, step) for step in range(6)], resume_at=3)


@pytest.mark.parametrize("name", EXACT)
def test_the_state_is_the_reference_s(name: str) -> None:
    """So that another kernel could go on from it."""
    shape = (60, 33, 177, 5, 0)
    (_, one), (_, two) = make(build_reference, shape), make(EXACT[name], shape, no_accumulation=True)
    for engine in (one, two):
        engine.forward_backward(make_data(60, 33), make_context(shape))
        engine.norm_bound()
        engine.optimizer_step(1e-2)
    expected = one.state_dict()
    assert two.state_dict().keys() == expected.keys()
    for key, value in two.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_a_discarded_step_changes_nothing(name: str) -> None:
    shape = (60, 33, 177, 5, 9)
    discarded = make_data(60, 33, 9), make_context(shape)
    check_discarded_step(lambda: make(find_build(name), shape, no_accumulation=True), make_batch(shape), discarded)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_that_do_not_lie_in_a_row(name: str) -> None:
    shape = (60, 33, 177, 5, 9)
    wide = make_data(60, 66)
    (whole, one), (apart, two) = make(find_build(name), shape), make(find_build(name), shape)
    one.forward_backward(wide[:, ::2].contiguous(), make_context(shape))
    two.forward_backward(wide[:, ::2], make_context(shape))
    wanted = gradients(whole, one)
    assert all(torch.equal(value, wanted[key]) for key, value in gradients(apart, two).items())


@pytest.mark.parametrize("name", NAMES)
def test_rows_with_fewer_than_k_positive_values(name: str) -> None:
    shape = (20, 12, 90, 8, 0)
    (plain, one), (coder, two) = make(build_reference, shape), make(find_build(name), shape)
    with torch.no_grad():
        for each in (plain, coder):
            each.b_enc.fill_(-0.75)
    x = make_data(20, 12).bfloat16().float()
    expected, found = one.forward_backward(x, make_context(shape)), two.forward_backward(x, make_context(shape))
    assert 0 < int(expected.fired.sum()) < 20 * 8
    assert int((found.fired - expected.fired).abs().sum()) <= ("bf16" in name)
    if "bf16" not in name:
        wanted = gradients(plain, one)
        for key, gradient in gradients(coder, two).items():
            assert relative_error(gradient, wanted[key]) < 2e-5, key


@pytest.mark.parametrize("where", ["input", "weight"])
@pytest.mark.parametrize("no_accumulation", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_shows(name: str, value: float, no_accumulation: bool, where: str) -> None:
    shape = (20, 12, 90, 8, 0)
    coder, engine = make(find_build(name), shape, no_accumulation=no_accumulation)
    x = make_data(20, 12)
    if where == "input":
        x[3, 5] = value
    else:
        with torch.no_grad():
            coder.W_enc[5, 7] = value
        engine.load_state_dict(engine.state_dict())  # so that copies of the weights are made anew
    loss = engine.forward_backward(x, make_context(shape)).losses["recon"]
    bound = engine.norm_bound()
    assert not torch.isfinite(loss) or bound != bound or bound == float("inf")
    engine.zero_grad()


@pytest.mark.slow
def test_fewer_threads_than_were_asked_for_lose_no_token() -> None:
    code = """
import torch
from tests.unit.training.step_checks import make_context, make_data
from tests.unit.training.test_steps import by_native, make
torch.set_num_threads(2)
shape = (100, 33, 77, 5, 0)
_, engine = make(by_native(False), shape, no_accumulation=True)
print(int(engine.forward_backward(make_data(100, 33), make_context(shape)).fired.sum()))
"""
    counts = set()
    for environment in ({}, {"OMP_THREAD_LIMIT": "1"}, {"OMP_DYNAMIC": "true"}):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
        )
        counts.add(done.stdout)
    assert len(counts) == 1


@pytest.mark.parametrize("name", ["reference", *NAMES, "native accumulated"])
def test_a_latent_that_does_not_fire_does_not_change(name: str) -> None:
    """The others change by decay and momentum too."""
    shape = (20, 12, 90, 8, 0)
    tested = make(find_build(name), shape, no_accumulation="accumulated" not in name, weight_decay=0.1)
    check_latents_that_do_not_fire(tested, [make_batch(shape, step) for step in range(4)], n_silent=40)


def test_saes_of_one_shape_use_the_same_memory_in_turn() -> None:
    shape = (20, 12, 90, 8, 0)
    (_, one), (_, two) = (
        make(by_native(False), shape, no_accumulation=True),
        make(by_native(False), shape, no_accumulation=True),
    )
    one.forward_backward(make_data(20, 12), make_context(shape))
    two.forward_backward(make_data(20, 12), make_context(shape))
    with pytest.raises(AssertionError, match="another SAE"):
        one.norm_bound()
