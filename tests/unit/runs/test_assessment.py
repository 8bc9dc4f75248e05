"""What the verdict is told of an SAE, and tables that fit a terminal."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from saetrain.coders.topk import TopK
from saetrain.evaluation.bootstrap import Estimate
from saetrain.evaluation.evaluator import MetricResult, SaeScores
from saetrain.evaluation.health import HealthSettings
from saetrain.interop.metadata import SaeMetadata
from saetrain.runs.evaluate.load_saes import SavedSae
from saetrain.runs.evaluate.report import (
    TextScores,
    build_metrics_table,
    build_verdict_table,
    judge_sae,
    unique_file_names,
)

VALUES = {"explained_variance": 0.8, "l0": 20.0, "dead_below_threshold": 0.6}
VALUES |= {"decoder_redundancy_top100": 0.1, "decoder_near_duplicates": 0.0}


@pytest.mark.parametrize(("k", "impossible"), [(64, False), (20, True)])
def test_the_share_that_must_be_dead_follows_from_k_not_from_what_fires(k: int, impossible: bool) -> None:
    """With 4096 latents and a rate of 0.01, 41 active ones a token keep all alive, which k = 64 allows."""
    scores = SaeScores({name: MetricResult(Estimate(value), 1000) for name, value in VALUES.items()}, {}, {}, {}, 1)
    found = judge_sae(SavedSae(Path(), TopK(8, 4096, k), SaeMetadata()), scores, 0.01, HealthSettings()).judgments[
        "dead"
    ]
    assert found.status == ("n/a" if impossible else "fail")
    assert found.by_construction == impossible
    assert ("at this k and num_latents at least" in found.reason) == impossible


def scores(loss: dict[str, int]) -> SaeScores:
    """Figures with intervals and nulls; ``loss`` {figure: tokens behind it}."""
    nulls = {name: Estimate(-0.671) for name in ("random_decoder", "pca", "mean")}
    counts = {**dict.fromkeys(VALUES, 8000), **loss}
    figures = {name: MetricResult(Estimate(-0.5, -1.123, -0.456), count, nulls) for name, count in counts.items()}
    if "ce_recovered_zero" in figures:
        figures["ce_recovered_zero"] = MetricResult(Estimate(-0.5, -1.123, -0.456), 4064, nulls, "small denominator")
    return SaeScores(figures, {}, {}, {}, 9)


LOSSES = dict.fromkeys(("ce_clean", "ce_recovered_zero", "ce_recovered_mean", "delta_ce"), 4064)


@pytest.mark.parametrize("loss", [LOSSES, {"pooled_cosine": 30, "final_hidden_error": 4064}, {}])
def test_tables_fit_80_columns_with_every_figure_whole(loss: dict[str, int]) -> None:
    found = scores(loss)
    texts = [TextScores(name, name == "wikitext", "", {"a": found}, 3) for name in ("wikitext", "/x/" + 40 * "n")]
    verdict = judge_sae(SavedSae(Path(), TopK(8, 4096, 64), SaeMetadata()), found, 0.01, HealthSettings())
    console = Console(width=80)
    with console.capture() as capture:
        console.print(build_metrics_table("title", "a", texts))
        console.print(build_verdict_table(verdict, f"health on {texts[0]}"))
    shown = capture.get()
    assert "…" not in shown
    columns = 3 + len(set(loss) - {"ce_clean"})
    for figure, times in (("-0.500", 2), ("[-1.123,", 2), ("-0.456]", 2), ("-0.671", 6)):
        assert shown.partition("health on")[0].count(figure) == times * columns
    assert "text " in shown
    assert "health on wikitext (in-sample)" in shown
    for name in verdict.judgments:
        assert f" {name} " in shown
    assert "8,000 tokens" in shown
    assert ("loss on 4,064" in shown) == ("ce_clean" in loss)
    assert ("output on 4,064" in shown) == ("pooled_cosine" in loss)


def test_the_files_of_many_data_sets_have_names_that_a_file_system_takes(tmp_path: Path) -> None:
    mixed = " + ".join(str(tmp_path / f"text_{number}.jsonl") for number in range(300))
    names = unique_file_names([mixed, mixed, str(tmp_path)])
    assert len({*names}) == 3
    for name in names:
        (tmp_path / name).write_text("")
        assert len(name) < 240
