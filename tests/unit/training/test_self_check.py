"""The check at a run's start finds kernels that compute something else, or can't be built."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from saetrain.ops.triton import launch as triton_launch
from saetrain.training.steps import self_check
from tests.unit.ops.conftest import DEVICE


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is slow."""
    self_check.find_kernel_problem.cache_clear()
    if DEVICE == "cpu":
        monkeypatch.setattr(self_check, "SMALL_SHAPE", self_check.StepShape(5, 12, 4, 8))
        monkeypatch.setattr(triton_launch, "SEGMENT_PAIRS", 4)
        monkeypatch.setattr(
            self_check,
            "STEP_VARIANTS",
            [self_check.StepVariant("sparse"), self_check.StepVariant("dense", n_micro_batches=2)],
        )


@pytest.mark.slow
def test_what_is_right_passes() -> None:
    assert self_check.find_kernel_problem(torch.device(DEVICE)) is None


@pytest.mark.slow
def test_slopes_of_other_latents_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = triton_launch.sort_pairs
    monkeypatch.setattr(triton_launch, "sort_pairs", lambda v, i, s, n: right(v, i, s.roll(1, dims=1), n))
    fault = self_check.find_kernel_problem(torch.device(DEVICE))
    assert fault is not None
    assert "against autograd (sparse products in fp32)" in fault


@pytest.mark.slow
def test_what_is_not_a_number_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = triton_launch.compute_residuals

    def wrong(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        residual, copy, slopes, norms = right(*given)
        return residual, copy, slopes * float("nan"), norms

    monkeypatch.setattr(triton_launch, "compute_residuals", wrong)
    assert self_check.find_kernel_problem(torch.device(DEVICE)) is not None


def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> None:
        raise OSError("no ptxas")

    monkeypatch.setattr(triton_launch, "encode_topk", fail)
    assert self_check.find_kernel_problem(torch.device(DEVICE)) == "they can't be built: OSError: no ptxas"


@pytest.mark.slow
@pytest.mark.parametrize("way", self_check.STEP_VARIANTS, ids=str)
def test_every_way_is_near_autograd(way: self_check.StepVariant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "STEP_VARIANTS", [way])
    assert self_check.find_failing_variants(self_check.SMALL_SHAPE, torch.device(DEVICE)) == {}


def test_an_exception_of_the_gpu_itself_is_not_taken_for_a_compiler_s(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(triton_launch, "encode_topk", fail)
    with pytest.raises(torch.OutOfMemoryError):
        self_check.find_kernel_problem(torch.device(DEVICE))
