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
from saetrain.optim import Optimizer, OptimSettings
from saetrain.training.steps import native
from saetrain.training.steps.base import ReferenceStep, TrainStep
from saetrain.training.steps.native import NativeStep
from saetrain.training.steps.pytorch import TorchStep
from saetrain.types import StepContext

Build = Callable[[TopK, OptimSettings, bool], TrainStep]


def optimizer(coder: TopK, settings: OptimSettings) -> Optimizer:
    return Optimizer(
        dict(coder.named_parameters()),
        settings,
        project=coder.remove_parallel_gradient,
        renormalize=coder.renormalize_decoder,
    )


def reference(coder: TopK, settings: OptimSettings, fused: bool = False) -> TrainStep:
    return ReferenceStep(coder, optimizer(coder, settings))


def by_torch(half: bool) -> Build:
    dtype = torch.bfloat16 if half else torch.float32
    return lambda coder, settings, fused: TorchStep(coder, optimizer(coder, settings), dtype)


def by_native(half: bool) -> Build:
    return lambda coder, settings, fused: NativeStep(coder, settings, use_bf16=half, no_accumulation=fused)


EXACT = {"torch": by_torch(False), "native": by_native(False)}
HALF = {"torch": by_torch(True), "native": by_native(True)}

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


def data(tokens: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=generator) + torch.randn(width, generator=generator)


def make(
    build: Build, shape: tuple[int, int, int, int, int], *, fused: bool = False, **settings: object
) -> tuple[TopK, TrainStep]:
    _, width, latents, k, _ = shape
    coder = TopK(width, latents, k, auxk_alpha=1 / 32, seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        coder.b_enc.copy_(torch.randn(latents, generator=generator) * 0.3)
        coder.b_dec.copy_(torch.randn(width, generator=generator) * 0.3)
    return coder, build(coder, OptimSettings(**settings), fused)  # type: ignore[arg-type]


def progress(shape: tuple[int, int, int, int, int], tokens: int | None = None, step: int = 0) -> StepContext:
    count, width, latents, _, dead = shape
    mask = None
    if dead:
        mask = torch.zeros(latents, dtype=torch.bool)
        mask[torch.randperm(latents, generator=torch.Generator().manual_seed(step))[:dead]] = True
    return StepContext(step, tokens or count, mask, torch.tensor(float(width)), torch.tensor(width * 0.7))


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


def relative(value: Tensor, expected: Tensor) -> float:
    """Error as a share of the length of what is expected."""
    return float((value - expected).norm() / expected.norm().clamp_min(1e-12))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_losses_counts_and_gradients_are_autograd_s(name: str, shape: tuple[int, int, int, int, int]) -> None:
    x = data(shape[0], shape[1])
    (plain, one), (coder, two) = make(reference, shape), make(EXACT[name], shape)
    expected, found = one.forward_backward(x, progress(shape)), two.forward_backward(x, progress(shape))
    assert torch.equal(found.fired, expected.fired)
    assert found.tokens == shape[0]
    assert found.losses.keys() == expected.losses.keys()
    for key, loss in expected.losses.items():
        torch.testing.assert_close(found.losses[key], loss.detach(), rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found.residual_sum, expected.residual_sum, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.residual_square, expected.residual_square, rtol=1e-5, atol=1e-5)
    wanted = gradients(plain, one)
    for key, gradient in gradients(coder, two).items():
        assert relative(gradient, wanted[key]) < 2e-5, key


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", HALF)
def test_products_in_bfloat16_are_near(
    name: str, shape: tuple[int, int, int, int, int], dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the same latents are picked; near ties fall otherwise in bfloat16, so the inputs are made to have none."""
    monkeypatch.setattr(native, "dense_limit", lambda half: 10**9 if dense else 0)
    x = data(shape[0], shape[1]).bfloat16().float()
    (plain, one), (coder, two) = make(reference, shape), make(HALF[name], shape)
    expected, found = one.forward_backward(x, progress(shape)), two.forward_backward(x, progress(shape))
    # A pick that differs is one near tie for another, of which there are a few in a hundred.
    assert int((found.fired - expected.fired).abs().sum()) <= 0.04 * shape[0] * shape[3] + 2
    for key, loss in expected.losses.items():
        torch.testing.assert_close(found.losses[key], loss.detach(), rtol=0.02, atol=1e-6)
    wanted = gradients(plain, one)
    same = torch.equal(found.fired, expected.fired)
    for key, gradient in gradients(coder, two).items():
        assert relative(gradient, wanted[key]) < (0.05 if same else 0.3), key


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("limit", [1.0, 0.01, 0.0])
@pytest.mark.parametrize("name", [*EXACT, "native stored"])
def test_whole_steps_are_the_reference_s(name: str, limit: float, shape: tuple[int, int, int, int, int]) -> None:
    settings = {"max_grad_norm": limit, "weight_decay": 0.1}
    plain, one = make(reference, shape, **settings)
    coder, two = make(EXACT[name.split()[0]], shape, fused="stored" not in name, **settings)
    start = {key: p.detach().clone() for key, p in plain.named_parameters()}
    for step in range(4):
        x, about = data(shape[0], shape[1], step), progress(shape, step=step)
        for engine in (one, two):
            engine.forward_backward(x, about)
        bound = two.norm_bound()
        one.norm_bound()
        expected, found = one.optimizer_step(1e-2), two.optimizer_step(1e-2)
        torch.testing.assert_close(found, expected.detach(), rtol=1e-3, atol=1e-7)
        assert bound >= float(found) * 0.9999
    for key, p in plain.named_parameters():
        moved = p.detach() - start[key]
        # Adam turns what rounding leaves of a zero gradient into a whole step, so single entries may differ.
        assert relative(dict(coder.named_parameters())[key].detach() - start[key], moved) < 0.02, key
    torch.testing.assert_close(coder.W_dec.norm(dim=1), torch.ones(shape[2]))


@pytest.mark.parametrize("dense", [None, False, True])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] > 3], ids=str)
def test_the_bound_holds_for_micro_batches_together(
    shape: tuple[int, int, int, int, int], dense: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also summed over ranks, as :meth:`gradients` hands it out; ``dense`` None: float32."""
    monkeypatch.setattr(native, "dense_limit", lambda half: 10**9 if dense else 0)
    x, about = data(shape[0], shape[1]), progress(shape)
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
        _, engine = make(by_native(True), shape, fused=True, max_grad_norm=1e9)
        engine.forward_backward(data(shape[0], shape[1], seed), progress(shape))
        bound = engine.norm_bound()
        assert native.BOUND_MARGIN_BF16 * bound >= float(engine.optimizer_step(0.0))


@pytest.mark.parametrize("parts", [2, 3, 5])
@pytest.mark.parametrize("name", [*EXACT, *(f"{name} half" for name in HALF)])
def test_micro_batches_add_up_to_one_batch(name: str, parts: int) -> None:
    shape = (60, 33, 177, 5, 9)
    build = (HALF if "half" in name else EXACT)[name.split()[0]]
    (whole, one), (cut, two) = make(build, shape), make(build, shape)
    x = data(shape[0], shape[1])
    expected = one.forward_backward(x, progress(shape))
    found = [two.forward_backward(part, progress(shape)) for part in x.chunk(parts)]
    assert torch.equal(sum(part.fired for part in found), expected.fired)  # type: ignore[arg-type]
    wanted = gradients(whole, one)
    for key, gradient in gradients(cut, two).items():
        assert relative(gradient, wanted[key]) < (5e-3 if "half" in name else 1e-5), key


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", [*EXACT, *(f"{name} half" for name in HALF)])
def test_state_goes_on_to_the_bit(name: str, fused: bool) -> None:
    shape = (60, 33, 177, 5, 9)
    build = (HALF if "half" in name else EXACT)[name.split()[0]]
    (whole, one), (later, two) = make(build, shape, fused=fused), make(build, shape, fused=fused)
    for step in range(6):
        x, about = data(shape[0], shape[1], step), progress(shape, step=step)
        if step == 3:
            later.load_state_dict(whole.state_dict())
            two.load_state_dict({key: value.clone() for key, value in one.state_dict().items()})
        for engine in (one, two) if step >= 3 else (one,):
            engine.forward_backward(x, about)
            engine.norm_bound()
            engine.optimizer_step(1e-2)
    for key, p in whole.named_parameters():
        assert torch.equal(dict(later.named_parameters())[key], p), key


@pytest.mark.parametrize("name", EXACT)
def test_the_state_is_the_reference_s(name: str) -> None:
    """So that another kernel could go on from it."""
    shape = (60, 33, 177, 5, 0)
    (_, one), (_, two) = make(reference, shape), make(EXACT[name], shape, fused=True)
    for engine in (one, two):
        engine.forward_backward(data(60, 33), progress(shape))
        engine.norm_bound()
        engine.optimizer_step(1e-2)
    expected = one.state_dict()
    assert two.state_dict().keys() == expected.keys()
    for key, value in two.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", [*EXACT, *(f"{name} half" for name in HALF)])
def test_a_dropped_step_leaves_no_trace(name: str) -> None:
    shape = (60, 33, 177, 5, 9)
    build = (HALF if "half" in name else EXACT)[name.split()[0]]
    results = []
    for dropped in (False, True):
        coder, engine = make(build, shape, fused=True)
        if dropped:
            engine.forward_backward(data(60, 33, 9), progress(shape))
            engine.zero_grad()
        engine.forward_backward(data(60, 33), progress(shape))
        engine.norm_bound()
        engine.optimizer_step(1e-2)
        results.append([p.detach().clone() for p in coder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", [*EXACT, *(f"{name} half" for name in HALF)])
def test_inputs_that_do_not_lie_in_a_row(name: str) -> None:
    shape = (60, 33, 177, 5, 9)
    build = (HALF if "half" in name else EXACT)[name.split()[0]]
    wide = data(60, 66)
    (whole, one), (apart, two) = make(build, shape), make(build, shape)
    one.forward_backward(wide[:, ::2].contiguous(), progress(shape))
    two.forward_backward(wide[:, ::2], progress(shape))
    wanted = gradients(whole, one)
    assert all(torch.equal(value, wanted[key]) for key, value in gradients(apart, two).items())


@pytest.mark.parametrize("name", [*EXACT, *(f"{name} half" for name in HALF)])
def test_rows_with_fewer_than_k_positive_values(name: str) -> None:
    shape = (20, 12, 90, 8, 0)
    build = (HALF if "half" in name else EXACT)[name.split()[0]]
    (plain, one), (coder, two) = make(reference, shape), make(build, shape)
    with torch.no_grad():
        for each in (plain, coder):
            each.b_enc.fill_(-0.75)
    if isinstance(two, TorchStep):
        two._weight_copies = None
    x = data(20, 12).bfloat16().float()
    expected, found = one.forward_backward(x, progress(shape)), two.forward_backward(x, progress(shape))
    assert 0 < int(expected.fired.sum()) < 20 * 8
    assert int((found.fired - expected.fired).abs().sum()) <= ("half" in name)
    if "half" not in name:
        wanted = gradients(plain, one)
        for key, gradient in gradients(coder, two).items():
            assert relative(gradient, wanted[key]) < 2e-5, key


@pytest.mark.parametrize("where", ["input", "weight"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [*EXACT, *(f"{name} half" for name in HALF)])
def test_what_is_not_finite_shows(name: str, value: float, fused: bool, where: str) -> None:
    shape = (20, 12, 90, 8, 0)
    build = (HALF if "half" in name else EXACT)[name.split()[0]]
    coder, engine = make(build, shape, fused=fused)
    x = data(20, 12)
    if where == "input":
        x[3, 5] = value
    else:
        with torch.no_grad():
            coder.W_enc[5, 7] = value
        engine.load_state_dict(engine.state_dict())  # so that copies of the weights are made anew
    loss = engine.forward_backward(x, progress(shape)).losses["recon"]
    bound = engine.norm_bound()
    assert not torch.isfinite(loss) or bound != bound or bound == float("inf")
    engine.zero_grad()


@pytest.mark.slow
def test_fewer_threads_than_were_asked_for_lose_no_token() -> None:
    code = """
import torch
from tests.unit.training.test_steps import by_native, data, make, progress
torch.set_num_threads(2)
shape = (100, 33, 77, 5, 0)
_, engine = make(by_native(False), shape, fused=True)
print(int(engine.forward_backward(data(100, 33), progress(shape)).fired.sum()))
"""
    counts = set()
    for environment in ({}, {"OMP_THREAD_LIMIT": "1"}, {"OMP_DYNAMIC": "true"}):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
        )
        counts.add(done.stdout)
    assert len(counts) == 1


@pytest.mark.parametrize("name", ["reference", *EXACT, *(f"{name} half" for name in HALF), "native stored"])
def test_a_latent_that_does_not_fire_is_left_alone(name: str) -> None:
    """Weights, bias and moments stay, while the others move, by decay and momentum too."""
    shape = (20, 12, 90, 8, 0)
    builds = {"reference": reference, **(HALF if "half" in name else EXACT)}
    coder, engine = make(builds[name.split()[0]], shape, fused="stored" not in name, weight_decay=0.1)
    before: dict[str, Tensor] = {}
    for step in range(4):
        if step == 3:
            with torch.no_grad():
                coder.b_enc[:40] = -100.0
            before = {key: value.clone() for key, value in {**engine.state_dict(), **coder.state_dict()}.items()}
        fired = engine.forward_backward(data(20, 12, step), progress(shape)).fired
        engine.norm_bound()
        engine.optimizer_step(1e-2)
    assert (fired[:40] == 0).all()
    assert (fired[40:] > 0).any()
    for key, value in {**engine.state_dict(), **coder.state_dict()}.items():
        if not key.startswith("b_dec") and not key.endswith(".step"):
            rows, old = (value.T, before[key].T) if key.startswith("W_enc") else (value, before[key])
            assert torch.equal((rows == old).reshape(shape[2], -1).all(dim=1), fired == 0), key


def test_saes_of_one_shape_use_the_same_memory_in_turn() -> None:
    shape = (20, 12, 90, 8, 0)
    (_, one), (_, two) = make(by_native(False), shape, fused=True), make(by_native(False), shape, fused=True)
    one.forward_backward(data(20, 12), progress(shape))
    two.forward_backward(data(20, 12), progress(shape))
    with pytest.raises(AssertionError, match="another SAE"):
        one.norm_bound()
