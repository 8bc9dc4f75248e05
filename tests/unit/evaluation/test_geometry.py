"""Directions compared in blocks against the whole F x F matrix, and the baselines against drawn directions."""

from __future__ import annotations

import pytest
import torch

from saetrain.evaluation.geometry import geometry_metrics
from saetrain.metrics import (
    expected_random_duplicates,
    expected_random_max_cosine,
    expected_random_redundancy,
    top_and_max_decoder_cosines,
)


def drawn(latents: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(latents, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("latents", "block"), [(53, 7), (53, 53), (53, 52), (53, 100), (64, 16), (2, 1), (3, 2)])
def test_rows_largest_cosines_equal_the_whole_matrix(latents: int, block: int) -> None:
    rows = drawn(latents, 5, 0) * torch.rand(latents, 1, generator=torch.Generator().manual_seed(1)).add(0.1)
    rows[-1] = rows[0] * 3
    full = torch.zeros(latents, latents)
    for i in range(latents):
        for j in range(latents):
            full[i, j] = rows[i] @ rows[j] / (rows[i].norm() * rows[j].norm()) if i != j else -1
    top, largest = top_and_max_decoder_cosines(rows, n=10, block_rows=block)
    torch.testing.assert_close(largest, full.amax(dim=1))
    pairs = full[torch.ones(latents, latents).triu(1).bool()]
    torch.testing.assert_close(top.sort().values, pairs.topk(min(10, len(pairs))).values.sort().values)
    assert float(largest[0]) == pytest.approx(1)


@pytest.mark.parametrize(("d", "latents"), [(64, 300), (384, 1500), (8, 100), (3, 40), (2, 10), (32, 2)])
def test_the_baseline_is_what_drawn_directions_give(d: int, latents: int) -> None:
    trials = 6 if latents > 50 else 400
    found = [float(top_and_max_decoder_cosines(drawn(latents, d, seed))[1].mean()) for seed in range(trials)]
    error = torch.tensor(found).std() / trials**0.5
    assert expected_random_max_cosine(d, latents) == pytest.approx(
        sum(found) / trials, abs=max(4 * float(error), 0.002)
    )


def test_one_latent_or_one_dimension_has_no_baseline() -> None:
    assert all(
        value != value
        for value in (
            expected_random_max_cosine(8, 1),
            expected_random_max_cosine(1, 8),
            expected_random_redundancy(8, 1),
            expected_random_duplicates(8, 1, 0.9),
            expected_random_duplicates(1, 8, 0.9),
        )
    )


def test_all_figures_by_loops() -> None:
    W_enc, W_dec = drawn(12, 300, 0), drawn(300, 12, 1)
    W_enc = W_enc + 2 * W_dec.T
    figures = geometry_metrics(W_enc, W_dec)
    total = 0.0
    for latent in range(300):
        a, b = W_enc[:, latent], W_dec[latent]
        total += float(a @ b / (a.norm() * b.norm()))
    assert figures["encoder_decoder_cosine"][0] == pytest.approx(total / 300, abs=1e-5)
    assert figures["encoder_decoder_cosine"][0] > 0.8
    # Of 300 cosines with random directions the mean is within some 1 / √(12 · 300) of nothing.
    assert abs(figures["encoder_decoder_cosine"][1]) < 4 / (12 * 300) ** 0.5
    unit = W_dec / W_dec.norm(dim=1, keepdim=True)
    full = (unit @ unit.T).fill_diagonal_(-1)
    assert figures["decoder_max_cosine"][0] == pytest.approx(float(full.amax(dim=1).mean()), abs=1e-5)
    pairs = full[torch.ones(300, 300).triu(1).bool()]
    assert figures["decoder_redundancy_top100"][0] == pytest.approx(float(pairs.topk(100).values.mean()), abs=1e-5)
    # Random directions are as alike as random directions are expected to be.
    assert figures["decoder_max_cosine"][0] == pytest.approx(figures["decoder_max_cosine"][1], abs=0.02)
    assert figures["decoder_redundancy_top100"][0] == pytest.approx(figures["decoder_redundancy_top100"][1], abs=0.02)


@pytest.mark.parametrize(("d", "latents"), [(6, 1000), (3, 40), (2, 10)])
def test_the_share_of_near_duplicates_of_drawn_directions_is_the_expected_one(d: int, latents: int) -> None:
    found = [geometry_metrics(drawn(latents, d, seed).T, drawn(latents, d, seed)) for seed in range(200)]
    shares = torch.tensor([figures["decoder_near_duplicates"][0] for figures in found])
    expected = found[0]["decoder_near_duplicates"][1]
    assert 0 < expected == pytest.approx(float(shares.mean()), abs=4 * float(shares.std()) / len(shares) ** 0.5)


def test_near_duplicates_are_counted_per_latent() -> None:
    rows = torch.eye(5, 8)
    rows[1] = rows[0] + 0.1 * rows[4]
    assert geometry_metrics(rows.T, rows)["decoder_near_duplicates"][0] == pytest.approx(2 / 5)


def test_a_single_latent_has_no_pairs() -> None:
    figures = geometry_metrics(drawn(6, 1, 0), drawn(1, 6, 0))
    for name in ("decoder_redundancy_top100", "decoder_max_cosine"):
        assert figures[name][0] != figures[name][0], f"{name}: nan"
