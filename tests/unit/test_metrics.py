"""Metrics by predictors whose score is known, and against formulas written out on whole tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saetrain.evaluation.reconstruction import ReconstructionSums
from saetrain.evaluation.sparsity import SparsitySums
from saetrain.metrics import expected_random_redundancy, top_and_max_decoder_cosines
from saetrain.types import Codes

N, D = 400, 6


@pytest.fixture
def x() -> torch.Tensor:
    """Tokens whose mean is far from zero: there, a variance taken about zero shows."""
    return torch.randn(N, D, generator=torch.Generator().manual_seed(0)) * 2 + 50


def score(x: torch.Tensor, estimate: torch.Tensor, sizes: list[int] | None = None) -> dict[str, float]:
    sums = ReconstructionSums(torch.full((D,), 49.0))
    for a, b in zip(x.split(sizes or [len(x)]), estimate.split(sizes or [len(x)]), strict=True):
        sums.add(a, b, np.zeros(len(a), dtype=np.int64))
    return sums.metric_values()


def test_mean_predictor_explains_nothing_and_identity_everything(x: torch.Tensor) -> None:
    assert score(x, x.mean(dim=0).expand_as(x))["explained_variance"] == pytest.approx(0, abs=1e-5)
    assert score(x, x)["explained_variance"] == 1.0


def test_constant_offset_costs(x: torch.Tensor) -> None:
    variance = float(x.double().var(dim=0, correction=0).sum())
    assert score(x, x + 2)["explained_variance"] == pytest.approx(1 - 4 * D / variance, abs=1e-6)


def test_fvu_equals_the_formula_on_the_whole_tensor(x: torch.Tensor) -> None:
    estimate = x + torch.randn(N, D, generator=torch.Generator().manual_seed(1))
    a, b = x.double(), estimate.double()
    figures = score(x, estimate)
    expected = (a - b).pow(2).sum() / (a - a.mean(dim=0)).pow(2).sum()
    assert figures["fvu"] == pytest.approx(float(expected), rel=1e-9)
    assert figures["mse"] == pytest.approx(float((a - b).pow(2).mean()), rel=1e-9)
    assert figures["reconstruction_bias"] == pytest.approx(float(b.pow(2).sum() / (a * b).sum()), rel=1e-9)


@pytest.mark.parametrize("sizes", [[1] * N, [399, 1], [128, 128, 128, 16]])
def test_figures_do_not_depend_on_the_batches(x: torch.Tensor, sizes: list[int]) -> None:
    estimate = x * 0.9
    whole, parts = score(x, estimate), score(x, estimate, sizes)
    assert parts == pytest.approx(whole, rel=1e-9)


def test_figures_do_not_depend_on_the_centre(x: torch.Tensor) -> None:
    sums = ReconstructionSums(torch.zeros(D))
    sums.add(x, x * 0.9, np.arange(N))
    assert sums.metric_values() == pytest.approx(score(x, x * 0.9), rel=1e-6)


def test_sparsity_counts_the_decoded_code() -> None:
    values = torch.tensor([[1.0, 2.0], [0.0, 3.0], [0.0, 0.0], [1.0, 1.0]])
    indices = torch.tensor([[0, 1], [5, 1], [2, 3], [0, 4]])
    sums = SparsitySums(6, dead_threshold=0.4, device=torch.device("cpu"))
    for part in range(4):
        sums.add(Codes(values[part : part + 1], indices[part : part + 1], 6), np.array([part]))
    figures = {name: estimate.value for name, estimate in sums.metric_estimates().items()}
    assert figures["l0"] == 5 / 4
    assert sums.l0_percentiles() == {"p5": 0, "p50": 1, "p95": 2}
    assert figures["dead_never_fired"] == 3 / 6
    assert figures["dead_below_threshold"] == 4 / 6


def test_top_cosines_in_blocks_equal_the_full_matrix() -> None:
    rows = torch.randn(53, 5, generator=torch.Generator().manual_seed(2))
    unit = rows / rows.norm(dim=1, keepdim=True)
    full = (unit @ unit.T)[torch.ones(53, 53).triu(1).bool()]
    for block in (7, 53, 100):
        torch.testing.assert_close(top_and_max_decoder_cosines(rows, 20, block)[0], full.topk(20).values)


def decoder_redundancy(rows: torch.Tensor) -> float:
    return float(top_and_max_decoder_cosines(rows)[0].mean())


def test_redundancy_of_duplicates_is_one_and_small_decoders_work() -> None:
    assert decoder_redundancy(torch.ones(20, 3)) == pytest.approx(1.0)
    assert decoder_redundancy(torch.eye(3)) == pytest.approx(0.0)
    assert decoder_redundancy(torch.ones(1, 3)) != decoder_redundancy(torch.ones(1, 3)), "one latent has no pair: nan"


@pytest.mark.parametrize(("d", "latents"), [(64, 300), (384, 1500), (8, 100), (3, 40)])
def test_random_baseline_is_what_random_directions_give(d: int, latents: int) -> None:
    drawn = [
        decoder_redundancy(torch.randn(latents, d, generator=torch.Generator().manual_seed(seed))) for seed in range(4)
    ]
    assert expected_random_redundancy(d, latents) == pytest.approx(sum(drawn) / len(drawn), rel=0.03)
