"""Properties of training steps, for every architecture that a step supports: equal results however a step is split."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from saetrain.coders import SparseCoder
from saetrain.optim import OptimSettings
from saetrain.training.steps import STEP_DEVICES, load_step_class
from saetrain.training.steps.base import KernelSettings, StepRequest, TrainStep
from tests.properties.test_coders import ARCHITECTURES, D, N, build, draw, make_context

CPU = torch.device("cpu")
OPTIM = OptimSettings(weight_decay=0.1)
STEPS = 4
# The Triton step has tests of its own, because without a GPU its kernels are interpreted.
NAMES = [name for name, device in STEP_DEVICES.items() if device != "cuda"]
CASES = [
    (name, architecture, d_out)
    for name in NAMES
    for architecture, cls in ARCHITECTURES.items()
    for d_out in (None, 7)
    if (step := load_step_class(name)) and step.unsupported(StepRequest(cls, OPTIM, CPU, y_is_x=d_out is None)) is None
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}-{'sae' if case[2] is None else 'other output'}")
def case(request: pytest.FixtureRequest) -> tuple[str, SparseCoder]:
    """Return the name of a step, and a coder that it supports."""
    name, architecture, d_out = request.param
    return name, build(ARCHITECTURES[architecture], d_out)


def build_step(name: str, coder: SparseCoder, *, no_accumulation: bool = False) -> TrainStep:
    cls = load_step_class(name)
    assert cls is not None
    kernels = KernelSettings(kernels=name, compute_dtype="float32")  # type: ignore[arg-type]
    return cls.build(coder, OPTIM, kernels, no_accumulation=no_accumulation)


def run_forward_backward(step: TrainStep, coder: SparseCoder, number: int, rows: slice = slice(None)) -> None:
    x_ND = draw(N, D, seed=number)[rows].contiguous()
    y_ND = None if coder.is_sae else draw(N, coder.d_out, seed=number + 100)[rows].contiguous()
    step.forward_backward(x_ND, make_context(rows=len(x_ND)), y_ND)


def finish_step(step: TrainStep) -> None:
    step.norm_bound()
    step.optimizer_step(1e-2)


def require_close(found: SparseCoder, expected: SparseCoder) -> None:
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_step_equals_the_reference(case: tuple[str, SparseCoder]) -> None:
    name, coder = case
    plain = copy.deepcopy(coder)
    start = copy.deepcopy(coder.state_dict())
    step, reference = build_step(name, coder, no_accumulation=True), build_step("reference", plain)
    for number in range(STEPS):
        for each, own in ((step, coder), (reference, plain)):
            run_forward_backward(each, own, number)
            finish_step(each)
    require_close(coder, plain)
    assert not torch.equal(coder.W_dec, start["W_dec"])


def test_micro_batches_equal_one_batch(case: tuple[str, SparseCoder]) -> None:
    name, coder = case
    other = copy.deepcopy(coder)
    step, split = build_step(name, coder), build_step(name, other)
    for number in range(STEPS):
        run_forward_backward(step, coder, number)
        for rows in (slice(0, 10), slice(10, 30), slice(30, None)):
            run_forward_backward(split, other, number, rows)
        for each in (step, split):
            finish_step(each)
    require_close(other, coder)


def test_ranks_that_sum_their_gradients_equal_one(case: tuple[str, SparseCoder]) -> None:
    name, coder = case
    ranks = [copy.deepcopy(coder) for _ in range(2)]
    step, steps = build_step(name, coder), [build_step(name, each) for each in ranks]
    for number in range(STEPS):
        run_forward_backward(step, coder, number)
        for each, own, rows in zip(steps, ranks, (slice(0, 20), slice(20, None)), strict=True):
            run_forward_backward(each, own, number, rows)
        sums = [torch.stack(pair).sum(dim=0) for pair in zip(*(each.gradients() for each in steps), strict=True)]
        for each in steps:
            for gradient, total in zip(each.gradients(), sums, strict=True):
                gradient.copy_(total)
        for each in (step, *steps):
            finish_step(each)
    require_close(ranks[0], coder)
    assert all(torch.equal(a, b) for a, b in zip(ranks[0].parameters(), ranks[1].parameters(), strict=True))


def test_a_resumed_step_has_the_same_bits(case: tuple[str, SparseCoder]) -> None:
    name, coder = case
    step = build_step(name, coder, no_accumulation=True)
    for number in range(STEPS):
        if number == STEPS // 2:
            resumed = copy.deepcopy(coder)
            saved: dict[str, Tensor] = {key: value.clone() for key, value in step.state_dict().items()}
            after = build_step(name, resumed, no_accumulation=True)
            after.load_state_dict(saved)
        run_forward_backward(step, coder, number)
        finish_step(step)
    for number in range(STEPS // 2, STEPS):
        run_forward_backward(after, resumed, number)
        finish_step(after)
    for key, value in coder.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
