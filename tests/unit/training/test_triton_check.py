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
    if DEVICE == "cpu":
        monkeypatch.setattr(triton_check, "SMALL", triton_check.Shape(5, 12, 2, 8))


def test_what_is_right_passes() -> None:
    assert triton_check.fault(torch.device(DEVICE)) is None


def test_slopes_of_other_latents_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_step.sort_pairs
    monkeypatch.setattr(gpu_step, "sort_pairs", lambda v, i, s, n: right(v, i, s.roll(1, dims=1), n))
    fault = triton_check.fault(torch.device(DEVICE))
    assert fault is not None
    assert "of a step away from autograd's (sparse products" in fault


def test_what_is_not_a_number_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_step.reconstruct

    def wrong(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        residual, copy, slopes, norms = right(*given)
        return residual, copy, slopes * float("nan"), norms

    monkeypatch.setattr(gpu_step, "reconstruct", wrong)
    assert triton_check.fault(torch.device(DEVICE)) is not None


def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> None:
        raise OSError("no ptxas")

    monkeypatch.setattr(gpu_step, "topk_relu", fail)
    assert triton_check.fault(torch.device(DEVICE)) == "they can't be built: OSError: no ptxas"
