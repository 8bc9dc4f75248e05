"""Triton steps equal the reference: whole steps, sums of micro-batches, clipping, AuxK, resume, loss spikes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from saetrain import async_copy
from saetrain.coders.topk import TopK
from saetrain.ops.triton import kernels as triton_kernels
from saetrain.ops.triton import launch as triton_launch
from saetrain.ops.triton import topk as triton_topk
from saetrain.optim import OptimSettings
from saetrain.training.dead_latents import FiringTracker
from saetrain.training.sae_state import SaeState
from saetrain.training.steps.base import MicroBatch
from saetrain.training.steps.triton import TritonStep
from saetrain.training.trainer import SiteBatches, Trainer, TrainSettings
from saetrain.types import Site, StepContext
from tests.unit.ops.conftest import DEVICE
from tests.unit.training.step_checks import (
    Batch,
    Shape,
    build_reference,
    check_discarded_step,
    check_latents_that_do_not_fire,
    check_resume,
    check_whole_steps,
    make_batch,
    make_coder,
    make_data,
    relative_error,
    take_step,
)

SHAPES: list[Shape] = [(17, 7, 16, 16, 3), (1, 8, 16, 1, 0), (12, 33, 23, 5, 0), (10, 12, 30, 3, 5)]


@pytest.fixture(autouse=True)
def _short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that some latents have several."""
    monkeypatch.setattr(triton_launch, "SEGMENT_PAIRS", 4)


def make(
    shape: Shape,
    *,
    use_bf16: bool = False,
    no_accumulation: bool = True,
    name: str = "triton",
    products: Any = "sparse",
    **settings: object,
) -> tuple[TopK, Any]:
    coder = make_coder(shape).to(DEVICE)
    optim = OptimSettings(**settings)  # type: ignore[arg-type]
    if name == "reference":
        return coder, build_reference(coder, optim)
    return coder, TritonStep(coder, optim, use_bf16=use_bf16, no_accumulation=no_accumulation, products=products)


def move_batch(batch: Batch) -> Batch:
    """Move a batch to the device, and bound the number of its dead latents as the trainer does."""
    x, context = batch
    dead = None if context.dead_mask is None else context.dead_mask.to(DEVICE)
    max_dead = None if dead is None else int(dead.sum()) + 2
    variances = context.data_variance.to(DEVICE), context.residual_variance.to(DEVICE)
    return x.to(DEVICE), StepContext(context.step, context.n_tokens, dead, *variances, max_dead)


def batches_on_device(shape: Shape, count: int) -> list[Batch]:
    return [move_batch(make_batch(shape, step)) for step in range(count)]


def compare_results(found: Any, expected: Any) -> None:
    """Losses and sums of a step equal those of the reference."""
    assert torch.equal(found.fired, expected.fired)
    assert found.losses.keys() == expected.losses.keys()
    for key, loss in expected.losses.items():
        torch.testing.assert_close(found.losses[key], loss.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.residual_sum, expected.residual_sum, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.residual_square, expected.residual_square, rtol=1e-4, atol=1e-5)


WHOLE_STEPS = [
    *[("sparse", no_accumulation, 0.01, shape) for no_accumulation in (True, False) for shape in SHAPES],
    *[("sparse", no_accumulation, limit, SHAPES[0]) for no_accumulation in (True, False) for limit in (1.0, 0.0)],
    *[("dense", no_accumulation, limit, SHAPES[3]) for no_accumulation in (True, False) for limit in (0.01, 1.0)],
    ("dense", True, 0.01, SHAPES[1]),
]
"""Few, because a step takes the interpreter a second: every shape with clipping, one with a high limit and without."""


@pytest.mark.slow
@pytest.mark.parametrize(("products", "no_accumulation", "limit", "shape"), WHOLE_STEPS, ids=str)
def test_whole_steps_equal_the_reference(products: str, no_accumulation: bool, limit: float, shape: Shape) -> None:
    settings = {"max_grad_norm": limit, "weight_decay": 0.1}
    plain = make(shape, name="reference", **settings)
    tested = make(shape, no_accumulation=no_accumulation, products=products, **settings)
    check_whole_steps(plain, tested, batches_on_device(shape, 2), compare_results)
    for key, value in plain[1].state_dict().items():
        torch.testing.assert_close(tested[1].state_dict()[key], value, rtol=1e-2, atol=1e-6, msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("products", ["sparse", "dense"])
def test_products_in_bfloat16_are_near(products: str) -> None:
    shape = (30, 33, 47, 5, 3)
    plain, one = make(shape, name="reference")
    coder, two = make(shape, use_bf16=True, products=products)
    start = plain.W_dec.detach().clone()
    for step in (one, two):
        take_step(step, *batches_on_device(shape, 1))
    assert relative_error(coder.W_dec.detach() - start, plain.W_dec.detach() - start) < 0.3
    for copy, weights in zip(two._bf16_weights.values(), (coder.W_enc.T, coder.W_dec), strict=True):
        assert torch.equal(copy, weights.detach().bfloat16())


@pytest.mark.slow
def test_micro_batches_add_up_to_one_batch() -> None:
    shape = (24, 12, 30, 3, 5)
    (_, one), (_, two) = make(shape, no_accumulation=False), make(shape, no_accumulation=False)
    ((x, context),) = batches_on_device(shape, 1)
    one.forward_backward(x, context)
    for part in x.chunk(3):
        two.forward_backward(part, context)
    for whole, added in zip(one.gradients()[:-1], two.gradients()[:-1], strict=True):
        torch.testing.assert_close(added, whole, rtol=1e-3, atol=1e-5)
    assert two.norm_bound() >= float(one.optimizer_step(0.0)) * 0.9999


@pytest.mark.slow
@pytest.mark.parametrize(("no_accumulation", "use_bf16"), [(True, True), (False, False)])
def test_a_loaded_state_gives_the_same_bits(no_accumulation: bool, use_bf16: bool) -> None:
    shape = (10, 12, 30, 3, 4)
    whole, later = (make(shape, no_accumulation=no_accumulation, use_bf16=use_bf16) for _ in range(2))
    check_resume(whole, later, batches_on_device(shape, 3), resume_at=2)


@pytest.mark.slow
def test_a_latent_that_does_not_fire_does_not_change() -> None:
    shape = (20, 12, 40, 4, 0)
    check_latents_that_do_not_fire(make(shape, weight_decay=0.1), batches_on_device(shape, 3), n_silent=15)


@pytest.mark.slow
def test_a_discarded_step_changes_nothing() -> None:
    shape = (20, 12, 30, 3, 0)
    discarded = make_data(20, 12, 9).to(DEVICE), batches_on_device(shape, 1)[0][1]
    check_discarded_step(lambda: make(shape, no_accumulation=False), batches_on_device(shape, 1)[0], discarded)


@pytest.mark.slow
@pytest.mark.parametrize("no_accumulation", [True, False])
def test_what_is_not_finite_changes_no_weight(no_accumulation: bool) -> None:
    shape = (20, 12, 30, 3, 0)
    coder, engine = make(shape, no_accumulation=no_accumulation)
    ((x, context),) = batches_on_device(shape, 1)
    x[3, 2] = float("nan")
    before = {key: value.clone() for key, value in coder.state_dict().items()}
    loss = engine.forward_backward(x, context).losses["recon"]
    assert not loss.isfinite()
    assert not engine.norm_bound().isfinite()
    engine.optimizer_step(1e-2)
    for key, value in coder.state_dict().items():
        assert torch.equal(value, before[key]), key


def trainer(name: str = "triton", *, halts: bool = False, products: str = "sparse", auxk: float = 1 / 32) -> Trainer:
    """A coder whose latents die within two steps, clipped at every step."""
    coder, engine = make((12, 8, 24, 2, 0), name=name, products=products, max_grad_norm=1e-3)
    coder.auxk_alpha = auxk
    firing = FiringTracker(24, 20, 0.01, torch.device(DEVICE))
    about = {"data_variance": 8.0, "mse_per_fvu": 1.0, "peak_lr": 0.01, "seed": 0, "dead_bias_lr_multiplier": 2.0}
    sae = SaeState(Site.of_sae("h"), coder, lambda x: x, lambda x: x, engine, firing, **about, stop_on_spike=halts)  # type: ignore[arg-type]
    settings = TrainSettings(max_tokens=1200, on_spike="stop" if halts else "skip")
    return Trainer({"h": sae}, settings, tokens_per_step=12, warmup_steps=0)


def batch(step: int, factor: float = 1.0) -> Iterator[SiteBatches]:
    return iter([{"h": MicroBatch.of_sae(factor * make_data(12, 8, step).to(DEVICE))}])


@pytest.mark.slow
@pytest.mark.parametrize("products", ["sparse", "dense"])
def test_dead_latents_are_counted_ahead_and_trained_by_auxk(products: str) -> None:
    own, plain = trainer(products=products), trainer("reference")
    for each in (own, plain):
        for step in range(5):
            each.train_step(batch(step))
    assert own.saes["h"].firing.dead_mask_or_none() is not None
    losses = [each.saes["h"].compute_metrics("fvu")["loss_auxk"] for each in (own, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


class Launch:
    """In a kernel's place: takes tensors without content."""

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *given, **named: [1 / (t.device.type == "meta") for t in given if isinstance(t, torch.Tensor)]


class OnItsWay:
    """In the place of figures that are copied to the host beside the step."""

    def __init__(self, value: torch.Tensor) -> None:
        self._length = len(value)

    def get(self) -> torch.Tensor:
        return torch.ones(self._length)


@pytest.fixture
def without_content(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors may have shapes alone: whoever asks for a number, or for a shape that depends on one, fails."""
    for module, name in [
        (triton_kernels, "compute_residuals_kernel"),
        (triton_kernels, "bound_norms_kernel"),
        (triton_kernels, "sum_segments_kernel"),
        (triton_kernels, "latent_pass_kernel"),
    ]:
        monkeypatch.setattr(module, name, Launch())
    monkeypatch.setattr(triton_topk, "select_topk_kernel", Launch())
    monkeypatch.setattr(async_copy, "PendingCopy", OnItsWay)


def meta_trainer(products: Any, micro_steps: int) -> Trainer:
    coder = TopK(8, 24, 2, auxk_alpha=1 / 32, seed=1).to("meta")
    fused = micro_steps == 1
    engine = TritonStep(
        coder, OptimSettings(max_grad_norm=0.1), use_bf16=True, no_accumulation=fused, products=products
    )
    firing = FiringTracker(24, 20, 0.01, torch.device("meta"))
    about: Any = {"data_variance": 8.0, "mse_per_fvu": 1.0, "peak_lr": 0.01, "seed": 0, "dead_bias_lr_multiplier": 2.0}
    sae = SaeState(Site.of_sae("h"), coder, lambda x: x, lambda x: x, engine, firing, **about)
    assert sae._dead_count_bound is not None
    sae._dead_count_bound._max_dead = 5
    return Trainer(
        {"h": sae}, TrainSettings(max_tokens=1200, grad_acc_steps=micro_steps), tokens_per_step=12, warmup_steps=0
    )


@pytest.mark.parametrize("micro_steps", [1, 2])
@pytest.mark.parametrize("products", ["sparse", "dense"])
@pytest.mark.usefixtures("without_content")
def test_no_step_asks_the_device(products: str, micro_steps: int) -> None:
    """Nor does it for AuxK, for clipping, or to look for spikes."""
    own, x = meta_trainer(products, micro_steps), torch.empty(12, 8, device="meta")
    for _ in range(4):
        assert own.train_step(repeat({"h": MicroBatch.of_sae(x)})) == []


@pytest.mark.parametrize("ask", [torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.nonzero, float, bool])
@pytest.mark.usefixtures("without_content")
def test_a_step_that_asks_would_fail(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own, x = meta_trainer("sparse", 1), torch.empty(12, 8, device="meta")
    right = FiringTracker.dead_mask
    monkeypatch.setattr(FiringTracker, "dead_mask", lambda self: (ask(self.since_fired[0]), right(self))[1])
    with pytest.raises((RuntimeError, NotImplementedError)):
        own.train_step(repeat({"h": MicroBatch.of_sae(x)}))


@pytest.mark.slow
def test_a_step_with_a_spike_is_left_out_without_waiting() -> None:
    """As the reference does it, which waits."""
    own, plain = trainer(auxk=0.0), trainer("reference", auxk=0.0)
    said: dict[Trainer, list[str]] = {own: [], plain: []}
    for step in range(10):
        factor = {6: float("nan"), 7: 1000.0}.get(step, 1.0)
        for each in (own, plain):
            said[each].extend(map(str, each.train_step(batch(step, factor))))
    said[own].extend(map(str, own.drain_spikes()))
    assert [text.split(" is ")[0] for text in said[own]] == ["h: the loss of step 7", "h: the loss of step 8"]
    assert [text.split(" is ")[0] for text in said[plain]] == [text.split(" is ")[0] for text in said[own]]
    state, expected = own.saes["h"].state_dict(), plain.saes["h"].state_dict()
    assert state["optimizer.W_dec.step"] == expected["optimizer.W_dec.step"] == 8
    for name in ("firing.since_fired", "firing.current"):
        assert torch.equal(state[name], expected[name]), name
    assert state["firing.tokens"].tolist()[:2] == expected["firing.tokens"].tolist()[:2] == [8 * 12, 0]
    for name in ("coder.W_dec", "coder.b_dec", "optimizer.W_enc.exp_avg", "residual_variance"):
        torch.testing.assert_close(state[name], expected[name].detach(), rtol=2e-2, atol=1e-5, msg=name)


@pytest.mark.slow
def test_behind_a_spike_that_stops_the_run_weights_stay() -> None:
    own = trainer(halts=True, auxk=0.0)
    for step in range(5):
        assert own.train_step(batch(step)) == []
    before = {
        name: value.clone() for name, value in own.saes["h"].state_dict().items() if name.startswith(("coder", "opt"))
    }
    assert own.train_step(batch(5, float("inf"))) == []
    assert own.train_step(batch(6)) == []
    (spike,) = own.train_step(batch(7))
    assert spike.step == 6
    for name, value in before.items():
        assert torch.equal(own.saes["h"].state_dict()[name], value), name
