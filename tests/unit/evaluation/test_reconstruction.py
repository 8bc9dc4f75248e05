"""How well x̂ rebuilds x, against formulas over whole arrays, with documents and intervals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saetrain.evaluation.bootstrap import draw_poisson_weights
from saetrain.evaluation.reconstruction import ReconstructionSums

N, D = 600, 12


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Tokens with a large mean, an estimate of them, and documents of unequal length."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator) * torch.linspace(0.2, 3, D) + 30
    estimate = x + 0.5 * torch.randn(N, D, generator=generator)
    docs = np.sort(np.random.default_rng(0).geometric(0.05, N)) + (1 << 40)
    return x, estimate, docs


def by_hand(x: np.ndarray, estimate: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """The formulas of docs/metrics.md with every token counted ``weights`` times."""
    w = weights / weights.sum()
    mean = (w[:, None] * x).sum(axis=0)
    residual = (w * ((x - estimate) ** 2).sum(axis=1)).sum()
    variance = (w * ((x - mean) ** 2).sum(axis=1)).sum()
    norms = np.linalg.norm(x, axis=1), np.linalg.norm(estimate, axis=1)
    inner = (x * estimate).sum(axis=1)
    return {
        "fvu": residual / variance,
        "explained_variance": 1 - residual / variance,
        "mse": residual / x.shape[1],
        "cosine": (w * inner / norms[0] / norms[1]).sum(),
        "norm_ratio": (w * norms[1] / norms[0]).sum(),
        "reconstruction_bias": (w * norms[1] ** 2).sum() / (w * inner).sum(),
    }


def test_figures_and_replicates_equal_formulas_over_the_whole_array(
    data: tuple[torch.Tensor, torch.Tensor, np.ndarray],
) -> None:
    x, estimate, docs = data
    sums = ReconstructionSums(torch.full((D,), 28.0), replicates=40, seed=3)
    sums.add(x, estimate, docs)
    a, b = x.double().numpy(), estimate.double().numpy()
    assert sums.metric_values() == pytest.approx(by_hand(a, b, np.ones(N)), rel=1e-9)
    weights = draw_poisson_weights(docs, 40, seed=3)
    drawn = [by_hand(a, b, weights[replicate]) for replicate in range(40)]
    for name, found in sums.metric_estimates().items():
        each = np.array([figures[name] for figures in drawn])
        each += found.value - each.mean()
        assert (found.low, found.high) == pytest.approx(tuple(np.quantile(each, [0.025, 0.975])), rel=1e-6), name


def test_batches_and_their_order_change_neither_figures_nor_intervals(
    data: tuple[torch.Tensor, torch.Tensor, np.ndarray],
) -> None:
    x, estimate, docs = data
    whole = ReconstructionSums(x.mean(dim=0), replicates=30)
    whole.add(x, estimate, docs)
    for size in (1, 7, 599):
        parts = ReconstructionSums(x.mean(dim=0), replicates=30)
        for rows in reversed(np.array_split(np.random.default_rng(size).permutation(N), -(-N // size))):
            parts.add(x[rows], estimate[rows], docs[rows])
        for name, found in whole.metric_estimates().items():
            again = parts.metric_estimates()[name]
            assert (again.value, again.low, again.high) == pytest.approx(
                (found.value, found.low, found.high), rel=1e-7
            ), name


def test_known_predictors(data: tuple[torch.Tensor, torch.Tensor, np.ndarray]) -> None:
    x, _, docs = data

    def explained(estimate: torch.Tensor) -> float:
        sums = ReconstructionSums(torch.zeros(D))
        sums.add(x.double(), estimate, docs)
        return sums.metric_values()["explained_variance"]

    mean = x.double().mean(dim=0)
    assert explained(mean.expand(N, D)) == pytest.approx(0, abs=1e-9)
    assert explained(x.double()) == 1
    variance = float((x.double() - mean).pow(2).sum(dim=1).mean())
    assert explained(x.double() + 0.1) == pytest.approx(1 - 0.01 * D / variance, rel=1e-9)
    assert explained(x.double() + 100) < -1
    assert explained(2 * mean - x.double()) == pytest.approx(-3, rel=1e-9)


def test_parts_add_up(data: tuple[torch.Tensor, torch.Tensor, np.ndarray]) -> None:
    x, estimate, docs = data
    first, second, empty = (ReconstructionSums(torch.full((D,), 29.0), replicates=5) for _ in range(3))
    first.add(x[:100], estimate[:100], docs[:100])
    second.add(x[100:], estimate[100:], docs[100:])
    together = ReconstructionSums.merge([first, second, empty])
    assert together.n_tokens == N
    assert together.metric_values() == pytest.approx(
        by_hand(x.double().numpy(), estimate.double().numpy(), np.ones(N)), rel=1e-9
    )
    assert all(np.isnan(value) for value in empty.metric_values().values())


def test_tokens_that_do_not_vary_have_no_explained_variance() -> None:
    sums = ReconstructionSums(torch.ones(D))
    sums.add(torch.ones(5, D), torch.ones(5, D), np.arange(5))
    assert np.isnan(sums.metric_values()["explained_variance"])
