"""FVU by token frequency: bins by the share of the text, and sums that do not depend on the batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saetrain.evaluation.frequency import LOG10_FREQUENCY_EDGES, FrequencySums, TokenBins

EDGES = np.array(LOG10_FREQUENCY_EDGES)


def test_a_bin_has_the_tokens_whose_share_is_within_its_edges() -> None:
    # Shares: 0.9, 0.099 and 0.001, which is an edge.
    ids = np.repeat([7, 2, 5], [900, 99, 1]).astype(np.int32)
    bins = TokenBins.from_ids([ids[:500], ids[500:]]).find_bins(np.array([7, 2, 5]))
    assert EDGES[bins].tolist() == [-0.5, -1.5, -3.0]


def test_one_frequent_token_is_in_the_last_bin() -> None:
    assert TokenBins.from_ids([np.zeros(3, np.int32)]).find_bins(np.zeros(1, np.int32)).tolist() == [len(EDGES) - 2]


def test_fvu_of_each_bin_equals_brute_force_in_any_batches() -> None:
    rng = np.random.default_rng(0)
    y, bins = torch.from_numpy(rng.normal(3, 1, (400, 6))).float(), rng.integers(2, 5, 400)
    bins[:1] = 9
    estimate = y + torch.from_numpy(rng.normal(0, 0.3, (400, 6))).float()
    sums = FrequencySums(y[:50].mean(dim=0))
    for start in range(0, 400, 130):
        rows = slice(start, start + 130)
        sums.add(y[rows], estimate[rows], bins[rows])
    found = sums.as_json()
    assert found["tokens"] == np.bincount(bins, minlength=len(EDGES) - 1).tolist()
    for number in (2, 3, 4):
        rows = torch.from_numpy(bins == number)
        variance = (y[rows] - y[rows].mean(dim=0)).square().sum()
        assert found["fvu"][number] == pytest.approx(
            float((y[rows] - estimate[rows]).square().sum() / variance), rel=1e-5
        )
    assert np.isnan(found["fvu"][9]), "one token has no variance"
    assert np.isnan(found["fvu"][0])
