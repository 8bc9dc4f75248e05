"""A finished run in the home directory of a user, made of real files, and a hub to push it to."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from saetrain import hub as saetrain_hub
from saetrain.cli import parse_train
from saetrain.coders.topk import TopK
from saetrain.config import write_yaml
from saetrain.interop.formats import save_sae
from saetrain.interop.metadata import SaeMetadata
from saetrain.runs.run_dir import initialize_run_dir
from tests.fake_hub import FakeHub, serve_hub, use_hub

D, F, K = 6, 20, 3
FIGURE = {"value": 0.71234, "low": 0.7, "high": 0.72, "count": 5000, "formula": "explained_variance"}
NULLS = {
    "random_decoder": {"value": 0.4, "low": 0.39, "high": 0.41},
    "mean": {"value": -0.0, "low": None, "high": None},
}
CHECK = {
    "value": 0.71234,
    "low": 0.7,
    "high": 0.72,
    "nulls": {},
    "threshold": ">= 0.6",
    "status": "good",
    "by_construction": False,
    "reason": "the SAE explains 71% of the variance",
    "advice": "",
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home" / "alice"
    folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(folder))
    return folder


def build_assessment(home: Path, names: list[str]) -> dict[str, Any]:
    sae = {
        "verdict": "3/4",
        "passed": 3,
        "of": 4,
        "metrics": {"explained_variance": CHECK},
        "figures": {"explained_variance": {**FIGURE, "nulls": NULLS, "flag": "small denominator"}},
    }
    return {
        "format": 1,
        "saetrain": "0.1.0",
        "model": {"name": str(home / "models" / "tiny_bert")},
        "judged_on": {
            "data_set": str(home / "data" / "my texts.jsonl"),
            "in_sample": True,
            "held_out": f"documents of {home}/data/my texts.jsonl chosen by a hash",
        },
        "saes": dict.fromkeys(names, sae),
    }


@pytest.fixture
def run_dir(home: Path) -> Path:
    """A run with the SAEs of two hookpoints; its model and data set are local."""
    run = home / "output" / "run"
    initialize_run_dir(run, overwrite=False)
    model, text = str(home / "models" / "tiny_bert"), str(home / "data" / "my texts.jsonl")
    config = parse_train([model, text, "--k", str(K), "--num_latents", str(F), "--lr", "0.004"])
    output = dataclasses.replace(config.output, save_dir=str(home / "output"), run_name="run")
    write_yaml(run / "config.yaml", dataclasses.replace(config, output=output))
    names = ["encoder.layer.1", "encoder.layer.2"]
    for seed, name in enumerate(names):
        metadata = SaeMetadata(
            model=model,
            dataset=text,
            hookpoint=name,
            hook_name=name,
            ctx_len=8,
            causal=False,
            tokens_seen=6400,
            steps=50,
            init_seed=seed,
            norm_limit=56.5,
            held_out_figures={"fvu": 0.25},
            finetuned_from=str(home / "output" / "other"),
        )
        save_sae(run / "sae" / name, TopK(D, F, K, seed=seed), metadata)
    (run / "final_assessment.json").write_text(json.dumps(build_assessment(home, names)))
    (run / "evaluation").mkdir()
    evaluation = {"settings": {"path": str(run), "dataset": []}, "saes": {"a": {"folder": str(run / "sae" / "a")}}}
    (run / "evaluation" / "my_texts.json").write_text(json.dumps(evaluation))
    (run / "metrics.jsonl").write_text("{}\n")
    for name in (
        "checkpoints/step_000000050/state.json",
        "wandb/run.log",
        "spike.json",
        "sae/encoder.layer.1/notes.txt",
    ):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{}")
    return run


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serve_hub() as hub:
        use_hub(hub, monkeypatch, str(tmp_path / "cache"))
        yield hub
    saetrain_hub.is_hub_reachable.cache_clear()
