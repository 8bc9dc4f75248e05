"""The constants of the inputs against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saetrain.activations.extract import Activations
from saetrain.activations.normalize import compute_norm_limits, fit_normalizers
from saetrain.errors import SaetrainError
from saetrain.types import Site

H0 = Site.of_sae("h.0")


def sample(values: np.ndarray, dtype: torch.dtype = torch.float32, **more: np.ndarray) -> Activations:
    arrays = {"h.0": values, **more}
    tensors = {name: torch.from_numpy(array).to(dtype) for name, array in arrays.items()}
    return Activations(tensors, np.zeros(len(values), dtype=np.int64), 0)


@pytest.fixture
def values() -> np.ndarray:
    """5000 tokens of width 12 with a mean far from zero and unequal spreads."""
    rng = np.random.default_rng(0)
    return 50 + rng.normal(size=(5000, 12)) * np.linspace(0.1, 3, 12)


def test_mean_variance_and_scale_are_numpy_s(values: np.ndarray) -> None:
    normalizer = fit_normalizers(sample(values), {}, [H0])["h.0"]
    x = values.astype(np.float32).astype(np.float64)
    variance = ((x - x.mean(0)) ** 2).sum(1).mean()
    np.testing.assert_allclose(normalizer.mean.numpy(), x.mean(0), rtol=1e-6)
    assert normalizer.variance == pytest.approx(variance, rel=1e-9)
    assert normalizer.scale == pytest.approx((variance / 12) ** 0.5, rel=1e-9)
    assert normalizer.scaled_variance == pytest.approx(12, rel=1e-9)
    assert normalizer.mean_to_std == pytest.approx(np.linalg.norm(x.mean(0)) / variance**0.5, rel=1e-6)


def test_coordinates_are_uncorrelated_and_can_be_turned_back(values: np.ndarray) -> None:
    mixed = values @ np.random.default_rng(1).normal(size=(12, 12))
    data = sample(mixed)
    normalizer = fit_normalizers(data, {}, [H0])["h.0"]
    torch.testing.assert_close(normalizer.axes.T @ normalizer.axes, torch.eye(12), atol=1e-6, rtol=0)
    scaled = normalizer(data.values["h.0"])
    covariance = np.cov(scaled.double().numpy().T)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-4)
    np.testing.assert_allclose(normalizer.denormalize(scaled).numpy(), mixed, rtol=1e-4, atol=1e-4)
    rough = normalizer(data.values["h.0"], bf16=True)
    assert 0 < float((rough - scaled).norm() / scaled.norm()) < 0.01


def test_fewer_tokens_than_coordinates_have_axes_that_rounding_leaves_alone(values: np.ndarray) -> None:
    data = sample(values[:7])
    axes = fit_normalizers(data, {}, [H0])["h.0"].axes
    nearly = fit_normalizers(sample(values[:7] * (1 + 1e-7 * np.random.default_rng(2).normal(size=(7, 12)))), {}, [H0])[
        "h.0"
    ].axes
    torch.testing.assert_close(nearly, axes, atol=0.02, rtol=0)
    torch.testing.assert_close(axes.T @ axes, torch.eye(12), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalized_activations_are_centred_with_mean_square_d(values: np.ndarray, dtype: torch.dtype) -> None:
    data = sample(values, dtype)
    scaled = fit_normalizers(data, {}, [H0])["h.0"](data.values["h.0"])
    assert scaled.dtype == torch.float32
    np.testing.assert_allclose(scaled.mean(0).numpy(), 0, atol=1e-4)
    assert float(scaled.pow(2).sum(1).mean()) == pytest.approx(12, rel=1e-4)


def test_outliers_count_at_no_hookpoint(values: np.ndarray) -> None:
    values, other = values.copy(), values[:, ::-1].copy()
    values[7] *= 1000
    data = sample(values, other=other)
    limits = compute_norm_limits(data)
    # torch takes the lower of the two middle values.
    norms = np.sort(np.linalg.norm(values.astype(np.float32), axis=1))
    assert limits["h.0"] == pytest.approx(10 * norms[(len(norms) - 1) // 2], rel=1e-5)
    normalizers = fit_normalizers(data, limits, [H0, Site.of_sae("other")])
    kept = np.delete(np.arange(5000), 7)
    for name, array in (("h.0", values), ("other", other)):
        np.testing.assert_allclose(normalizers[name].mean.numpy(), array[kept].mean(0), rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_activations_are_an_error_that_names_the_hookpoint(value: float) -> None:
    data = sample(np.full((10, 4), value))
    with pytest.raises(SaetrainError, match=r"--hookpoints h\.0: its activations are the same on every token"):
        fit_normalizers(data, compute_norm_limits(data), [H0])
