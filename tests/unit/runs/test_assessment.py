"""What the verdict is told of an SAE."""

from __future__ import annotations

from pathlib import Path

import pytest

from saetrain.coders.topk import TopK
from saetrain.evaluation.bootstrap import Estimate
from saetrain.evaluation.score import Figure, Scores
from saetrain.evaluation.verdict import HealthSettings
from saetrain.runs.assessment import verdict_on
from saetrain.runs.locate import Found

VALUES = {"explained_variance": 0.8, "l0": 20.0, "dead_below_threshold": 0.6, "decoder_redundancy_top100": 0.1}


@pytest.mark.parametrize(("k", "impossible"), [(64, False), (20, True)])
def test_the_share_that_must_be_dead_follows_from_k_not_from_what_fires(k: int, impossible: bool) -> None:
    """With 4096 latents and a rate of 0.01, 41 active ones a token keep all alive, which k = 64 allows."""
    scores = Scores({name: Figure(Estimate(value), 1000) for name, value in VALUES.items()}, {}, {}, (0, 0, 0), 1)
    found = verdict_on(Found(Path(), TopK(8, 4096, k), {}), scores, 0.01, HealthSettings()).metrics["dead"]
    assert found.status == "fail"
    assert found.by_construction == impossible
    assert ("must at this k and num_latents" in found.reason) == impossible
