"""The metadata of an SAE: what is written is read, old files get defaults, and wrong types are named."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from saetrain.coders.topk import TopK
from saetrain.errors import SaetrainError
from saetrain.interop.formats import load_sae, save_sae
from saetrain.interop.metadata import SaeMetadata

D, F, K = 6, 20, 3
FULL = SaeMetadata(
    model="m",
    model_revision="main",
    model_weights_sha256="a" * 64,
    model_dtype="bfloat16",
    dataset=["a", "b"],
    mix=[0.25, 0.75],
    dataset_config="en",
    split="train",
    streaming=True,
    skip_bad_rows=True,
    eval_tokens=100,
    text_columns=[["text"], ["body"]],
    held_out=["split 'test'", "1 row"],
    train_tokens_available=[1000, None],
    fingerprint=["f", "g"],
    ctx_len=64,
    causal=True,
    prepend_bos=True,
    exclude_special_tokens=False,
    exclude_sinks=False,
    loss_fn="mse",
    finetuned_from="there",
    kernels="native",
    compute_dtype="float32",
    processes=2,
    tokens_seen=4096,
    steps=4,
    diverged_step=5,
    hookpoint="h.3",
    hook_name="blocks.3.hook_resid_post",
    init_seed=42,
    norm_limit=31.5,
    inputs=["h.3.mlp"],
    outputs=["h.3"],
    norm_limits={"h.3": 31.5},
    held_out_figures={"fvu": 0.25, "l0": None},
)


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """The ``cfg.json`` of an SAE with full metadata in ``tmp_path``."""
    save_sae(tmp_path, TopK(D, F, K), FULL)
    found: dict[str, Any] = json.loads((tmp_path / "cfg.json").read_text())
    return found


def read(folder: Path, entry: dict[str, Any], config: dict[str, Any]) -> SaeMetadata:
    (folder / "cfg.json").write_text(json.dumps({**config, "saetrain": entry}))
    return load_sae(folder)[1]


def test_what_is_written_is_read(tmp_path: Path, config: dict[str, Any]) -> None:
    assert load_sae(tmp_path)[1] == FULL
    names = [each.name for each in dataclasses.fields(SaeMetadata)]
    assert all(getattr(FULL, name) != getattr(SaeMetadata(), name) for name in names), "this test uses every field"
    assert list(config["saetrain"]) == ["format", *names]


def test_missing_and_unknown_keys(tmp_path: Path, config: dict[str, Any]) -> None:
    """Earlier versions wrote fewer keys, and later ones may write more."""
    assert read(tmp_path, {"format": 1}, config) == SaeMetadata()
    assert read(tmp_path, {"format": 1, "streaming": None, "processes": None}, config) == SaeMetadata()
    assert read(tmp_path, {"format": 1, "model": "m", "colour": {"r": 1}}, config) == SaeMetadata(model="m")


WRONG = {
    name: [{"a": 1}] if name in ("held_out_figures", "norm_limits") else {"a": 1} for name in dataclasses.asdict(FULL)
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_type_is_named(tmp_path: Path, config: dict[str, Any], name: str) -> None:
    with pytest.raises(SaetrainError) as caught:
        read(tmp_path, {**config["saetrain"], name: WRONG[name]}, config)
    assert str(caught.value).startswith(f"{tmp_path / 'cfg.json'}: saetrain.{name}: found {WRONG[name]!r}, must be ")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ctx_len", 0, "found 0, must be at least 1"),
        ("ctx_len", True, "found True, must be a whole number"),
        ("norm_limit", True, "found True, must be a number"),
        ("norm_limit", -1, "found -1, must be above 0"),
        ("tokens_seen", -1, "found -1, must be at least 0"),
        ("steps", 2.5, "found 2.5, must be a whole number"),
        ("streaming", 1, "found 1, must be true or false"),
        ("dataset", 1, "found 1, must be a string or a list of strings or null"),
        ("norm_limit", math.inf, "found inf, must be a finite number"),
        ("text_columns", [["a"], [1]], "found .*, must be a list of"),
        ("ctx_len", 10**40, "found 1000.*000, must be at most"),
        ("model_dtype", "int8", "found 'int8', must be float32 or bfloat16 or float16"),
        ("model_dtype", ["float32"], r"found \['float32'\], must be float32 or bfloat16"),
    ],
)
def test_what_is_allowed_is_named(tmp_path: Path, config: dict[str, Any], name: str, value: Any, said: str) -> None:
    with pytest.raises(SaetrainError, match=f"saetrain.{name}: {said}"):
        read(tmp_path, {**config["saetrain"], name: value}, config)


def test_a_whole_number_is_a_number(tmp_path: Path, config: dict[str, Any]) -> None:
    assert read(tmp_path, {**config["saetrain"], "norm_limit": 30}, config).norm_limit == 30


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("mix", [1.0, math.nan], "mix: found [1.0, nan], must be a finite number"),
        ("dataset", [1], "dataset: found [1], must be a string or a list of strings or null"),
        ("dataset", [None], "dataset: found [None], must be a string or a list of strings or null"),
        ("text_columns", [["a"], 1], "text_columns: found [['a'], 1], must be a list of"),
        ("mix", [1.0, -0.5], "mix: found [1.0, -0.5], must be at least 0"),
        ("norm_limits", {"h.0": -1.0}, "norm_limits: found {'h.0': -1.0}, must be above 0"),
        ("norm_limits", {"h.0": "b"}, "norm_limits: found {'h.0': 'b'}, must be an object"),
        ("held_out_figures", {"fvu": []}, "held_out_figures: found {'fvu': []}, must be an object"),
    ],
)
def test_items_have_types_too(tmp_path: Path, config: dict[str, Any], name: str, value: Any, said: str) -> None:
    with pytest.raises(SaetrainError) as caught:
        read(tmp_path, {**config["saetrain"], name: value}, config)
    assert f"saetrain.{said}" in str(caught.value)


@pytest.mark.parametrize("name", ["dataset", "mix", "inputs"])
def test_empty_lists_mean_unknown(tmp_path: Path, config: dict[str, Any], name: str) -> None:
    assert getattr(read(tmp_path, {**config["saetrain"], name: []}, config), name) is None
