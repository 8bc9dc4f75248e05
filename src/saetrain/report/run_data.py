"""What a page shows about a run apart from its features: settings, verdict, held-out metrics, and training curves."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np

from saetrain.atomic_io import replace_non_finite
from saetrain.logs.jsonl import METRICS_FILE, StoredRecord, read_records
from saetrain.runs.evaluate.report import ASSESSMENT_FILE, BASELINE_NAMES
from saetrain.runs.run_dir import CONFIG_FILE, EVALUATION_DIR
from saetrain.small_files import read_json_object, read_settings

CURVE_METRICS = ("loss", "fvu", "l0", "dead_below_threshold", "dead_not_fired", "lr")
MAX_CURVE_POINTS = 400
"""Points of a training curve; of a longer one, evenly spaced points are shown."""


def gather_run_data(run: Path) -> dict[str, Any]:
    """Return settings, assessment, evaluations and curves of a run; parts whose files are missing are empty."""
    config = run / CONFIG_FILE
    evaluations = sorted((run / EVALUATION_DIR).glob("*.json"))
    assessment = read_json_object(run / ASSESSMENT_FILE) if (run / ASSESSMENT_FILE).exists() else None
    data = {
        "name": run.resolve().name,
        "settings": read_settings(str(config), flag="") if config.exists() else {},
        "assessment": assessment,
        "evaluations": [_select_scores(read_json_object(path)) for path in evaluations],
        "baseline_names": BASELINE_NAMES,
        **read_curves(run / METRICS_FILE),
    }
    return replace_non_finite(data)


def _select_scores(evaluation: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in evaluation.items() if key not in ("settings", "model")}


def read_curves(path: Path) -> dict[str, Any]:
    """Return the curves of ``metrics.jsonl``: ``train`` on training text, and ``eval`` on held-out text."""
    records: dict[str, list[StoredRecord]] = {"train": [], "eval": []}
    for record in read_records(path):
        kind = {"final": "eval"}.get(record.kind, record.kind)
        if kind in records:
            records[kind].append(record)
    seconds = _estimate_seconds(records["train"])
    curves = {kind: _build_curves(found) for kind, found in records.items()}
    return {"curves": curves, "train_seconds": seconds, "step_ms": _average_step_times(records["train"])}


def _average_step_times(records: list[StoredRecord]) -> dict[str, float]:
    """Return {SAE: median time of its step in ms}, of the SAEs whose time was measured."""
    times: dict[str, list[float]] = {}
    for record in records:
        for name, metrics in record.saes.items():
            if metrics.get("step_ms") is not None:
                times.setdefault(name, []).append(metrics["step_ms"])  # type: ignore[arg-type]
    return {name: statistics.median(each) for name, each in times.items()}


def _estimate_seconds(records: list[StoredRecord]) -> float:
    """Return the time of training, from the tokens between two lines and their speed."""
    tokens = np.diff([0, *(record.tokens for record in records)])
    rates = [record.tokens_per_second or np.nan for record in records]
    return float(np.nansum(tokens / np.array(rates, np.float64))) if records else 0.0


def _build_curves(records: list[StoredRecord]) -> dict[str, Any]:
    chosen = np.linspace(0, len(records) - 1, min(len(records), MAX_CURVE_POINTS)).round().astype(int)
    shown = [records[number] for number in chosen]
    names = sorted({name for record in shown for name in record.saes})
    return {
        "step": [record.step for record in shown],
        "tokens": [record.tokens for record in shown],
        "tokens_per_second": [record.tokens_per_second for record in shown],
        "saes": {name: _select_metrics([record.saes.get(name, {}) for record in shown]) for name in names},
    }


def _select_metrics(records: list[dict[str, float | None]]) -> dict[str, list[float | None]]:
    """Return the metrics of one SAE that at least one record contains."""
    found = {metric: [record.get(metric) for record in records] for metric in CURVE_METRICS}
    return {metric: values for metric, values in found.items() if any(value is not None for value in values)}
