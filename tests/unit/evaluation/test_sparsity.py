"""Counts of the decoded code and their replicates, against brute force over tokens and latents."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from saetrain.evaluation.bootstrap import draw_poisson_weights
from saetrain.evaluation.sparsity import DOCUMENTS_PER_BLOCK, SparsitySums
from saetrain.types import Codes

N, F, K, THRESHOLD = 700, 40, 5, 0.01
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def code() -> Codes:
    """Latents of very unlike densities; latent 39 never fires, though entries of value 0 point at it."""
    rng = np.random.default_rng(0)
    chance = np.r_[0.5 ** np.linspace(0, 9, F - 1), 0]
    chance /= chance.sum()
    indices = np.stack([rng.choice(F - 1, K, replace=False, p=chance[:-1]) for _ in range(N)])
    values = np.maximum(rng.normal(0.5, 1, (N, K)), 0)
    indices[values == 0] = F - 1
    return Codes(torch.from_numpy(values).float(), torch.from_numpy(indices), F)


@pytest.fixture(scope="module")
def docs() -> np.ndarray:
    """More documents than are counted at once."""
    docs = np.random.default_rng(1).integers(0, 2 * DOCUMENTS_PER_BLOCK + 5, N)
    assert len(np.unique(docs)) > 2 * DOCUMENTS_PER_BLOCK
    return docs


def by_hand(active: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    fired, tokens = np.zeros(F), 0.0
    for token in range(N):
        tokens += weights[token]
        for latent in range(F):
            fired[latent] += weights[token] * active[token, latent]
    rates = fired / tokens
    return {
        "l0": rates.sum(),
        "dead_below_threshold": (rates < THRESHOLD).mean(),
        "dead_never_fired": (rates == 0).mean(),
        "dead_below_1e-5": (rates < 1e-5).mean(),
        "alive": (rates > 0).mean(),
        "density_over_1_percent": (rates > 0.01).mean(),
        "density_over_10_percent": (rates > 0.1).mean(),
    }


def values_of(sums: SparsitySums) -> dict[str, float]:
    return {name: estimate.value for name, estimate in sums.metric_estimates().items()}


@pytest.mark.parametrize("dense", [False, True])
def test_figures_and_replicates_equal_brute_force(code: Codes, docs: np.ndarray, dense: bool) -> None:
    active = (code.to_dense() > 0).numpy()
    sums = SparsitySums(F, THRESHOLD, CPU, replicates=12, seed=7)
    for rows in np.array_split(np.random.default_rng(2).permutation(N), 4):
        part = code.select_tokens(torch.from_numpy(rows))
        sums.add(Codes(part.to_dense(), None, F) if dense else part, docs[rows])
    wanted = by_hand(active, np.ones(N))
    assert len(set(wanted.values())) >= 5, "the figures are told apart"
    got = values_of(sums)
    assert {name: got[name] for name in wanted} == pytest.approx(wanted, rel=1e-12)
    assert got["l0_share"] == pytest.approx(wanted["l0"] / F)
    counts = np.sort(active.sum(axis=1))
    for share, name in ((0.05, "p5"), (0.5, "p50"), (0.95, "p95")):
        assert sums.l0_percentiles()[name] == counts[math.ceil(share * N) - 1]
    weights = draw_poisson_weights(docs, 12, seed=7)
    drawn = [by_hand(active, weights[replicate]) for replicate in range(12)]
    for name, found in sums.metric_estimates().items():
        if name == "l0_share":
            continue
        each = np.array([figures[name] for figures in drawn])
        each += found.value - each.mean()
        assert (found.low, found.high) == pytest.approx(tuple(np.quantile(each, [0.025, 0.975])), abs=1e-6), name


def test_a_percentile_is_the_least_l0_that_so_many_tokens_do_not_exceed() -> None:
    """Of 20 tokens with 1 to 20 active latents, exactly 1, 10 and 19 have no more than 1, 10 and 19."""
    sums = SparsitySums(20, THRESHOLD, CPU)
    sums.add(Codes(torch.ones(20, 20).tril(), None, 20), np.zeros(20, dtype=np.int64))
    assert sums.l0_percentiles() == {"p5": 1, "p50": 10, "p95": 19}


def test_batches_and_their_order_change_nothing(code: Codes, docs: np.ndarray) -> None:
    whole = SparsitySums(F, THRESHOLD, CPU, replicates=20)
    whole.add(code, docs)
    parts = SparsitySums(F, THRESHOLD, CPU, replicates=20)
    for rows in np.array_split(np.arange(N)[::-1].copy(), 33):
        parts.add(code.select_tokens(torch.from_numpy(rows)), docs[rows])
    assert values_of(parts) == values_of(whole)
    assert parts.l0_percentiles() == whole.l0_percentiles()
    assert parts.metric_estimates() == whole.metric_estimates()
    assert parts.density_histogram() == whole.density_histogram()


def test_the_histogram_counts_every_latent_once(code: Codes) -> None:
    sums = SparsitySums(F, THRESHOLD, CPU)
    sums.add(code, np.zeros(N, dtype=np.int64))
    rates = (code.to_dense() > 0).double().mean(dim=0).numpy()
    found = sums.density_histogram()
    edges = found["edges_log10"]
    for low, high, count in zip(edges, edges[1:], found["counts"], strict=False):
        inside = [r for r in rates if r > 0 and low <= math.log10(r) and (math.log10(r) < high or high == 0)]
        assert count == len(inside), low
    assert found["never"] == int((rates == 0).sum()) >= 1
    assert sum(found["counts"]) + found["rarer"] + found["never"] == F


@pytest.mark.parametrize("replicates", [0, 10])
def test_no_token_at_all(replicates: int) -> None:
    sums = SparsitySums(F, THRESHOLD, CPU, replicates)
    sums.add(Codes(torch.zeros(0, K), torch.zeros(0, K, dtype=torch.long), F), np.zeros(0, dtype=np.int64))
    figures = sums.metric_estimates()
    assert figures["l0"].value == 0
    assert math.isnan(figures["l0"].low)


def test_intervals_hold_their_figure_within_its_range() -> None:
    """Every latent fires on some of the tokens, but not in all replicates of so few documents."""
    rng = np.random.default_rng(0)
    indices = np.stack([rng.choice(F, K, replace=False) for _ in range(100)])
    sums = SparsitySums(F, THRESHOLD, CPU, replicates=20)
    sums.add(Codes(torch.ones(100, K), torch.from_numpy(indices), F), np.arange(100) % 8)
    for name, figure in sums.metric_estimates().items():
        assert 0 <= figure.low <= figure.value <= figure.high, name
        assert figure.high <= 1 or name == "l0", name


def test_replicates_without_tokens_leave_no_interval(code: Codes) -> None:
    """Of two documents a seventh of the replicates draws neither."""
    sums = SparsitySums(F, THRESHOLD, CPU, replicates=60)
    sums.add(code, np.arange(N) % 2)
    assert all(math.isnan(figure.low) for figure in sums.metric_estimates().values())
