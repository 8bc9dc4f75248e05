"""What an evaluation gives: JSON files with every figure, a verdict on each SAE, and tables on the terminal."""

from __future__ import annotations

import dataclasses
import os
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from saetrain.activations.head import LMHeadModel
from saetrain.activations.model import DTYPES
from saetrain.config import EvaluateConfig
from saetrain.errors import SaetrainError
from saetrain.evaluation.score import (
    MEAN_RECONSTRUCTION,
    PCA_RECONSTRUCTION,
    RANDOM_DECODER,
    RANDOM_DIRECTIONS,
    MetricResult,
    SaeScores,
)
from saetrain.evaluation.verdict import HealthSettings, Judgment, SaeProperties, Verdict, judge_metrics
from saetrain.files import write_json
from saetrain.logs.jsonl import replace_non_finite
from saetrain.runs.directory import ASSESSMENT, EVALUATION, SAES
from saetrain.runs.locate import Found, Located
from saetrain.training.firing import min_dead_fraction

FORMAT = 1
WIDTH = 120
"""Columns of a table where there is no terminal."""
NULL_NAMES = {
    RANDOM_DECODER: "random decoder",
    PCA_RECONSTRUCTION: "PCA of rank k",
    MEAN_RECONSTRUCTION: "mean",
    RANDOM_DIRECTIONS: "random directions",
}
COLUMNS = {
    "explained_variance": "expl. var.",
    "ce_recovered_zero": "CE recov. (zero)",
    "ce_recovered_mean": "CE recov. (mean)",
    "delta_ce": "CE increase",
    "pooled_cosine": "pooled cosine",
    "final_hidden_error": "final hidden error",
    "l0": "L0",
    "dead_below_threshold": "dead by rate",
}
STYLES = {"good": "green", "pass": "green", "fail": "red"}
HEADLINES = ("explained_variance", "fvu", "cosine", "l0", "dead_below_threshold", "dead_never_fired")
"""Figures that the assessment repeats; of the model's loss it repeats all."""


@dataclass(frozen=True)
class TextScores:
    """The scores of every SAE on one text; ``loss_sequences`` of its sequences were scored by the model's loss."""

    name: str
    in_sample: bool
    what: str
    scores: dict[str, SaeScores]
    loss_sequences: int

    @property
    def kind(self) -> str:
        """Whether it is of the data set that was trained on."""
        return "in-sample" if self.in_sample else "out of sample"

    def __str__(self) -> str:
        return f"{Path(self.name).name} ({self.kind})"


@dataclass(frozen=True)
class Assessment:
    """Everything that was found, and where it is written."""

    config: EvaluateConfig
    located: Located
    model: dict[str, Any]
    texts: list[TextScores]
    verdicts: dict[str, Verdict]
    """By the scores on the first text."""
    others: dict[str, list[Verdict]]
    """By those on each other text."""
    folder: Path

    @staticmethod
    def of(
        config: EvaluateConfig, located: Located, head: LMHeadModel, texts: list[TextScores], threshold: float
    ) -> Assessment:
        """Judge each SAE by its scores on each text."""
        judged = {
            name: [verdict_on(sae, text.scores[name], threshold, config.health) for text in texts]
            for name, sae in located.saes.items()
        }
        model = {
            "name": head.base.name,
            "architecture": head.architecture,
            "predicts": {"causal": "next tokens", "masked": "masked tokens", "none": "nothing"}[head.kind],
            "dtype": next(name for name, dtype in DTYPES.items() if dtype is head.base.dtype),
        }
        whole_run = located.run is not None and located.path.resolve() in (located.run, located.run / SAES)
        there = located.run if whole_run and located.run is not None else located.path
        verdicts = {name: each[0] for name, each in judged.items()}
        others = {name: each[1:] for name, each in judged.items()}
        return Assessment(config, located, model, texts, verdicts, others, Path(config.out) if config.out else there)

    def logged(self) -> dict[str, dict[str, float]]:
        """{SAE: verdict and figures} as the logs take them, of the text that was judged on."""
        first = self.texts[0].scores
        return {
            name: {
                "health_passed": verdict.n_passed,
                "health_metrics": len(verdict.judgments),
                **{figure: scored.estimate.value for figure, scored in first[name].metrics.items()},
            }
            for name, verdict in self.verdicts.items()
        }

    def write(self) -> list[Path]:
        """Write one file a text and the final assessment; gives their paths."""
        names = file_names([text.name for text in self.texts])
        folder = self.folder / EVALUATION
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in zip(names, self.texts, strict=True):
                write_json(folder / name, self._text_json(text))
            write_json(self.folder / ASSESSMENT, self.as_json(names))
        except OSError as error:
            raise SaetrainError(
                f"the evaluation can't be written to {folder}: {error.strerror}; name another folder by --out"
            ) from error
        return [*(folder / name for name in names), self.folder / ASSESSMENT]

    def as_json(self, names: list[str]) -> dict[str, Any]:
        """``final_assessment.json``."""
        first = self.texts[0]
        return {
            "format": FORMAT,
            "saetrain": version("saetrain"),
            "model": self.model,
            "judged_on": {"data_set": first.name, "in_sample": first.in_sample, "held_out": first.what},
            "thresholds": dataclasses.asdict(self.config.health),
            "saes": {
                name: {**verdict.as_json(), "figures": headlines(first.scores[name])}
                for name, verdict in self.verdicts.items()
            },
            "evaluations": [f"{EVALUATION}/{name}" for name in names],
        }

    def _text_json(self, text: TextScores) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "saetrain": version("saetrain"),
            "data_set": text.name,
            "in_sample": text.in_sample,
            "held_out": text.what,
            "model": self.model,
            "loss_sequences": text.loss_sequences,
            "settings": _flat(self.config),
            "saes": {name: _sae_json(self.located.saes[name], scores) for name, scores in text.scores.items()},
        }


def verdict_on(sae: Found, scores: SaeScores, threshold: float, settings: HealthSettings) -> Verdict:
    """The verdict on one SAE by its scores on one text."""
    estimates = {name: figure.estimate for name, figure in scores.metrics.items()}
    nulls = {
        name: {NULL_NAMES[null]: estimate.value for null, estimate in figure.baselines.items()}
        for name, figure in scores.metrics.items()
    }
    coder = sae.coder
    bound = min_dead_fraction(coder.k, coder.num_latents, threshold)
    tokens = scores.metrics["dead_below_threshold"].count
    return judge_metrics(
        estimates, nulls, SaeProperties(coder.d_in, coder.num_latents, coder.k, bound, threshold, tokens), settings
    )


def headlines(scores: SaeScores) -> dict[str, Any]:
    """{figure: value with interval and nulls} of those that matter most."""
    losses = [name for name in scores.metrics if name.startswith(("ce_", "delta_", "kl", "pooled", "final_hidden"))]
    return {name: scores.metrics[name].as_json(name) for name in (*HEADLINES, *losses)}


def _sae_json(sae: Found, scores: SaeScores) -> dict[str, Any]:
    coder = sae.coder
    return {
        "folder": str(sae.folder.resolve()),
        "hookpoint": sae.about.get("hookpoint") or sae.about.get("hook_name"),
        "d_in": coder.d_in,
        "num_latents": coder.num_latents,
        "k": coder.k,
        "documents": scores.n_documents,
        "figures": {name: figure.as_json(name) for name, figure in scores.metrics.items()},
        "classes": {name: replace_non_finite(figures) for name, figures in scores.metrics_by_class.items()},
        "l0_percentiles": dict(zip(("p5", "p50", "p95"), scores.l0_percentiles, strict=True)),
        "density": scores.density_histogram,
    }


def _flat(config: EvaluateConfig) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        out.update(value if isinstance(value, dict) else {name: value})
    return out


def file_names(data_sets: list[str]) -> list[str]:
    """``<data set>.json`` of each, told apart where two are called alike."""
    out: list[str] = []
    for name in data_sets:
        last = Path(name).stem if Path(name).exists() else name
        stem = "".join(char if char.isalnum() or char in "-_." else "_" for char in last).strip("._") or "text"
        number = 1
        while f"{stem}{'' if number == 1 else f'_{number}'}.json" in out:
            number += 1
        out.append(f"{stem}{'' if number == 1 else f'_{number}'}.json")
    return out


def report(assessment: Assessment) -> None:
    """Print the tables and write the files, in this order, so that a disk that fails costs no figures."""
    # Rich takes the terminal's width, or COLUMNS where that is set.
    known = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit()
    console = Console(file=sys.stdout, width=None if known else WIDTH, highlight=False)
    for name, verdict in assessment.verdicts.items():
        coder = assessment.located.saes[name].coder
        title = f"{name}: k = {coder.k}, {coder.num_latents:,} latents, width {coder.d_in}"
        console.print(figures_table(title, name, assessment.texts))
        console.print(verdict_table(verdict, f"health on {assessment.texts[0]}"))
        for metric, judged in verdict.judgments.items():
            advice = f"; {judged.advice}" if judged.advice else ""
            console.print(Text(f"  {metric}: {judged.reason}{advice}"))
        each = zip((verdict, *assessment.others[name]), assessment.texts, strict=True)
        console.print(Text(f"verdict {', '.join(f'{found} on {text}' for found, text in each)}", style="bold"))
    console.print(Text(f"written: {', '.join(map(str, assessment.write()))}"))


def figures_table(title: str, sae: str, texts: list[TextScores]) -> Table:
    """One SAE's figures on each text, the nulls beneath."""
    # Narrow gaps and a word a line, so that all of it fits into 80 columns.
    table = Table(
        title=Text(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False
    )
    shown = [name for name in COLUMNS if name in texts[0].scores[sae].metrics]
    table.add_column("text", overflow="fold")
    for name in shown:
        table.add_column(COLUMNS[name].replace(" ", "\n"), justify="right", no_wrap=True, overflow="fold")
    for text in texts:
        figures = text.scores[sae].metrics
        label = Text(f"{Path(text.name).name}\n{text.kind}\n{_counts(figures)}")
        table.add_row(label, *(_cell(figures[name]) for name in shown))
        there = {null for name in shown for null in figures[name].baselines}
        for null in (name for name in NULL_NAMES if name in there):
            values = [figures[name].baselines.get(null) for name in shown]
            cells = [Text(_short(value.value) if value else "", style="dim") for value in values]
            table.add_row(Text(f"  {NULL_NAMES[null]}", style="dim"), *cells)
        table.add_section()
    return table


def _counts(figures: dict[str, MetricResult]) -> str:
    """``8,000 tokens``, and of how many the model's loss or output was scored."""
    counts = f"{figures['explained_variance'].count:,} tokens"
    for name, what in (("ce_clean", "loss"), ("final_hidden_error", "output")):
        if name in figures:
            counts += f",\n{what} on {figures[name].count:,}"
    return counts


def _cell(figure: MetricResult) -> Text:
    estimate = figure.estimate
    cell = Text(_short(estimate.value))
    if estimate.low < estimate.high:
        cell.append(f"\n[{_short(estimate.low)},\n{_short(estimate.high)}]", style="dim")
    if figure.flag:
        cell.append("\n" + figure.flag.replace(" ", "\n"), style="yellow")
    return cell


def _short(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def verdict_table(verdict: Verdict, title: str) -> Table:
    """The four figures with null, threshold and status."""
    table = Table(title=Text(title), title_justify="left")
    for heading in ("health", "value", "null", "threshold", "status"):
        table.add_column(heading, no_wrap=heading == "health", overflow="fold")
    for name, judged in verdict.judgments.items():
        table.add_row(Text(name), *_verdict_cells(judged))
    return table


def _verdict_cells(judged: Judgment) -> tuple[Text, Text, Text, Text]:
    value = _short(judged.value)
    if judged.low < judged.high:
        value += f" [{_short(judged.low)}, {_short(judged.high)}]"
    null = ", ".join(f"{_short(value)} {name}" for name, value in judged.nulls.items())
    status = judged.status + (" (by construction)" if judged.by_construction else "")
    return Text(value), Text(null), Text(judged.threshold), Text(status, style=STYLES[judged.status])
