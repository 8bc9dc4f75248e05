"""A finished run of any size without a model: SAEs with random weights, and feature folders that fit together.

Firings are drawn per latent from a few tokens of a text with Zipf-distributed words, so that columns compress about as
well as real ones. Tests of the report use it too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from saetrain.coders.topk import TopK
from saetrain.features.store import SCHEMAS
from saetrain.interop.formats import save_sae
from saetrain.interop.metadata import SaeMetadata

BEFORE, AFTER = 16, 8
N_LIST, N_BINS, N_POSITIONS = 8, 32, 16
SEQUENCE = 128
BANDS = np.array([0] * 8 + [band for band in (1, 2, 3, 4) for _ in range(3)] + [5] * 3, np.int8)


@dataclass(frozen=True)
class RunSize:
    """Sizes of a synthetic run."""

    latents: int = 96
    d_in: int = 16
    tokens: int = 4096
    vocabulary: int = 500
    k: int = 8
    seed: int = 0


def write_synthetic_run(
    run: Path,
    size: RunSize,
    hookpoints: Sequence[str] = ("h.1",),
    words: Sequence[str] = (),
    names: dict[str, str] | None = None,
) -> Path:
    """Write a run directory, and return it.

    Args:
        run: the directory, which is created.
        size: sizes of SAEs and text.
        hookpoints: one SAE each.
        words: tokens that replace the most frequent made-up words.
        names: the names of ``model`` and ``dataset``.
    """
    generator = np.random.default_rng(size.seed)
    run.mkdir(parents=True)
    names = {"model": "synthetic-model", "dataset": "synthetic-text", **(names or {})}
    (run / "config.yaml").write_text(yaml.safe_dump({**names, "k": size.k, "max_tokens": 100_000}), encoding="utf-8")
    _write_metrics(run, hookpoints)
    text = _make_text(size, generator, words)
    for number, hookpoint in enumerate(hookpoints):
        coder = TopK(size.d_in, size.latents, size.k, seed=number)
        metadata = SaeMetadata(
            hookpoint=hookpoint,
            tokens_seen=100_000,
            steps=100,
            ctx_len=SEQUENCE,
            model=names["model"],
            dataset=names["dataset"],
        )
        save_sae(run / "sae" / hookpoint, coder, metadata)
        write_features(run / "features" / hookpoint, size, generator, text, hookpoint)
    _write_evaluation(run, hookpoints, size, names)
    return run


def _make_text(size: RunSize, generator: np.random.Generator, words: Sequence[str]) -> dict[str, Any]:
    syllables = ["ka", "lo", "mi", "ren", "to", "su", "vel", "dar", "ni", "quo"]
    made = ["".join(generator.choice(syllables, 1 + n % 3)) + str(n) for n in range(size.vocabulary)]
    vocabulary = [*words, *(f" {word}" for word in made[len(words) :])][: max(size.vocabulary, len(words))]
    weights = 1 / (np.arange(len(vocabulary)) + 5.0)
    tokens = generator.choice(len(vocabulary), size.tokens, p=weights / weights.sum()).astype(np.int32)
    tokens[: len(vocabulary)] = np.arange(len(vocabulary))[: size.tokens]
    return {"tokens": tokens, "vocabulary": vocabulary}


def write_features(
    folder: Path, size: RunSize, generator: np.random.Generator, text: dict[str, Any], name: str
) -> None:
    """Write the feature folder of one SAE."""
    folder.mkdir(parents=True)
    tokens, vocabulary = text["tokens"], text["vocabulary"]
    rows = np.arange(size.tokens)
    stream = {
        "token_id": tokens,
        "doc": (rows // (3 * SEQUENCE) * 7).astype(np.int64),
        "position": (rows % SEQUENCE).astype(np.int32),
        "sequence": (rows // SEQUENCE).astype(np.int32),
        "kept": rows % SEQUENCE > 0,
    }
    _write_table(folder / "stream.parquet", stream)
    ids = np.arange(len(vocabulary), dtype=np.int32)
    _write_table(folder / "vocabulary.parquet", {"token_id": ids, "text": vocabulary})
    firings = [_draw_firings(size, generator, tokens) for _ in range(size.latents)]
    _write_table(folder / "latents.parquet", _describe_latents(size, generator, tokens, len(vocabulary), firings))
    _write_table(folder / "contexts.parquet", _choose_contexts(firings))
    metadata = {
        "format": 1,
        "sae": name,
        "hookpoint": name,
        "text": "held_out",
        "tokens": size.tokens,
        "kept_tokens": int(stream["kept"].sum()),
        "num_latents": size.latents,
        "window_before": BEFORE,
        "window_after": AFTER,
        "lens": "causal",
        "loss": "ce_increase",
    }
    (folder / "metadata.json").write_text(json.dumps(metadata))


def _draw_firings(size: RunSize, generator: np.random.Generator, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (rows of the stream, activations) of one latent; some latents are dead, some dense."""
    kind = generator.random()
    if kind < 0.05:
        return np.empty(0, np.int64), np.empty(0)
    expected = size.tokens * min(0.5, size.k / size.latents * generator.lognormal(0, 1.0))
    if kind < 0.6:
        rows = np.flatnonzero(np.isin(tokens, generator.choice(tokens, 3)))
        rows = rows[generator.random(len(rows)) < min(1.0, max(expected, 30) / max(len(rows), 1))]
    else:
        rows = np.unique(generator.integers(0, size.tokens, max(1, int(expected))))
    return rows, generator.gamma(2.0, 1.5, len(rows)) + 0.02


def _describe_latents(
    size: RunSize, generator: np.random.Generator, tokens: np.ndarray, n_words: int, firings: list[Any]
) -> dict[str, Any]:
    out: dict[str, list[Any]] = {}
    cosines = np.sort(generator.beta(2, 4, (size.latents, N_LIST)))[:, ::-1]
    n_list = min(N_LIST, size.latents - 1)
    for latent, (rows, values) in enumerate(firings):
        words, counts = np.unique(tokens[rows], return_counts=True)
        order = np.argsort(-counts, kind="stable")[:N_LIST]
        shares = counts / max(counts.sum(), 1)
        largest = float(values.max()) if len(values) else 0.0
        others = (latent + 1 + generator.choice(size.latents - 1, n_list, replace=False)) % size.latents
        row = {
            "latent": latent,
            "count": len(rows),
            "max": largest,
            "mean_active": float(values.mean()) if len(values) else 0.0,
            "histogram": np.histogram(values, N_BINS, (0, largest or 1.0))[0].tolist(),
            "quantiles": (np.quantile(values, np.linspace(0, 1, 5)) if len(values) else np.zeros(5)).tolist(),
            "token_ids": words[order].tolist(),
            "token_counts": counts[order].tolist(),
            "purity": float(shares.max()) if len(rows) else 0.0,
            "entropy": float(-(shares * np.log2(shares)).sum()) if len(rows) else 0.0,
            "positions": np.bincount(rows % SEQUENCE * N_POSITIONS // SEQUENCE, minlength=N_POSITIONS).tolist(),
            "cofiring": others.tolist() if len(rows) else [],
            "cofiring_lift": generator.lognormal(1, 1, len(others)).tolist() if len(rows) else [],
            "neighbours": others.tolist(),
            "neighbour_cosines": cosines[latent, :n_list].tolist(),
            "encoder_decoder_cosine": float(generator.beta(6, 3)),
            "variance_explained": float(generator.lognormal(-8, 1)) if len(rows) else 0.0,
        }
        for side in ("lens_top", "lens_bottom"):
            row[side] = generator.integers(0, n_words, N_LIST).tolist()
            row[f"{side}_logits"] = np.sort(generator.normal(0, 3, N_LIST)).tolist()
        for name, value in row.items():
            out.setdefault(name, []).append(value)
    columns = {name: pa.array(values) for name, values in out.items()}
    columns["latent"] = pa.array(out["latent"], pa.int32())
    for name in ("token_ids", "token_counts", "cofiring", "neighbours"):
        columns[name] = pa.array(out[name], pa.list_(pa.int32()))
    columns["cofiring_lift"] = pa.array(out["cofiring_lift"], pa.list_(pa.float32()))
    effects = [0.01 * value if n % 7 == 0 else None for n, value in enumerate(out["purity"])]
    columns["loss_effect"] = pa.array(effects, pa.float32())
    columns["loss_effect_low"] = columns["loss_effect_high"] = columns["loss_effect"]
    return columns


def _choose_contexts(firings: list[Any]) -> dict[str, Any]:
    columns: dict[str, list[Any]] = {name: [] for name in ("latent", "band", "rank", "token", "value")}
    offsets: list[Any] = []
    activations: list[Any] = []
    for latent, (rows, values) in enumerate(firings):
        chosen = np.argsort(-values, kind="stable")
        chosen = chosen[np.unique(np.linspace(0, len(chosen) - 1, min(len(chosen), len(BANDS))).astype(int))]
        bands = BANDS[: len(chosen)]
        columns["latent"] += [latent] * len(chosen)
        columns["band"] += bands.tolist()
        columns["rank"] += (np.arange(len(chosen)) - np.searchsorted(bands, bands)).tolist()
        columns["token"] += rows[chosen].tolist()
        columns["value"] += values[chosen].tolist()
        for row in rows[chosen]:
            start = max(row - BEFORE, row // SEQUENCE * SEQUENCE)
            near = slice(*np.searchsorted(rows, [start, min(row + AFTER + 1, (row // SEQUENCE + 1) * SEQUENCE)]))
            others = rows[near] != row
            offsets.append((rows[near][others] - row).tolist())
            activations.append(values[near][others].tolist())
    types = {"latent": pa.int32(), "band": pa.int8(), "rank": pa.int8(), "token": pa.int32(), "value": pa.float32()}
    return {
        **{name: pa.array(columns[name], kind) for name, kind in types.items()},
        "offsets": pa.array(offsets, pa.list_(pa.int8())),
        "activations": pa.array(activations, pa.list_(pa.float32())),
    }


def _write_table(path: Path, columns: dict[str, Any]) -> None:
    with open(path, "wb") as file:
        pq.write_table(pa.table(columns, schema=SCHEMAS[path.name]), file, compression="zstd")


def _write_metrics(run: Path, hookpoints: Sequence[str]) -> None:
    lines = []
    for step in range(1, 101):
        saes = {
            name: {
                "loss": 2 / step**0.5 + 0.1 * number,
                "fvu": 0.1 + 0.8 / step**0.7 + 0.05 * number,
                "l0": 8.0,
                "dead_below_threshold": min(0.1, step / 500),
                "lr": 1e-3 * min(1.0, step / 10),
            }
            for number, name in enumerate(hookpoints)
        }
        tokens = step * 1000
        lines.append({"kind": "train", "step": step, "tokens": tokens, "tokens_per_second": 5000.0, "saes": saes})
        if step % 25 == 0:
            lines.append({"kind": "eval", "step": step, "tokens": tokens, "saes": saes})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write_evaluation(run: Path, hookpoints: Sequence[str], size: RunSize, names: dict[str, str]) -> None:
    def make_metric(value: float, *baselines: str) -> dict[str, Any]:
        found = {name: {"value": value * 0.8, "low": None, "high": None} for name in baselines}
        return {"value": value, "low": value * 0.98, "high": value * 1.02, "count": 4000, "formula": "", "nulls": found}

    figures = {
        "explained_variance": make_metric(0.86, "random_decoder", "pca", "mean"),
        "l0": make_metric(8.0),
        "fvu": make_metric(0.14, "random_decoder", "pca", "mean"),
    }
    text = {"data_set": names["dataset"], "in_sample": True, "held_out": "documents chosen by a hash of their text"}
    classes = {"kept": {"tokens": 4000, "fvu": 0.14, "cosine": 0.9, "norm_ratio": 0.95}}
    frequency = {
        "edges_log10": [-5.0, -4.5, -4.0, -3.5, -3.0],
        "tokens": [0, 1, 800, 3199],
        "fvu": [None, None, 0.2, 0.1],
    }
    measured = {"documents": 12, "figures": figures, "classes": classes, "frequency": frequency}
    saes = dict.fromkeys(hookpoints, measured)
    (run / "evaluation").mkdir()
    (run / "evaluation" / "text.json").write_text(json.dumps({"format": 1, **text, "saes": saes}))
    judged = {"explained_variance": 0.86, "l0": 8.0, "dead": 0.05, "redundancy": 0.3}
    metrics: dict[str, Any] = {
        name: {
            "value": value,
            "low": value * 0.98,
            "high": value * 1.02,
            "nulls": {},
            "threshold": ">= 0.6 (good: 0.7)",
            "status": "fail" if name == "l0" else "good",
            "by_construction": name == "l0",
            "reason": f"{value} of {size.latents} latents",
            "advice": "raise k" if name == "l0" else "",
        }
        for name, value in judged.items()
    }
    verdict = {"verdict": "3/4", "passed": 3, "of": 4, "metrics": metrics, "figures": figures}
    assessment = {"format": 1, "judged_on": text, "saes": dict.fromkeys(hookpoints, verdict)}
    (run / "final_assessment.json").write_text(json.dumps(assessment))
