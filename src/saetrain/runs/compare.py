"""``saetrain compare RUN [RUN ...]``: the assessments of several runs in one table, beside the settings that differ."""

from __future__ import annotations

import csv
import io
import json
import statistics
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from saetrain.config import CompareConfig, read_yaml
from saetrain.errors import SaetrainError
from saetrain.evaluation.bootstrap import Estimate
from saetrain.files import write_atomic, write_json
from saetrain.logs.jsonl import NAME as METRICS
from saetrain.runs.assessment import ASSESSMENT, WIDTH
from saetrain.runs.assessment import FORMAT as ASSESSMENT_FORMAT
from saetrain.runs.directory import CONFIG, SAES, is_run

FORMAT = 1
PLACE = ("run_name", "save_dir")
"""Settings that say where a run lies, which its name does already."""
HEADLINES = ("model", "dataset", "k", "num_latents", "auxk_alpha", "lr", "loss_fn", "max_tokens")
"""Settings that are named beneath the table where all runs share them."""
FIGURES = {
    "explained_variance": "explained variance",
    "ce_recovered_zero": "CE recovered (zero)",
    "l0": "L0",
    "dead_below_threshold": "dead by rate",
    "dead_never_fired": "never fired",
    "decoder_redundancy_top100": "redundancy",
}
JUDGED = {"decoder_redundancy_top100": "redundancy"}
"""Figures that an assessment holds among its verdict's metrics alone, and their names there."""


@dataclass(frozen=True)
class Row:
    """One SAE: of which run, its settings, verdict and figures; of what it was judged on, ``judged``."""

    run: str
    sae: str
    verdict: str
    settings: dict[str, Any]
    judged: dict[str, Any]
    figures: dict[str, Estimate]
    tokens_per_second: float | None


@dataclass(frozen=True)
class Comparison:
    """All rows, and the settings of which they do not share the value, in the order of the settings file."""

    rows: list[Row]
    differing: list[str]

    @staticmethod
    def of(rows: list[Row]) -> Comparison:
        """Find out which settings differ; runs whose settings are not known say nothing of it."""
        known = [row.settings for row in rows if row.settings]
        names = list(dict.fromkeys(name for settings in known for name in settings))
        differing = [name for name in names if name not in PLACE and not _same(s.get(name) for s in known)]
        return Comparison(rows, differing)

    def figures(self) -> list[str]:
        """Names of the figures that at least one SAE has."""
        return [name for name in FIGURES if any(name in row.figures for row in self.rows)]

    def shared(self) -> dict[str, Any]:
        """{setting: value} of the headlines that all runs share."""
        settings = self.rows[0].settings if all(row.settings for row in self.rows) else {}
        return {name: settings[name] for name in HEADLINES if name in settings and name not in self.differing}

    def remarks(self) -> list[str]:
        """What makes the figures less comparable than they look."""
        out = []
        for key in self.rows[0].judged:
            if not _same(row.judged[key] for row in self.rows):
                values = dict.fromkeys(show(row.judged[key]) for row in self.rows)
                out.append(f"{key} differ, so the rows are not quite comparable: {'; '.join(values)}")
        return out

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return {
            "format": FORMAT,
            "saetrain": version("saetrain"),
            "differing_settings": self.differing,
            "shared_settings": self.shared(),
            "remarks": self.remarks(),
            "saes": [
                {
                    "run": row.run,
                    "sae": row.sae,
                    "verdict": row.verdict,
                    "settings": {name: row.settings.get(name) for name in self.differing},
                    "figures": {name: _plain(estimate) for name, estimate in row.figures.items()},
                    "tokens_per_second": row.tokens_per_second,
                }
                for row in self.rows
            ],
        }

    def as_csv(self) -> str:
        """The same with a line an SAE; what is not known is left empty."""
        text = io.StringIO()
        ends = [f"{name}{end}" for name in self.figures() for end in ("", "_low", "_high")]
        lines = csv.DictWriter(
            text, ["run", "sae", "verdict", *self.differing, *ends, "tokens_per_second"], lineterminator="\n"
        )
        lines.writeheader()
        for row in self.rows:
            values: dict[str, Any] = {name: show(row.settings.get(name)) for name in self.differing}
            for name, estimate in row.figures.items():
                value, low, high = _plain(estimate).values()
                values.update({name: value, f"{name}_low": low, f"{name}_high": high})
            own = {"run": row.run, "sae": row.sae, "verdict": row.verdict}
            lines.writerow({**own, **values, "tokens_per_second": row.tokens_per_second})
        return text.getvalue()


def compare(config: CompareConfig) -> Comparison:
    """Read, print and write; SaetrainError for what the user can mend."""
    names = [Path(run).resolve().name for run in config.runs]
    shown = names if len(set(names)) == len(names) else list(config.runs)
    rows = [row for run, name in zip(config.runs, shown, strict=True) for row in read_run(Path(run), name)]
    comparison = Comparison.of(rows)
    show_table(comparison)
    if config.out is not None:
        write(comparison, Path(config.out))
    return comparison


def read_run(folder: Path, name: str) -> list[Row]:
    """The rows of one run, or of one SAE that was assessed by itself; SaetrainError where there is no assessment."""
    if not folder.is_dir():
        raise SaetrainError(f"{folder}: there is no such folder; give the folders of runs")
    path = folder / ASSESSMENT
    if not path.exists():
        way = f"`saetrain evaluate {folder}` makes one"
        if is_run(folder) and not (folder / SAES).is_dir():
            way = "its run is not finished: --resume goes on with it"
        raise SaetrainError(f"{folder}: holds no {ASSESSMENT}; {way}")
    content = _json(path)
    found = content.get("format")
    if found != ASSESSMENT_FORMAT:
        raise SaetrainError(
            f"{path}: is of format {found}, and this version reads {ASSESSMENT_FORMAT}; `saetrain evaluate {folder}` "
            "makes it anew"
        )
    config = folder / CONFIG
    settings = read_yaml(str(config), flag="") if config.exists() else {}
    speed = tokens_per_second(folder / METRICS)
    try:
        rows = [_row(name, sae, content, settings, speed) for sae in content["saes"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise SaetrainError(
            f"{path}: is not as saetrain writes it ({type(error).__name__}: {error}); `saetrain evaluate {folder}` "
            "makes it anew"
        ) from error
    if not rows:
        raise SaetrainError(f"{path}: holds no SAE; `saetrain evaluate {folder}` makes it anew")
    return rows


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SaetrainError(f"{path}: can't be read: {error.strerror}") from error
    except ValueError as error:
        raise SaetrainError(f"{path}: is no JSON ({error}); `saetrain evaluate {path.parent}` makes it anew") from error
    if not isinstance(content, dict):
        raise SaetrainError(f"{path}: should hold a JSON object; `saetrain evaluate {path.parent}` makes it anew")
    return content


def _row(run: str, sae: str, content: dict[str, Any], settings: dict[str, Any], speed: float | None) -> Row:
    entry = content["saes"][sae]
    found = {**entry["figures"], **{name: entry["metrics"][judged] for name, judged in JUDGED.items()}}
    judged = {
        "the data sets": content["judged_on"]["data_set"],
        "the numbers of tokens scored": entry["figures"]["explained_variance"]["count"],
        "the thresholds of the verdict": content["thresholds"],
    }
    figures = {name: _estimate(found[name]) for name in FIGURES if name in found and found[name]["value"] is not None}
    return Row(run, sae, entry["verdict"], settings, judged, figures, speed)


def _estimate(figure: dict[str, Any]) -> Estimate:
    ends = {end: float(figure[end]) for end in ("low", "high") if figure.get(end) is not None}
    return Estimate(float(figure["value"]), **ends)


def tokens_per_second(path: Path) -> float | None:
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


def show_table(comparison: Comparison) -> None:
    """Print the table, as wide as it must be where there is no terminal to fold it for."""
    terminal = sys.stdout.isatty()
    console = Console(file=sys.stdout, width=None if terminal else WIDTH, highlight=False)
    grid = table(comparison)
    if not terminal:
        console.width = max(WIDTH, Measurement.get(console, console.options.update(max_width=10_000), grid).maximum)
    console.print(grid)
    shared = comparison.shared()
    if shared:
        console.print(Text(f"in all: {', '.join(f'{name} {show(value)}' for name, value in shared.items())}"))
    for remark in comparison.remarks():
        console.print(Text(remark, style="yellow"))


def table(comparison: Comparison) -> Table:
    """A row for each SAE."""
    grid = Table()
    for heading in ("run", "SAE", *comparison.differing, "verdict"):
        grid.add_column(heading, overflow="fold")
    figures = comparison.figures()
    for name in figures:
        grid.add_column(FIGURES[name], justify="right")
    grid.add_column("tokens/s", justify="right")
    for row in comparison.rows:
        settings = [show(row.settings.get(name)) for name in comparison.differing]
        cells = [_cell(row.figures[name]) if name in row.figures else Text() for name in figures]
        speed = f"{row.tokens_per_second:,.0f}" if row.tokens_per_second is not None else ""
        grid.add_row(*map(Text, (row.run, row.sae, *settings, row.verdict)), *cells, Text(speed))
    return grid


def _cell(estimate: Estimate) -> Text:
    cell = Text(f"{estimate.value:.4g}")
    if estimate.low == estimate.low:
        cell.append(f"\n[{estimate.low:.4g}, {estimate.high:.4g}]", style="dim")
    return cell


def show(value: Any) -> str:
    """A setting's value as it would be typed; none as nothing."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return ", ".join(f"{name} {show(item)}" for name, item in value.items())
    return " ".join(map(show, value)) if isinstance(value, list) else str(value)


def write(comparison: Comparison, path: Path) -> None:
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


def _plain(estimate: Estimate) -> dict[str, float | None]:
    """Numbers that JSON has; bounds that are not known as null."""
    values = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
    return {name: value if value == value else None for name, value in values.items()}


def _same(values: Any) -> bool:
    first, *rest = values
    return all(value == first for value in rest)
