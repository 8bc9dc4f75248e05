"""The results of an evaluation: JSON files with all metrics, a verdict per SAE, and tables on the terminal."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from saetrain.activations.model import DTYPES
from saetrain.atomic_io import replace_non_finite, write_json
from saetrain.config import EvaluateConfig
from saetrain.errors import SaetrainError
from saetrain.evaluation.baselines import MEAN_RECONSTRUCTION, PCA_RECONSTRUCTION, RANDOM_DECODER
from saetrain.evaluation.evaluator import RANDOM_DIRECTIONS, MetricResult, SaeScores
from saetrain.evaluation.health import HealthSettings, Judgment, SaeProperties, Verdict, judge_metrics
from saetrain.runs.evaluate.load_saes import LoadedSaes, SavedSae
from saetrain.runs.evaluate.setup import EvalContext
from saetrain.runs.run_dir import ASSESSMENT_FILE, EVALUATION_DIR, SAES_DIR, shorten_path
from saetrain.runs.sae_table import RANDOM_REDUNDANCY, build_sae_table, open_console
from saetrain.training.dead_latents import min_dead_fraction
from saetrain.untrusted import shorten_name

FORMAT_VERSION = 2
MAX_STEM_BYTES = 200
"""Leaves room for a number, an ending and what the name of a temporary file adds."""
BASELINE_NAMES = {
    RANDOM_DECODER: "random decoder",
    PCA_RECONSTRUCTION: "PCA of rank k",
    MEAN_RECONSTRUCTION: "mean",
    RANDOM_DIRECTIONS: "random directions",
}
METRIC_COLUMNS = {
    "explained_variance": "expl. var.",
    "ce_recovered_zero": "CE recov. (zero)",
    "ce_recovered_mean": "CE recov. (mean)",
    "delta_ce": "CE increase",
    "pooled_cosine": "pooled cosine",
    "final_hidden_error": "final hidden error",
    "l0": "L0",
    "dead_below_threshold": "dead by rate",
}
STATUS_STYLES = {"good": "green", "pass": "green", "fail": "red", "n/a": "yellow"}
HEADLINE_METRICS = (
    "explained_variance",
    "fvu",
    "cosine",
    "l0",
    "dead_below_threshold",
    "dead_never_fired",
    "decoder_redundancy_top100",
    "decoder_near_duplicates",
)
"""Metrics that the assessment repeats, in addition to all metrics of the model's loss."""


@dataclass(frozen=True)
class TextScores:
    """The scores of every SAE on one text; ``loss_sequences``: number of sequences scored by the model's loss."""

    name: str
    in_sample: bool
    description: str
    scores: dict[str, SaeScores]
    loss_sequences: int

    @property
    def sample_kind(self) -> str:
        """Whether the text comes from the data set that the SAEs were trained on."""
        return "in-sample" if self.in_sample else "out of sample"

    def __str__(self) -> str:
        return f"{Path(self.name).name} ({self.sample_kind})"


@dataclass(frozen=True)
class Assessment:
    """The results of an evaluation, and the folder that they are written to."""

    config: EvaluateConfig
    loaded: LoadedSaes
    model: dict[str, Any]
    texts: list[TextScores]
    verdicts: dict[str, list[Verdict]]
    """Per SAE, the verdict on each text; the first one counts."""
    folder: Path

    @staticmethod
    def from_scores(context: EvalContext, texts: list[TextScores]) -> Assessment:
        """Judge each SAE by its scores on each text."""
        config, loaded, head = context.config, context.loaded, context.head
        verdicts = {
            name: [judge_sae(sae, text.scores[name], context.dead_threshold, config.health) for text in texts]
            for name, sae in loaded.saes.items()
        }
        model = {
            "name": head.base.name,
            "architecture": head.architecture,
            "predicts": {"causal": "next tokens", "masked": "masked tokens", "none": "nothing"}[head.kind],
            "dtype": next(name for name, dtype in DTYPES.items() if dtype is head.base.dtype),
        }
        whole_run = loaded.run_dir is not None and loaded.path.resolve() in (loaded.run_dir, loaded.run_dir / SAES_DIR)
        default_folder = loaded.run_dir if whole_run and loaded.run_dir is not None else loaded.path
        return Assessment(config, loaded, model, texts, verdicts, Path(config.out) if config.out else default_folder)

    def to_log_record(self) -> dict[str, dict[str, float]]:
        """Return {SAE: verdict and metrics on the first text} for the logs."""
        first = self.texts[0].scores
        return {
            name: {
                "health_passed": verdict.n_passed,
                "health_metrics": verdict.n_judged,
                **{metric: scored.estimate.value for metric, scored in first[name].metrics.items()},
            }
            for name, (verdict, *_) in self.verdicts.items()
        }

    def write_files(self) -> list[Path]:
        """Write one file per text and the final assessment, and return their paths; SaetrainError if that fails."""
        names = unique_file_names([text.name for text in self.texts])
        folder = self.folder / EVALUATION_DIR
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in zip(names, self.texts, strict=True):
                write_json(folder / name, self._text_json(text))
            write_json(self.folder / ASSESSMENT_FILE, self.as_json(names))
        except OSError as error:
            raise SaetrainError(
                f"the evaluation can't be written to {folder}: {error.strerror}; choose another folder with --out"
            ) from error
        return [*(folder / name for name in names), self.folder / ASSESSMENT_FILE]

    def as_json(self, names: list[str]) -> dict[str, Any]:
        """Return the content of ``final_assessment.json``; ``names``: the files of the texts."""
        first = self.texts[0]
        return {
            "format": FORMAT_VERSION,
            "saetrain": version("saetrain"),
            "model": self.model,
            "judged_on": {"data_set": first.name, "in_sample": first.in_sample, "held_out": first.description},
            "thresholds": dataclasses.asdict(self.config.health),
            "saes": {
                name: {**verdict.as_json(), "figures": headline_metrics(first.scores[name])}
                for name, (verdict, *_) in self.verdicts.items()
            },
            "evaluations": [f"{EVALUATION_DIR}/{name}" for name in names],
        }

    def _text_json(self, text: TextScores) -> dict[str, Any]:
        return {
            "format": FORMAT_VERSION,
            "saetrain": version("saetrain"),
            "data_set": text.name,
            "in_sample": text.in_sample,
            "held_out": text.description,
            "model": self.model,
            "loss_sequences": text.loss_sequences,
            "settings": _flatten_config(self.config),
            "saes": {name: _sae_json(self.loaded.saes[name], scores) for name, scores in text.scores.items()},
        }


def judge_sae(sae: SavedSae, scores: SaeScores, threshold: float, settings: HealthSettings) -> Verdict:
    """Return the verdict on one SAE by its scores on one text."""
    estimates = {name: metric.estimate for name, metric in scores.metrics.items()}
    baselines = {
        name: {BASELINE_NAMES[baseline]: estimate.value for baseline, estimate in metric.baselines.items()}
        for name, metric in scores.metrics.items()
    }
    coder, l0 = sae.coder, sae.coder.expected_l0()
    bound = min_dead_fraction(l0, coder.num_latents, threshold) if l0 is not None else 0.0
    tokens = scores.metrics["dead_below_threshold"].count
    properties = SaeProperties(
        coder.num_latents, l0, bound, threshold, tokens, sae.metadata.steps, sae.metadata.diverged_step
    )
    return judge_metrics(estimates, baselines, properties, settings)


def headline_metrics(scores: SaeScores) -> dict[str, Any]:
    """Return {metric: value with interval and baselines} of the metrics that the assessment repeats."""
    losses = [name for name in scores.metrics if name.startswith(("ce_", "delta_", "kl", "pooled", "final_hidden"))]
    return {name: scores.metrics[name].as_json(name) for name in (*HEADLINE_METRICS, *losses)}


def _sae_json(sae: SavedSae, scores: SaeScores) -> dict[str, Any]:
    coder = sae.coder
    return {
        "folder": str(sae.folder.resolve()),
        "hookpoint": sae.metadata.hookpoint or sae.metadata.hook_name,
        "d_in": coder.d_in,
        "num_latents": coder.num_latents,
        "k": coder.expected_l0(),
        "documents": scores.n_documents,
        "figures": {name: metric.as_json(name) for name, metric in scores.metrics.items()},
        "classes": {name: replace_non_finite(metrics) for name, metrics in scores.metrics_by_class.items()},
        "frequency": replace_non_finite(scores.frequency),
        "l0_percentiles": scores.l0_percentiles,
        "density": scores.density_histogram,
    }


def _flatten_config(config: EvaluateConfig) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        out.update(value if isinstance(value, dict) else {name: value})
    return out


def unique_file_names(data_sets: list[str]) -> list[str]:
    """Return ``<data set>.json`` for each data set, with numbers where names would be equal."""
    out: list[str] = []
    for name in data_sets:
        # Several data sets that a run mixes have one name together, which may be longer than a path.
        last = Path(name).stem if os.path.exists(name) else name
        stem = "".join(char if char.isalnum() or char in "-_." else "_" for char in last).strip("._") or "text"
        stem = shorten_name(stem, MAX_STEM_BYTES)
        number = 1
        while f"{stem}{'' if number == 1 else f'_{number}'}.json" in out:
            number += 1
        out.append(f"{stem}{'' if number == 1 else f'_{number}'}.json")
    return out


def report_assessment(assessment: Assessment) -> None:
    """Print the results, then write the files, so that a write error loses no metrics."""
    console = open_console()
    if assessment.config.details:
        for name, (verdict, *_) in assessment.verdicts.items():
            _print_details(console, assessment, name, verdict)
    if not assessment.config.details or len(assessment.verdicts) > 1:
        first = assessment.texts[0]
        rows = [summarize_scores(first.scores[name]) for name in assessment.verdicts]
        verdicts = [str(verdict) for verdict, *_ in assessment.verdicts.values()]
        tokens = next(iter(first.scores.values())).metrics["fvu"].count
        console.print(Text(f"on {tokens:,} held-out tokens of {first}:"))
        console.print(build_sae_table({"SAE": list(assessment.verdicts)}, rows, verdicts))
    for name, (verdict, *others) in assessment.verdicts.items():
        other_texts = (f"; {other} on {text}" for other, text in zip(others, assessment.texts[1:], strict=True))
        style = "red" if verdict.n_passed < verdict.n_judged or verdict.diverged_step is not None else "green"
        console.print(Text(f"{name}: {verdict.describe_checks()}{''.join(other_texts)}", style=style))
    console.print(Text(f"written: {', '.join(map(shorten_path, assessment.write_files()))}"))


def summarize_scores(scores: SaeScores) -> dict[str, float]:
    """Return the metrics for the row of one SAE; the CE increase replaces a CE recovered with a small denominator."""
    found = {name: metric.estimate.value for name, metric in scores.metrics.items()}
    redundancy = scores.metrics["decoder_redundancy_top100"]
    if RANDOM_DIRECTIONS in redundancy.baselines:
        found[RANDOM_REDUNDANCY] = redundancy.baselines[RANDOM_DIRECTIONS].value
    recovered = scores.metrics.get("ce_recovered_zero")
    found.pop("ce_recovered_zero" if recovered and recovered.flag else "delta_ce", None)
    return found


def _print_details(console: Console, assessment: Assessment, name: str, verdict: Verdict) -> None:
    """Print all metrics of one SAE on each text, and its judgments with their reasons."""
    coder = assessment.loaded.saes[name].coder
    l0 = coder.expected_l0()
    size = f"k = {l0:g}, " if l0 is not None else ""
    title = f"{name}: {size}{coder.num_latents:,} latents, width {coder.d_in}"
    console.print(build_metrics_table(title, name, assessment.texts))
    console.print(build_verdict_table(verdict, f"health on {assessment.texts[0]}"))
    for metric, judgment in verdict.judgments.items():
        advice = f"; {judgment.advice}" if judgment.advice else ""
        console.print(Text(f"  {metric}: {judgment.reason}{advice}"))


def build_metrics_table(title: str, sae: str, texts: list[TextScores]) -> Table:
    """Return the table of one SAE: its metrics on each text, with the baselines below."""
    # Narrow gaps and one word per line make the table fit into 80 columns.
    table = Table(
        title=Text(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False
    )
    shown = [name for name in METRIC_COLUMNS if name in texts[0].scores[sae].metrics]
    table.add_column("text", overflow="fold")
    for name in shown:
        table.add_column(METRIC_COLUMNS[name].replace(" ", "\n"), justify="right", no_wrap=True, overflow="fold")
    for text in texts:
        metrics = text.scores[sae].metrics
        label = Text(f"{Path(text.name).name}\n{text.sample_kind}\n{_describe_counts(metrics)}")
        table.add_row(label, *(_format_metric(metrics[name]) for name in shown))
        present = {baseline for name in shown for baseline in metrics[name].baselines}
        for baseline in (name for name in BASELINE_NAMES if name in present):
            values = [metrics[name].baselines.get(baseline) for name in shown]
            cells = [Text(_format_value(value.value) if value else "", style="dim") for value in values]
            table.add_row(Text(f"  {BASELINE_NAMES[baseline]}", style="dim"), *cells)
        table.add_section()
    return table


def _describe_counts(metrics: dict[str, MetricResult]) -> str:
    """Return for example ``8,000 tokens``, and on how many tokens the model's loss or output was scored."""
    counts = f"{metrics['explained_variance'].count:,} tokens"
    for name, what in (("ce_clean", "loss"), ("final_hidden_error", "output")):
        if name in metrics:
            counts += f",\n{what} on {metrics[name].count:,}"
    return counts


def _format_metric(metric: MetricResult) -> Text:
    estimate = metric.estimate
    cell = Text(_format_value(estimate.value))
    if estimate.low < estimate.high:
        cell.append(f"\n[{_format_value(estimate.low)},\n{_format_value(estimate.high)}]", style="dim")
    if metric.flag:
        cell.append("\n" + metric.flag.replace(" ", "\n"), style="yellow")
    return cell


def _format_value(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def build_verdict_table(verdict: Verdict, title: str) -> Table:
    """Return the table of the four judged metrics with threshold and status."""
    table = Table(title=Text(title), title_justify="left")
    for heading in ("metric", "value", "threshold", "status"):
        table.add_column(heading, no_wrap=heading in ("metric", "status"), overflow="fold")
    for name, judgment in verdict.judgments.items():
        table.add_row(Text(name), *_format_judgment(judgment))
    return table


def _format_judgment(judgment: Judgment) -> tuple[Text, Text, Text]:
    value = _format_value(judgment.value)
    if judgment.low < judgment.high:
        value += f" [{_format_value(judgment.low)}, {_format_value(judgment.high)}]"
    return Text(value), Text(judgment.threshold), Text(judgment.status, style=STATUS_STYLES[judgment.status])
