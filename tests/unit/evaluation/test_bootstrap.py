"""Poisson weights that the document decides, and intervals that hold the truth as often as they say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from saetrain.evaluation.bootstrap import FRACTION_RANGE, DocumentSums, Sums, bootstrap_estimate, draw_poisson_weights


def ratio(sums: Sums) -> torch.Tensor:
    return sums["up"] / sums["down"]


def test_weights_are_a_function_of_document_replicate_and_seed_alone() -> None:
    docs = np.array([5, 900, 7, (3 << 40) + 5, 5])
    weights = draw_poisson_weights(docs, 50, seed=1)
    assert weights.shape == (50, 5)
    assert (weights[:, 0] == weights[:, 4]).all()
    for column, doc in enumerate(docs):
        assert (draw_poisson_weights(np.array([doc]), 50, seed=1)[:, 0] == weights[:, column]).all()
    assert (draw_poisson_weights(docs, 20, seed=1) == weights[:20]).all(), (
        "more replicates leave the first as they were"
    )
    assert (draw_poisson_weights(docs, 50, seed=2) != weights).any()
    assert (weights[:, 0] != weights[:, 3]).any(), "row 5 of another data set is another document"


@pytest.mark.parametrize("docs", [np.arange(2000), np.arange(2000) << 40, np.arange(2000) * 7919 + (5 << 40)])
def test_weights_are_poisson_and_independent(docs: np.ndarray) -> None:
    weights = draw_poisson_weights(docs, 500, seed=0)
    draws = weights.size
    for count in range(6):
        chance = math.exp(-1) / math.factorial(count)
        sigma = math.sqrt(chance * (1 - chance) / draws)
        assert abs((weights == count).mean() - chance) < 5 * sigma, count
    assert weights.mean() == pytest.approx(1, abs=5 / math.sqrt(draws))
    assert weights.var() == pytest.approx(1, abs=0.01)
    assert weights.max() >= 6
    for axis in (weights, weights.T):
        correlations = np.corrcoef(axis[:300])[np.triu_indices(300, 1)]
        assert np.abs(correlations).max() < 6 / math.sqrt(axis.shape[1])
        assert correlations.mean() == pytest.approx(0, abs=5 / math.sqrt(len(correlations) * axis.shape[1]))


def test_replicates_equal_documents_drawn_again_one_by_one() -> None:
    rng = np.random.default_rng(0)
    docs = rng.integers(0, 7, 60)
    value = torch.from_numpy(rng.normal(size=(60, 3)))
    sums = DocumentSums(8, seed=4)
    sums.add(docs, {"value": value})
    weights = draw_poisson_weights(np.arange(7), 8, seed=4)
    for replicate in range(8):
        by_hand = torch.zeros(3, dtype=torch.float64)
        for token in range(60):
            by_hand += weights[replicate, docs[token]] * value[token]
        torch.testing.assert_close(sums.replicate_sums["value"][replicate], by_hand)
    torch.testing.assert_close(sums.full_sums["value"], value.sum(dim=0))


@pytest.mark.parametrize("seed", range(5))
def test_any_split_and_order_gives_the_same_replicates(seed: int) -> None:
    rng = np.random.default_rng(seed)
    docs = rng.integers(0, 40, 500)
    value = torch.from_numpy(rng.normal(size=500))
    whole = DocumentSums(30, seed=1)
    whole.add(docs, {"value": value})
    parts = DocumentSums(30, seed=1)
    order = rng.permutation(500)
    for rows in np.split(order, np.sort(rng.integers(0, 500, 6))):
        if len(rows):
            parts.add(docs[rows], {"value": value[rows]})
    torch.testing.assert_close(parts.replicate_sums["value"], whole.replicate_sums["value"])
    torch.testing.assert_close(parts.full_sums["value"], whole.full_sums["value"])


def test_what_is_kept_does_not_grow_with_the_tokens() -> None:
    sums = DocumentSums(20)
    sizes = set()
    for batch in range(50):
        sums.add(np.arange(100) + 100 * batch, {"up": torch.rand(100), "wide": torch.rand(100, 4)})
        held = [*sums.full_sums.values(), *sums.replicate_sums.values()]
        sizes.add(sum(value.untyped_storage().nbytes() for value in held))
    assert sizes == {8 * (1 + 4) * (1 + 20)}


def test_intervals_hold_the_truth_about_nineteen_times_in_twenty() -> None:
    """The ratio of two sums over documents of unequal length, each with an effect of its own on all its tokens."""
    rng = np.random.default_rng(0)
    trials, documents, hits, below = 400, 300, 0, 0
    truth = 2.0
    widths = []
    for trial in range(trials):
        lengths = rng.geometric(1 / 20, documents)
        effects = rng.normal(0, 1, documents)
        docs = np.repeat(np.arange(documents) + 1000 * trial, lengths)
        down = rng.uniform(0.5, 1.5, len(docs))
        up = down * (truth + np.repeat(effects, lengths)) + rng.normal(0, 0.3, len(docs))
        sums = DocumentSums(400, seed=trial)
        sums.add(docs, {"up": torch.from_numpy(up), "down": torch.from_numpy(down)})
        estimate = sums.estimate_metric(ratio)
        hits += estimate.low <= truth <= estimate.high
        below += estimate.high < truth
        widths.append(estimate.high - estimate.low)
        assert estimate.low < estimate.value < estimate.high
    assert 0.92 <= hits / trials <= 0.975
    assert 0.2 < below / max(trials - hits, 1) < 0.8, "it misses on both sides"
    # Tokens taken as independent would give an interval many times narrower.
    assert np.mean(widths) > 3 * 2 * 1.96 * 0.3 / math.sqrt(20 * documents)


def test_nothing_resampled_gives_no_interval() -> None:
    sums = DocumentSums(0)
    sums.add(np.arange(3), {"up": torch.ones(3), "down": torch.full((3,), 4.0)})
    estimate = sums.estimate_metric(ratio)
    assert estimate.value == 0.25
    assert math.isnan(estimate.low)
    assert math.isnan(estimate.high)


def test_a_replicate_without_documents_leaves_no_interval() -> None:
    sums = DocumentSums(50)
    sums.add(np.zeros(10, dtype=np.int64), {"up": torch.ones(10), "down": torch.ones(10)})
    assert math.isnan(sums.estimate_metric(ratio).low), "the only document is left out of a third of the replicates"


def test_intervals_are_moved_to_the_value() -> None:
    replicates = torch.linspace(0, 1, 101, dtype=torch.float64)
    estimate = bootstrap_estimate(torch.tensor(3.0), replicates)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((3.0, 2.525, 3.475))


def test_an_interval_holds_its_value_and_stays_in_the_range_of_the_figure() -> None:
    rare = torch.tensor([0.0] * 199 + [0.002], dtype=torch.float64)
    found = bootstrap_estimate(torch.tensor(0.0), rare, FRACTION_RANGE)
    assert (found.low, found.value, found.high) == (0.0, 0.0, 0.0), "moved, both ends are below 0"
    found = bootstrap_estimate(torch.tensor(1.0), 1 - rare, FRACTION_RANGE)
    assert (found.low, found.value, found.high) == (1.0, 1.0, 1.0)
    wide = bootstrap_estimate(torch.tensor(0.8), torch.linspace(0, 1, 101, dtype=torch.float64), FRACTION_RANGE)
    assert (wide.low, wide.high) == pytest.approx((0.325, 1.0))
    skewed = bootstrap_estimate(torch.tensor(5.0), rare)
    assert skewed.low <= 5.0 <= skewed.high


def test_one_document_gives_no_interval_and_two_do() -> None:
    sums = DocumentSums(20)
    # The constant keeps replicates without the document finite.
    for doc, known in ((7, False), (7, False), (8, True)):
        sums.add(np.full(4, doc), {"up": torch.ones(4)})
        assert math.isfinite(sums.estimate_metric(lambda sums: sums["up"] + 1).low) == known
