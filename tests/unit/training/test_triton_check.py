"""The check at a run's start finds kernels that compute something else, or can't be built."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from saetrain.kernels import gpu_step
from saetrain.training import triton_check
from tests.unit.kernels.conftest import DEVICE


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter is slow."""
    triton_check.find_kernel_problem.cache_clear()
    if DEVICE == "cpu":
        monkeypatch.setattr(triton_check, "SMALL_SHAPE", triton_check.StepShape(5, 12, 4, 8))
        monkeypatch.setattr(gpu_step, "SEGMENT_PAIRS", 4)
        monkeypatch.setattr(
            triton_check,
            "STEP_VARIANTS",
            [triton_check.StepVariant("sparse"), triton_check.StepVariant("dense", n_micro_batches=2)],
        )


def test_what_is_right_passes() -> None:
    assert triton_check.find_kernel_problem(torch.device(DEVICE)) is None


def test_slopes_of_other_latents_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_step.sort_pairs
    monkeypatch.setattr(gpu_step, "sort_pairs", lambda v, i, s, n: right(v, i, s.roll(1, dims=1), n))
    fault = triton_check.find_kernel_problem(torch.device(DEVICE))
    assert fault is not None
    assert "of a step away from autograd's (sparse products in fp32)" in fault


def test_what_is_not_a_number_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_step.compute_residuals

    def wrong(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        residual, copy, slopes, norms = right(*given)
        return residual, copy, slopes * float("nan"), norms

    monkeypatch.setattr(gpu_step, "compute_residuals", wrong)
    assert triton_check.find_kernel_problem(torch.device(DEVICE)) is not None


def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> None:
        raise OSError("no ptxas")

    monkeypatch.setattr(gpu_step, "encode_topk", fail)
    assert triton_check.find_kernel_problem(torch.device(DEVICE)) == "they can't be built: OSError: no ptxas"


@pytest.mark.parametrize("way", triton_check.STEP_VARIANTS, ids=str)
def test_every_way_is_near_autograd(way: triton_check.StepVariant, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_check, "STEP_VARIANTS", [way])
    assert triton_check.find_failing_variants(triton_check.SMALL_SHAPE, torch.device(DEVICE)) == {}


def test_an_exception_of_the_gpu_itself_is_not_taken_for_a_compiler_s(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(gpu_step, "encode_topk", fail)
    with pytest.raises(torch.OutOfMemoryError):
        triton_check.find_kernel_problem(torch.device(DEVICE))
