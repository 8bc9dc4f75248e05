"""``saetrain compare RUN [RUN ...]``: the assessments of several runs in one table, with the settings that differ."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import statistics
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from saetrain.atomic_io import write_atomic, write_json
from saetrain.config import CompareConfig, read_yaml
from saetrain.errors import SaetrainError
from saetrain.evaluation.bootstrap import Estimate
from saetrain.evaluation.evaluator import EvalSettings, ScoreSettings
from saetrain.evaluation.health import HealthSettings
from saetrain.interop.metadata import SaeMetadata
from saetrain.interop.schema import SAE_CONFIG_FILE, read_sae_config
from saetrain.logs.console import log_rank0
from saetrain.logs.jsonl import METRICS_FILE as METRICS
from saetrain.runs.evaluate.report import ASSESSMENT_FILE, open_console
from saetrain.runs.evaluate.report import FORMAT_VERSION as ASSESSMENT_FORMAT
from saetrain.runs.run_dir import CONFIG_FILE, SAES_DIR, is_run_dir

FORMAT_VERSION = 1
IGNORED_SETTINGS = {"run_name", "save_dir"}.union(
    field.name for scoring in (EvalSettings, ScoreSettings, HealthSettings) for field in dataclasses.fields(scoring)
)
"""Settings that are not compared: the location of the run, and the scoring, which a later evaluation may change."""
DERIVED_FROM = {
    "lr_warmup_steps": ("max_tokens", "batch_size", "grad_acc_steps", "ctx_len"),
    "weight_decay": ("lr",),
    "dead_window_tokens": ("max_tokens", "k", "num_latents", "expansion_factor"),
    "kernels": ("device", "optimizer", "loss_fn"),
    "compute_dtype": ("device", "kernels", "optimizer", "loss_fn"),
}
"""{setting: settings that it is derived from by default}; if one of these differs, only --out contains the setting."""
PATH_SETTINGS = ("model", "dataset", "finetune")
"""Settings that may be paths."""
HEADLINE_SETTINGS = ("model", "dataset", "k", "num_latents", "auxk_alpha", "lr", "loss_fn", "max_tokens")
"""Settings that are printed below the table if all runs share them."""
METRIC_TITLES = {
    "explained_variance": "explained variance",
    "ce_recovered_zero": "CE recovered (zero)",
    "delta_ce": "CE increase",
    "kl": "KL",
    "pooled_cosine": "pooled cosine",
    "l0": "L0",
    "dead_below_threshold": "dead by rate",
    "decoder_redundancy_top100": "redundancy",
}
VERDICT_METRICS = {"decoder_redundancy_top100": "redundancy"}
"""Metrics that an assessment has only in its verdict, and their names there."""
TOKENS_SCORED = "the numbers of tokens scored"
LOSS_TOKENS_SCORED = "the numbers of tokens on which the model's loss was scored"


@dataclass(frozen=True)
class SaeRow:
    """One SAE: its run, settings, verdict and metrics; ``judged_on``: what must agree for a fair comparison."""

    run: str
    sae: str
    verdict: str
    settings: dict[str, Any]
    judged_on: dict[str, Any]
    metrics: dict[str, Estimate]
    tokens_per_second: float | None


@dataclass(frozen=True)
class Comparison:
    """All rows, and the settings that differ between them, in the order of the settings file."""

    rows: list[SaeRow]
    differing_settings: list[str]

    @staticmethod
    def from_rows(rows: list[SaeRow]) -> Comparison:
        """Find the settings that differ; rows without settings are ignored."""
        known = [row.settings for row in rows if row.settings]
        names = list(dict.fromkeys(name for settings in known for name in settings))
        differing_settings = [
            name
            for name in names
            if name not in IGNORED_SETTINGS and any(settings.get(name) != known[0].get(name) for settings in known[1:])
        ]
        return Comparison(rows, differing_settings)

    def shown_settings(self) -> list[str]:
        """Return the differing settings without those that differ because of others."""
        differing = set(self.differing_settings)
        return [name for name in self.differing_settings if differing.isdisjoint(DERIVED_FROM.get(name, ()))]

    def metric_names(self) -> list[str]:
        """Return the names of the metrics that at least one SAE has."""
        return [name for name in METRIC_TITLES if any(name in row.metrics for row in self.rows)]

    def shared_settings(self) -> dict[str, Any]:
        """Return {setting: value} of the headline settings that all runs share."""
        settings = self.rows[0].settings if all(row.settings for row in self.rows) else {}
        return {
            name: settings[name]
            for name in HEADLINE_SETTINGS
            if name in settings and name not in self.differing_settings
        }

    def comparability_remarks(self) -> list[str]:
        """Return remarks on what makes the metrics less comparable."""
        out = []
        for key in self.rows[0].judged_on:
            values = dict.fromkeys(
                format_value(row.judged_on[key]) for row in self.rows if row.judged_on[key] is not None
            )
            if len(values) > 1:
                out.append(f"{key} differ, so the SAEs are only partly comparable: {'; '.join(values)}")
        return out

    def as_json(self) -> dict[str, Any]:
        """Return the comparison as the content of a JSON file."""
        return {
            "format": FORMAT_VERSION,
            "saetrain": version("saetrain"),
            "differing_settings": self.differing_settings,
            "shared_settings": self.shared_settings(),
            "remarks": self.comparability_remarks(),
            "saes": [
                {
                    "run": row.run,
                    "sae": row.sae,
                    "verdict": row.verdict,
                    "settings": {name: row.settings.get(name) for name in self.differing_settings},
                    "figures": {name: estimate.as_json() for name, estimate in row.metrics.items()},
                    "tokens_scored": row.judged_on[TOKENS_SCORED],
                    "loss_tokens_scored": row.judged_on[LOSS_TOKENS_SCORED],
                    "tokens_per_second": row.tokens_per_second,
                }
                for row in self.rows
            ],
        }

    def as_csv(self) -> str:
        """Return the comparison as CSV with one line per SAE; unknown values are empty."""
        text = io.StringIO()
        ends = {"value": "", "low": "_low", "high": "_high"}
        metric_columns = [name + end for name in self.metric_names() for end in ends.values()]
        counts = ["tokens_scored", "loss_tokens_scored", "tokens_per_second"]
        columns = ["run", "sae", "verdict", *self.differing_settings, *metric_columns, *counts]
        lines = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
        lines.writeheader()
        for sae in self.as_json()["saes"]:
            settings = {name: format_value(value) for name, value in sae["settings"].items()}
            estimates = sae["figures"].items()
            metrics = {name + end: estimate[key] for name, estimate in estimates for key, end in ends.items()}
            lines.writerow({**sae, **settings, **metrics})
        return text.getvalue()


def compare_runs(config: CompareConfig) -> Comparison:
    """Read the runs, print the tables and write the file; SaetrainError for errors that the user can fix."""
    files = [run for run in config.runs if Path(run).is_file()]
    runs = [run for run in config.runs if run not in files]
    if not runs:
        raise SaetrainError(f"{files[0]}: is a file; pass run directories")
    for file in files:
        log_rank0(f"{file}: is a file and not a run directory, so it is skipped")
    names = [Path(run).resolve().name for run in runs]
    shown = names if len(set(names)) == len(names) else runs
    rows = [row for run, name in zip(runs, shown, strict=True) for row in read_run(Path(run), name)]
    comparison = Comparison.from_rows(rows)
    print_tables(comparison)
    if config.out is not None:
        write_comparison(comparison, Path(config.out))
    return comparison


def read_run(folder: Path, name: str) -> list[SaeRow]:
    """Return the rows of a run, or of one SAE with its own assessment; SaetrainError if there is no assessment."""
    if not folder.is_dir():
        raise SaetrainError(f"{folder}: there is no such folder; pass run directories")
    path = folder / ASSESSMENT_FILE
    if not path.exists():
        advice = f"run `saetrain evaluate {folder}` to create it"
        if is_run_dir(folder) and not (folder / SAES_DIR).is_dir():
            advice = "its run is not finished: continue it with --resume"
        raise SaetrainError(f"{folder}: contains no {ASSESSMENT_FILE}; {advice}")
    content = _read_json(path)
    found = content.get("format")
    if found != ASSESSMENT_FORMAT:
        raise _invalid_file(path, f"has format {found}, but this version reads {ASSESSMENT_FORMAT}")
    config = folder / CONFIG_FILE
    settings = read_yaml(str(config), flag="") if config.exists() else {}
    # The batch size in the settings is per process.
    trained = next((folder / SAES_DIR).rglob(SAE_CONFIG_FILE), None)
    if settings and trained is not None:
        entry = read_sae_config(trained.parent).get("saetrain") or {}
        settings["processes"] = SaeMetadata.from_entry(trained, "saetrain", entry).processes
    speed = mean_tokens_per_second(folder / METRICS)
    try:
        rows = [_build_row(name, sae, content, settings, speed) for sae in content["saes"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise _invalid_file(path, f"is not in saetrain's format ({type(error).__name__}: {error})") from error
    if not rows:
        raise _invalid_file(path, "contains no SAE")
    return rows


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SaetrainError(f"{path}: can't be read: {error.strerror}") from error
    except ValueError as error:
        raise _invalid_file(path, f"is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise _invalid_file(path, "should contain a JSON object")
    return content


def _invalid_file(path: Path, problem: str) -> SaetrainError:
    return SaetrainError(f"{path}: {problem}; run `saetrain evaluate {path.parent}` to create it again")


def _build_row(run: str, sae: str, content: dict[str, Any], settings: dict[str, Any], speed: float | None) -> SaeRow:
    entry = content["saes"][sae]
    found = {**entry["figures"], **{name: entry["metrics"][judged] for name, judged in VERDICT_METRICS.items()}}
    # The pooled cosine counts sequences, so the tokens are taken from the error of the final hidden states.
    losses = (entry["figures"].get(name) for name in ("delta_ce", "final_hidden_error"))
    judged_on = {
        "the data sets": content["judged_on"]["data_set"],
        TOKENS_SCORED: entry["figures"]["explained_variance"]["count"],
        LOSS_TOKENS_SCORED: next((loss["count"] for loss in losses if loss), None),
        "the thresholds of the verdict": content["thresholds"],
    }
    metrics = {
        name: _parse_estimate(found[name])
        for name in METRIC_TITLES
        if name in found and found[name]["value"] is not None
    }
    return SaeRow(run, sae, entry["verdict"], settings, judged_on, metrics, speed)


def _parse_estimate(metric: dict[str, Any]) -> Estimate:
    ends = {end: float(metric[end]) for end in ("low", "high") if metric.get(end) is not None}
    return Estimate(float(metric["value"]), **ends)


def mean_tokens_per_second(path: Path) -> float | None:
    """Return the mean training speed over the lines of ``metrics.jsonl``, or None if it has none.

    The lines cover about equal numbers of tokens, so their mean is the harmonic mean.
    """
    if not path.exists():
        return None
    rates = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            record = json.loads(line)
            if record["kind"] == "train" and record["tokens_per_second"]:
                rates.append(float(record["tokens_per_second"]))
        except (ValueError, KeyError, TypeError) as error:
            raise SaetrainError(f"{path}: line {number} is invalid; remove that line") from error
    return statistics.harmonic_mean(rates) if rates else None


def print_tables(comparison: Comparison) -> None:
    """Print the tables, and below them the shared settings and the remarks on comparability."""
    console = open_console()
    for grid in build_tables(comparison, console.width):
        console.print(grid)
    shared = [f"{name} {_format_setting(name, [value])[0]}" for name, value in comparison.shared_settings().items()]
    if shared:
        console.print(Text(f"all SAEs: {', '.join(shared)}"))
    hidden = [name for name in comparison.differing_settings if name not in comparison.shown_settings()]
    if hidden:
        console.print(Text(f"also different as a result (see --out): {', '.join(hidden)}"))
    for remark in comparison.comparability_remarks():
        console.print(Text(remark, style="yellow"))


def build_tables(comparison: Comparison, width: int) -> list[Table]:
    """Return tables with one column per SAE; SAEs that do not fit into ``width`` go into further tables."""
    rows = comparison.rows
    settings, metrics = _settings_cells(comparison), _metrics_cells(comparison)
    label = max(map(len, (*settings, *metrics)))
    least = max(_max_line_length(cells) for cells in metrics.values())
    widest = max(least, *map(_max_line_length, settings.values()), *(len(row.run) for row in rows))
    room = width - label - 4  # without the borders and padding of the label; those of a column are 3
    count = math.ceil(len(rows) / max(1, room // (least + 3)))
    each = math.ceil(len(rows) / count)
    column = min(widest, max(least, room // each - 3))
    out = []
    for first in range(0, len(rows), each):
        grid = Table()
        grid.add_column("run", min_width=label, overflow="fold")
        for row in rows[first : first + each]:
            grid.add_column(Text(row.run), width=column, overflow="fold")
        for part in (settings, metrics):
            for name, cells in part.items():
                grid.add_row(Text(name), *cells[first : first + each])
            grid.add_section()
        out.append(grid)
    return out


def _settings_cells(comparison: Comparison) -> dict[str, list[Text]]:
    """Return {row title: one cell per SAE} of the SAEs' names and settings."""
    rows = comparison.rows
    shown = {
        name: _format_setting(name, [row.settings.get(name) for row in rows]) for name in comparison.shown_settings()
    }
    return {"SAE": [Text(row.sae) for row in rows], **{name: list(map(Text, cells)) for name, cells in shown.items()}}


def _metrics_cells(comparison: Comparison) -> dict[str, list[Text]]:
    """Return {row title: one cell per SAE} of verdicts and metrics, without rows that no SAE has."""
    rows = comparison.rows
    found = {
        METRIC_TITLES[name]: [_format_estimate(row.metrics.get(name)) for row in rows]
        for name in comparison.metric_names()
    }
    numbers = {
        "tokens scored": [row.judged_on[TOKENS_SCORED] for row in rows],
        "tokens for the loss": [row.judged_on[LOSS_TOKENS_SCORED] for row in rows],
        "tokens/s": [row.tokens_per_second for row in rows],
    }
    counts = {
        name: [Text("" if value is None else f"{value:,.0f}") for value in values]
        for name, values in numbers.items()
        if any(value is not None for value in values)
    }
    return {"verdict": [Text(row.verdict) for row in rows], **found, **counts}


def _format_estimate(estimate: Estimate | None) -> Text:
    if estimate is None:
        return Text()
    value, low, high = (f"{number:.4g}" for number in (estimate.value, estimate.low, estimate.high))
    return Text(value) if low == high else Text.assemble(value, (f"\n[{low}, {high}]", "dim"))


def _max_line_length(cells: list[Text]) -> int:
    return max(len(line) for cell in cells for line in cell.plain.split("\n"))


def _format_setting(name: str, values: list[Any]) -> list[str]:
    """Return the values of a setting for the terminal; of paths the last part, unless that makes values equal."""
    whole = list(map(format_value, values))
    if name not in PATH_SETTINGS:
        return whole
    ends = [
        format_value([_last_path_part(item) for item in value] if isinstance(value, list) else _last_path_part(value))
        for value in values
    ]
    return ends if len(set(ends)) == len(set(whole)) else whole


def _last_path_part(value: Any) -> Any:
    """Return the last part of a path; a hub id, which contains one slash, stays complete."""
    path = isinstance(value, str) and (value.startswith(("/", ".", "~")) or value.count("/") > 1)
    return Path(value).name or value if path else value


def format_value(value: Any) -> str:
    """Return a setting's value as the user would type it; None is empty."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return ", ".join(f"{name} {format_value(item)}" for name, item in value.items())
    return " ".join(map(format_value, value)) if isinstance(value, list) else str(value)


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write the file of ``--out``, as CSV or JSON by its extension."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            write_atomic(path, comparison.as_csv())
        else:
            write_json(path, comparison.as_json())
    except OSError as error:
        raise SaetrainError(f"--out {path}: can't be written: {error.strerror}") from error
    print(f"written: {path}")
