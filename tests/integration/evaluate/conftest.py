"""Runs to be evaluated, texts, and the command ``saetrain evaluate``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from saetrain.cli import main
from tests.conftest import python_topics
from tests.unit.interop.layouts import name_as_linear, write_dictionary

SIZES = "--k 8 --num_latents 96 --batch_size 4 --ctx_len 32 --max_tokens 6400 --eval_tokens 1500 --lr 4e-3"
QUICK = "--eval_tokens 800 --loss_tokens 300 --fit_tokens 1000 --bootstrap 20"


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The text that SAEs are trained on: all but the last 30 of the chapters."""
    return write_texts(tmp_path_factory.mktemp("own") / "own.jsonl", python_topics()[:-30])


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Chapters that no SAE was trained on."""
    return write_texts(tmp_path_factory.mktemp("other") / "other.jsonl", python_topics()[-30:])


def write_texts(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def train(out: Path, words: str) -> Path:
    """Return the directory of a run."""
    main([*words.split(), *SIZES.split(), "--save_dir", str(out), "--run_name", "run"])
    return out / "run"


@pytest.fixture(scope="session")
def causal_run(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: str, own: str) -> Path:
    words = f"{tiny_gpt2} {own} --layers 1 2 --loss_tokens 300 --fit_tokens 1000 --bootstrap 20"
    return train(tmp_path_factory.mktemp("causal"), words)


@pytest.fixture(scope="session")
def encoder_run(tmp_path_factory: pytest.TempPathFactory, tiny_bert: str, own: str) -> Path:
    return train(tmp_path_factory.mktemp("encoder"), f"{tiny_bert} {own} --layers 3 --assess false")


def evaluate(path: Path, out: Path, *words: str) -> dict[str, dict[str, Any]]:
    """{file stem: contents} of what the command writes."""
    main(["evaluate", str(path), "--out", str(out), *QUICK.split(), *words])
    files = [*(out / "evaluation").glob("*.json"), out / "final_assessment.json"]
    return {file.stem: json.loads(file.read_text()) for file in files}


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the command says as it ends with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", *words])
    said = capsys.readouterr().err
    assert caught.value.code == 2, said
    assert "Traceback" not in said
    return said


@pytest.fixture(params=["saelens", "sparsify", "dictionary_learning"])
def foreign(request: pytest.FixtureRequest, causal_run: Path, tmp_path: Path) -> Path:
    """The same SAE as the other library would have saved it."""
    source = causal_run / "sae" / "h.2"
    config = json.loads((source / "cfg.json").read_text())
    folder = tmp_path / request.param / ("h.2" if request.param == "sparsify" else "sae")
    folder.mkdir(parents=True)
    if request.param == "dictionary_learning":
        weights = {**load_file(source / "sae_weights.safetensors"), "k": torch.tensor(8)}
        named = {**name_as_linear(weights), "k": weights["k"], "threshold": torch.tensor(-1.0)}
        names = {"submodule_name": "resid_post_layer_2", "lm_name": None}
        return write_dictionary(folder, "AutoEncoderTopK", named, **names)
    if request.param == "sparsify":
        kept = {
            key: config[key] for key in ("activation", "d_in", "num_latents", "k", "normalize_decoder", "transcode")
        }
        shutil.copy(source / "sae.safetensors", folder)
    else:
        kept = {key: value for key, value in config.items() if key not in ("saetrain", "activation", "num_latents")}
        shutil.copy(source / "sae_weights.safetensors", folder)
    (folder / "cfg.json").write_text(json.dumps(kept))
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the SAE's configuration."""
    (path,) = folder.glob("*.json")
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def forget_text(config: dict[str, Any]) -> None:
    """What the SAE was trained on, so that all layouts take the same part of another text for the nulls."""
    for entries, names in (("saetrain", ("dataset", "fingerprint", "norm_limit")), ("metadata", ("dataset_path",))):
        for name in names:
            config.get(entries, {}).pop(name, None)
