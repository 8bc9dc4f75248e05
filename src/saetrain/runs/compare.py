"""``saetrain compare RUN [RUN ...]``: the assessments of several runs in one table, with the settings that differ."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import statistics
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.text import Text

from saetrain.atomic_io import replace_non_finite, write_atomic, write_json
from saetrain.coders import CODERS
from saetrain.config import CompareConfig
from saetrain.errors import SaetrainError, did_you_mean
from saetrain.evaluation.bootstrap import Estimate
from saetrain.evaluation.evaluator import EvalSettings, ScoreSettings
from saetrain.evaluation.health import HealthSettings
from saetrain.interop.metadata import SaeMetadata
from saetrain.interop.schema import SAE_CONFIG_FILE, read_sae_config
from saetrain.logs.console import log_rank0, print_rank0
from saetrain.logs.jsonl import METRICS_FILE as METRICS
from saetrain.logs.jsonl import read_records
from saetrain.runs.evaluate.report import ASSESSMENT_FILE
from saetrain.runs.evaluate.report import FORMAT_VERSION as ASSESSMENT_FORMAT
from saetrain.runs.run_dir import SAES_DIR, find_config_file, is_run_dir
from saetrain.runs.sae_table import build_sae_table, open_console
from saetrain.small_files import read_json_object, read_settings
from saetrain.typed_values import require_type
from saetrain.untrusted import show_text

FORMAT_VERSION = 1
IGNORED_SETTINGS = {"run_name", "save_dir"}.union(
    field.name for scoring in (EvalSettings, ScoreSettings, HealthSettings) for field in dataclasses.fields(scoring)
)
"""Settings that are not compared: the location of the run, and the scoring, which a later evaluation may change."""
DERIVED_FROM = {
    "lr_warmup_steps": ("max_tokens", "batch_size", "grad_acc_steps", "ctx_len"),
    "weight_decay": ("lr",),
    "dead_window_tokens": ("max_tokens", "k", "num_latents", "expansion_factor"),
    "kernels": ("device", "optimizer", "loss_fn", "architecture"),
    "compute_dtype": ("device", "kernels", "optimizer", "loss_fn", "architecture"),
}
"""{setting: settings that it is derived from by default}; if one of these differs, only --out contains the setting."""
PATH_SETTINGS = ("model", "dataset", "finetune")
"""Settings that may be paths."""
CODER_SETTINGS = dict.fromkeys(field.name for coder in CODERS.values() for field in dataclasses.fields(coder.Settings))
# The settings of a run contain the number of latents, whether or not the factor determines it.
del CODER_SETTINGS["expansion_factor"]
HEADLINE_SETTINGS = ("model", "dataset", *CODER_SETTINGS, "lr", "loss_fn", "max_tokens")
"""Settings that are printed below the table if all runs share them."""
COMPARED_METRICS = (
    "explained_variance",
    "fvu",
    "ce_recovered_zero",
    "delta_ce",
    "kl",
    "pooled_cosine",
    "l0",
    "dead_below_threshold",
    "decoder_redundancy_top100",
    "decoder_near_duplicates",
)
HIGHER_IS_BETTER = ("explained_variance", "ce_recovered_zero", "pooled_cosine")
MIN_LABEL_COLUMNS = 12
"""Smallest width of the names of runs and SAEs in the table, in characters."""
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
        """Return the differing settings without those that differ because of others, the architecture first."""
        differing = set(self.differing_settings)
        shown = [name for name in self.differing_settings if differing.isdisjoint(DERIVED_FROM.get(name, ()))]
        if "architecture" in differing:
            # A flag that some of the architectures do not have differs because of them.
            foreign = {
                name for row in self.rows for name in CODER_SETTINGS if row.settings and name not in row.settings
            }
            shown = ["architecture", *(name for name in shown if name not in {"architecture", *foreign})]
        return shown

    def metric_names(self) -> list[str]:
        """Return the names of the metrics that at least one SAE has."""
        return [name for name in COMPARED_METRICS if any(name in row.metrics for row in self.rows)]

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
                    "settings": {name: _to_json(row.settings.get(name)) for name in self.differing_settings},
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
    comparison = Comparison.from_rows(sort_rows(rows, config.sort) if config.sort else rows)
    print_table(comparison)
    for flag, target in (("--out", config.out), ("--csv", config.csv)):
        if target is not None:
            write_comparison(comparison, flag, Path(target))
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
        elif not is_run_dir(folder) and not (folder / SAE_CONFIG_FILE).exists():
            advice = "it is neither a run nor the folder of an SAE"
        raise SaetrainError(f"{folder}: contains no {ASSESSMENT_FILE}; {advice}")
    content = read_json_object(path, f"; run `saetrain evaluate {folder}` to create it again")
    found = content.get("format")
    if found != ASSESSMENT_FORMAT:
        raise _invalid_file(path, f"has format {found}, but this version reads {ASSESSMENT_FORMAT}")
    # The batch size in the settings is per process.
    trained, processes = next((folder / SAES_DIR).rglob(SAE_CONFIG_FILE), None), {}
    if trained is not None:
        entry = read_sae_config(trained.parent).get("saetrain") or {}
        processes = {"processes": SaeMetadata.from_entry(trained, "saetrain", entry).processes}
    names = content.get("saes")
    settings = {sae: _read_sae_settings(folder, sae) | processes for sae in (names if isinstance(names, dict) else ())}
    speed = mean_tokens_per_second(folder / METRICS)
    try:
        rows = [_build_row(name, sae, content, settings[sae], speed) for sae in content["saes"]]
    except SaetrainError as error:
        raise _invalid_file(path, str(error)) from error
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise _invalid_file(path, f"is not in saetrain's format ({type(error).__name__}: {error})") from error
    if not rows:
        raise _invalid_file(path, "contains no SAE")
    return rows


def _read_sae_settings(folder: Path, sae: str) -> dict[str, Any]:
    """Return the settings of an SAE of a run, without the grid that they come from; none if there is no file."""
    path = find_config_file(folder, sae)
    if ".." in path.relative_to(folder).parts:
        raise SaetrainError(f"{show_text(sae)} is no name of an SAE")
    settings = read_settings(str(path), flag="") if path.exists() else {}
    return {name: value for name, value in settings.items() if name != "grid"}


def _invalid_file(path: Path, problem: str) -> SaetrainError:
    return SaetrainError(f"{path}: {problem}; run `saetrain evaluate {path.parent}` to create it again")


def _build_row(run: str, sae: str, content: dict[str, Any], settings: dict[str, Any], speed: float | None) -> SaeRow:
    entry = content["saes"][sae]
    found = entry["figures"]
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
        for name in COMPARED_METRICS
        if name in found and found[name]["value"] is not None
    }
    return SaeRow(run, sae, require_type(entry["verdict"], str, "verdict"), settings, judged_on, metrics, speed)


def _to_json(value: Any) -> Any:
    """Return a value of a settings file for JSON, which has no dates and no infinity."""
    return json.loads(json.dumps(replace_non_finite(value), default=str))


def _parse_estimate(metric: dict[str, Any]) -> Estimate:
    ends = {end: float(metric[end]) for end in ("low", "high") if metric.get(end) is not None}
    return Estimate(float(metric["value"]), **ends)


def mean_tokens_per_second(path: Path) -> float | None:
    """Return the mean training speed over the lines of ``metrics.jsonl``, or None if it has none.

    The lines cover about equal numbers of tokens, so their mean is the harmonic mean.
    """
    rates = [record.tokens_per_second or 0.0 for record in read_records(path) if record.kind == "train"]
    rates = [rate for rate in rates if rate > 0]
    return statistics.harmonic_mean(rates) if rates else None


def sort_rows(rows: list[SaeRow], metric: str) -> list[SaeRow]:
    """Return the rows from the best to the worst value of ``metric``; rows without it come last."""
    if metric not in COMPARED_METRICS:
        raise SaetrainError(
            f"--sort {metric}: no such metric.{did_you_mean(metric, COMPARED_METRICS)} Allowed: "
            f"{', '.join(COMPARED_METRICS)}"
        )
    sign = -1 if metric in HIGHER_IS_BETTER else 1
    known = [row for row in rows if metric in row.metrics]
    known.sort(key=lambda row: sign * row.metrics[metric].value)
    return known + [row for row in rows if metric not in row.metrics]


def print_table(comparison: Comparison) -> None:
    """Print one row per SAE, and below the shared settings and the remarks on comparability."""
    console, rows = open_console(), comparison.rows
    shared = [f"{name} {_format_setting(name, [value])[0]}" for name, value in comparison.shared_settings().items()]
    labels = {"run": [row.run for row in rows], "SAE": [row.sae for row in rows]}
    settings = {
        name: _format_setting(name, [row.settings.get(name) for row in rows]) for name in comparison.shown_settings()
    }
    if len({row.sae for row in rows}) == 1 < len(rows):
        shared.insert(0, f"SAE {labels.pop('SAE')[0]}")
    metrics = [{name: estimate.value for name, estimate in row.metrics.items()} for row in rows]
    verdicts = [row.verdict for row in rows]
    shown = dict(labels)
    for name, cells in settings.items():
        wider = build_sae_table({**shown, name: cells}, metrics, verdicts)
        # Names of runs and SAEs may wrap, but not to less than MIN_LABEL_COLUMNS.
        excess = sum(max(0, max(map(len, cells)) - MIN_LABEL_COLUMNS) for cells in labels.values())
        unlimited = console.options.update(max_width=sys.maxsize)
        if console.measure(wider, options=unlimited).maximum - excess <= console.width:
            shown[name] = cells
    console.print(build_sae_table(shown, metrics, verdicts))
    if shared:
        console.print(Text(f"all SAEs: {', '.join(shared)}"))
    hidden = [name for name in comparison.differing_settings if name not in shown]
    if hidden:
        console.print(Text(f"also different (see --csv): {', '.join(hidden)}"))
    for remark in comparison.comparability_remarks():
        console.print(Text(remark, style="yellow"))


def _format_setting(name: str, values: list[Any]) -> list[str]:
    """Return the values of a setting for the terminal; of paths the last part, unless that makes values equal."""
    whole = [f"{value:.4g}" if isinstance(value, float) else format_value(value) for value in values]
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


def write_comparison(comparison: Comparison, flag: str, path: Path) -> None:
    """Write the file of ``--out`` or ``--csv``, as CSV for ``--csv`` and names that end in `.csv`, else as JSON."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if flag == "--csv" or path.suffix == ".csv":
            write_atomic(path, comparison.as_csv())
        else:
            write_json(path, comparison.as_json())
    except OSError as error:
        raise SaetrainError(f"{flag} {path}: can't be written: {error.strerror}") from error
    print_rank0(f"written: {path}")
