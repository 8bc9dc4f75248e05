"""``saetrain compare RUN [RUN ...]``: the assessments of several runs in one table, beside the settings that differ."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import statistics
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from saetrain.atomic_io import write_atomic, write_json
from saetrain.config import CompareConfig, read_yaml
from saetrain.errors import SaetrainError
from saetrain.evaluation.bootstrap import Estimate
from saetrain.evaluation.evaluator import EvalSettings
from saetrain.evaluation.health import HealthSettings
from saetrain.evaluation.score import ScoreSettings
from saetrain.interop.saetrain_format import CONFIG_FILE as SAE_CONFIG
from saetrain.logs.console import log_rank0
from saetrain.logs.jsonl import METRICS_FILE as METRICS
from saetrain.runs.evaluate.report import ASSESSMENT_FILE, DEFAULT_TABLE_COLUMNS
from saetrain.runs.evaluate.report import FORMAT_VERSION as ASSESSMENT_FORMAT
from saetrain.runs.run_dir import CONFIG_FILE, SAES_DIR, is_run_dir

FORMAT_VERSION = 1
LOCATION_SETTINGS = ("run_name", "save_dir")
"""Settings that say where a run lies, which its name does already."""
SCORING_SETTINGS = {
    field.name
    for settings_class in (EvalSettings, ScoreSettings, HealthSettings)
    for field in dataclasses.fields(settings_class)
}
"""Settings that say nothing of the figures, for a later evaluation may have had others: the assessment's count."""
DERIVED_FROM = {
    "lr_warmup_steps": ("max_tokens", "batch_size", "grad_acc_steps", "ctx_len"),
    "weight_decay": ("lr",),
    "dead_window_tokens": ("max_tokens", "k", "num_latents", "expansion_factor"),
    "kernels": ("device", "optimizer", "loss_fn"),
    "compute_dtype": ("device", "kernels", "optimizer", "loss_fn"),
}
"""{setting: those that it follows unless it is given}; where one of these differs, it is left to the file."""
PATH_SETTINGS = ("model", "dataset", "finetune")
"""Settings that may be paths."""
HEADLINE_SETTINGS = ("model", "dataset", "k", "num_latents", "auxk_alpha", "lr", "loss_fn", "max_tokens")
"""Settings that are named beneath the table where all runs share them."""
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
"""Figures that an assessment holds among its verdict's metrics alone, and their names there."""
TOKENS_SCORED = "the numbers of tokens scored"
LOSS_TOKENS_SCORED = "the numbers of tokens on which the model's loss was scored"


@dataclass(frozen=True)
class SaeRow:
    """One SAE: of which run, its settings, verdict and figures; of what it was judged on, ``judged``."""

    run: str
    sae: str
    verdict: str
    settings: dict[str, Any]
    judged_on: dict[str, Any]
    metrics: dict[str, Estimate]
    tokens_per_second: float | None


@dataclass(frozen=True)
class Comparison:
    """All rows, and the settings of which they do not share the value, in the order of the settings file."""

    rows: list[SaeRow]
    differing_settings: list[str]

    @staticmethod
    def from_rows(rows: list[SaeRow]) -> Comparison:
        """Find out which settings differ; runs whose settings are not known say nothing of it."""
        known = [row.settings for row in rows if row.settings]
        names = list(dict.fromkeys(name for settings in known for name in settings))
        differing_settings = [
            name
            for name in names
            if name not in SCORING_SETTINGS.union(LOCATION_SETTINGS) and not _all_equal(s.get(name) for s in known)
        ]
        return Comparison(rows, differing_settings)

    def shown_settings(self) -> list[str]:
        """The differing settings without those that differ because others do."""
        return [
            name
            for name in self.differing_settings
            if not set(DERIVED_FROM.get(name, ())).intersection(self.differing_settings)
        ]

    def metric_names(self) -> list[str]:
        """Names of the figures that at least one SAE has."""
        return [name for name in METRIC_TITLES if any(name in row.metrics for row in self.rows)]

    def shared_settings(self) -> dict[str, Any]:
        """{setting: value} of the headlines that all runs share."""
        settings = self.rows[0].settings if all(row.settings for row in self.rows) else {}
        return {
            name: settings[name]
            for name in HEADLINE_SETTINGS
            if name in settings and name not in self.differing_settings
        }

    def comparability_remarks(self) -> list[str]:
        """What makes the figures less comparable than they look."""
        out = []
        for key in self.rows[0].judged_on:
            values = dict.fromkeys(
                format_value(row.judged_on[key]) for row in self.rows if row.judged_on[key] is not None
            )
            if len(values) > 1:
                out.append(f"{key} differ, so the SAEs are not quite comparable: {'; '.join(values)}")
        return out

    def as_json(self) -> dict[str, Any]:
        """For a file."""
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
                    "figures": {name: _estimate_as_json(estimate) for name, estimate in row.metrics.items()},
                    "tokens_scored": row.judged_on[TOKENS_SCORED],
                    "loss_tokens_scored": row.judged_on[LOSS_TOKENS_SCORED],
                    "tokens_per_second": row.tokens_per_second,
                }
                for row in self.rows
            ],
        }

    def as_csv(self) -> str:
        """The same with a line an SAE; what is not known is left empty."""
        text = io.StringIO()
        ends = [f"{name}{end}" for name in self.metric_names() for end in ("", "_low", "_high")]
        counts = ("tokens_scored", "loss_tokens_scored", "tokens_per_second")
        lines = csv.DictWriter(
            text, ["run", "sae", "verdict", *self.differing_settings, *ends, *counts], lineterminator="\n"
        )
        lines.writeheader()
        for row in self.rows:
            values: dict[str, Any] = {name: format_value(row.settings.get(name)) for name in self.differing_settings}
            for name, estimate in row.metrics.items():
                value, low, high = _estimate_as_json(estimate).values()
                values.update({name: value, f"{name}_low": low, f"{name}_high": high})
            own = {"run": row.run, "sae": row.sae, "verdict": row.verdict}
            numbers = (row.judged_on[TOKENS_SCORED], row.judged_on[LOSS_TOKENS_SCORED], row.tokens_per_second)
            lines.writerow({**own, **values, **dict(zip(counts, numbers, strict=True))})
        return text.getvalue()


def compare_runs(config: CompareConfig) -> Comparison:
    """Read, print and write; SaetrainError for what the user can mend."""
    files = [run for run in config.runs if Path(run).is_file()]
    runs = [run for run in config.runs if run not in files]
    if not runs:
        raise SaetrainError(f"{files[0]}: is a file; give the folders of runs")
    for file in files:
        log_rank0(f"{file}: is a file and no run's folder, so it is left out")
    names = [Path(run).resolve().name for run in runs]
    shown = names if len(set(names)) == len(names) else runs
    rows = [row for run, name in zip(runs, shown, strict=True) for row in read_run(Path(run), name)]
    comparison = Comparison.from_rows(rows)
    print_tables(comparison)
    if config.out is not None:
        write_comparison(comparison, Path(config.out))
    return comparison


def read_run(folder: Path, name: str) -> list[SaeRow]:
    """The rows of one run, or of one SAE that was assessed by itself; SaetrainError where there is no assessment."""
    if not folder.is_dir():
        raise SaetrainError(f"{folder}: there is no such folder; give the folders of runs")
    path = folder / ASSESSMENT_FILE
    if not path.exists():
        advice = f"`saetrain evaluate {folder}` makes one"
        if is_run_dir(folder) and not (folder / SAES_DIR).is_dir():
            advice = "its run is not finished: --resume goes on with it"
        raise SaetrainError(f"{folder}: holds no {ASSESSMENT_FILE}; {advice}")
    content = _read_json(path)
    found = content.get("format")
    if found != ASSESSMENT_FORMAT:
        raise SaetrainError(
            f"{path}: is of format {found}, and this version reads {ASSESSMENT_FORMAT}; `saetrain evaluate {folder}` "
            "makes it anew"
        )
    config = folder / CONFIG_FILE
    settings = read_yaml(str(config), flag="") if config.exists() else {}
    # The settings' batch is that of each process.
    trained = next((folder / SAES_DIR).rglob(SAE_CONFIG), None)
    if settings and trained is not None:
        settings["processes"] = _read_json(trained).get("saetrain", {}).get("processes", 1)
    speed = mean_tokens_per_second(folder / METRICS)
    try:
        rows = [_build_row(name, sae, content, settings, speed) for sae in content["saes"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise SaetrainError(
            f"{path}: is not as saetrain writes it ({type(error).__name__}: {error}); `saetrain evaluate {folder}` "
            "makes it anew"
        ) from error
    if not rows:
        raise SaetrainError(f"{path}: holds no SAE; `saetrain evaluate {folder}` makes it anew")
    return rows


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SaetrainError(f"{path}: can't be read: {error.strerror}") from error
    except ValueError as error:
        raise SaetrainError(f"{path}: is no JSON ({error}); `saetrain evaluate {path.parent}` makes it anew") from error
    if not isinstance(content, dict):
        raise SaetrainError(f"{path}: should hold a JSON object; `saetrain evaluate {path.parent}` makes it anew")
    return content


def _build_row(run: str, sae: str, content: dict[str, Any], settings: dict[str, Any], speed: float | None) -> SaeRow:
    entry = content["saes"][sae]
    found = {**entry["figures"], **{name: entry["metrics"][judged] for name, judged in VERDICT_METRICS.items()}}
    # The pooled cosine counts sequences, so its tokens are those of the error beside it.
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


def _parse_estimate(figure: dict[str, Any]) -> Estimate:
    ends = {end: float(figure[end]) for end in ("low", "high") if figure.get(end) is not None}
    return Estimate(float(figure["value"]), **ends)


def mean_tokens_per_second(path: Path) -> float | None:
    """Mean speed of training over the lines of ``metrics.jsonl``; None where it holds none.

    Each line tells the rate since the one before, so the mean over equal numbers of tokens is the harmonic one.
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
            raise SaetrainError(f"{path}: line {number} is not as saetrain writes it; remove that line") from error
    return statistics.harmonic_mean(rates) if rates else None


def print_tables(comparison: Comparison) -> None:
    """Print the tables, and what all share or makes the figures less comparable beneath them."""
    has_known_width = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(file=sys.stdout, width=None if has_known_width else DEFAULT_TABLE_COLUMNS, highlight=False)
    for grid in build_tables(comparison, console.width):
        console.print(grid)
    shared = [f"{name} {_format_setting(name, [value])[0]}" for name, value in comparison.shared_settings().items()]
    if shared:
        console.print(Text(f"in all: {', '.join(shared)}"))
    followers = [name for name in comparison.differing_settings if name not in comparison.shown_settings()]
    if followers:
        console.print(Text(f"differ with these, see --out: {', '.join(followers)}"))
    for remark in comparison.comparability_remarks():
        console.print(Text(remark, style="yellow"))


def build_tables(comparison: Comparison, width: int) -> list[Table]:
    """A column for each SAE; what does not fit into ``width`` goes into further tables, so that no figure is cut."""
    rows = comparison.rows
    settings, metrics = _settings_cells(comparison), _metrics_cells(comparison)
    label = max(map(len, (*settings, *metrics)))
    least = max(_max_line_length(cells) for cells in metrics.values())
    widest = max(least, *map(_max_line_length, settings.values()), *(len(row.run) for row in rows))
    room = width - label - 4  # less the label's own borders and padding; a column's are 3
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
    """{what is shown: a cell for each SAE} of what the SAEs are."""
    rows = comparison.rows
    shown = {
        name: _format_setting(name, [row.settings.get(name) for row in rows]) for name in comparison.shown_settings()
    }
    return {"SAE": [Text(row.sae) for row in rows], **{name: list(map(Text, cells)) for name, cells in shown.items()}}


def _metrics_cells(comparison: Comparison) -> dict[str, list[Text]]:
    """{what is shown: a cell for each SAE} of what was found, less what no SAE has."""
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
    """The values of a setting for the terminal: of paths the last part, unless that makes two of them alike."""
    whole = list(map(format_value, values))
    if name not in PATH_SETTINGS:
        return whole
    ends = [
        format_value([_last_path_part(item) for item in value] if isinstance(value, list) else _last_path_part(value))
        for value in values
    ]
    return ends if len(set(ends)) == len(set(whole)) else whole


def _last_path_part(value: Any) -> Any:
    """The last part of a path; a hub id, which has one slash within, stays whole."""
    path = isinstance(value, str) and (value.startswith(("/", ".", "~")) or value.count("/") > 1)
    return Path(value).name or value if path else value


def format_value(value: Any) -> str:
    """A setting's value as it would be typed; none as nothing."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return ", ".join(f"{name} {format_value(item)}" for name, item in value.items())
    return " ".join(map(format_value, value)) if isinstance(value, list) else str(value)


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write the file that ``--out`` names, as its ending says."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            write_atomic(path, comparison.as_csv())
        else:
            write_json(path, comparison.as_json())
    except OSError as error:
        raise SaetrainError(f"--out {path}: can't be written: {error.strerror}") from error
    print(f"written: {path}")


def _estimate_as_json(estimate: Estimate) -> dict[str, float | None]:
    """Numbers that JSON has; bounds that are not known as null."""
    values = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    return {name: value if value == value else None for name, value in values.items()}


def _all_equal(values: Any) -> bool:
    first, *rest = values
    return all(value == first for value in rest)
