"""Broken folders of SAEs are refused with the file and the key that is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from saetrain.coders.topk import TopK
from saetrain.errors import SaetrainError
from saetrain.interop.finetune import load_for_finetune
from saetrain.interop.load import load_any_format
from saetrain.interop.saetrain_format import save_sae

D, F, K = 6, 20, 3
Spoil = Callable[[Path], None]


@pytest.fixture(params=["ours", "saelens", "sparsify"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A small SAE in one of the three layouts."""
    save_sae(tmp_path, TopK(D, F, K, seed=1), {"model": "m", "hookpoint": "h.0", "ctx_len": 8})
    config = json.loads((tmp_path / "cfg.json").read_text())
    if request.param != "ours":
        del config["saetrain"]
    if request.param == "sparsify":
        (tmp_path / "sae_weights.safetensors").unlink()
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    return tmp_path


def read(folder: Path) -> tuple[TopK, dict[str, Any]]:
    return load_any_format(folder)


def finetune(folder: Path) -> None:
    load_for_finetune(str(folder), "h.0", TopK(D, F, K))


def config_with(**values: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "cfg.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return spoil


def tensor(name: str, value: torch.Tensor) -> Spoil:
    """In every file of weights that holds it."""

    def spoil(folder: Path) -> None:
        for path in folder.glob("*.safetensors"):
            weights = load_file(path)
            if name in weights:
                save_file({**weights, name: value}, path)

    return spoil


def test_what_is_whole_is_read(folder: Path) -> None:
    coder, about = read(folder)
    finetune(folder)
    assert (coder.d_in, coder.num_latents, coder.k) == (D, F, K)
    assert about.get("ctx_len") == 8


@pytest.mark.parametrize("reader", [read, finetune])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "cfg.json").write_bytes(b'{"k": "\xff"}'), r"cfg\.json: is not JSON: .*utf-8"),
        (lambda folder: (folder / "cfg.json").write_text("[]"), r"cfg\.json: must be a JSON object"),
        (config_with(metadata=["a"]), r"cfg\.json: metadata must be a JSON object, found \['a'\]"),
        (config_with(metadata="a"), r"cfg\.json: metadata must be a JSON object, found 'a'"),
        (config_with(saetrain=[1]), r"cfg\.json: saetrain must be a JSON object"),
        (config_with(d_in="8"), r"cfg\.json: d_in must be a positive integer, found '8'"),
        (config_with(k=True), r"cfg\.json: k must be a positive integer, found True"),
        (config_with(k=0), r"cfg\.json: k must be a positive integer, found 0"),
        (
            config_with(metadata={"context_size": "128"}),
            r"cfg\.json: metadata\.context_size must be a positive integer",
        ),
        (config_with(metadata={"hf_hook_name": 3}), r"cfg\.json: metadata\.hf_hook_name must be a string, found 3"),
        (config_with(metadata={"prepend_bos": "no"}), r"metadata\.prepend_bos must be true or false, found 'no'"),
        (tensor("W_dec", torch.zeros(F)), r"W_dec must have shape \(F, D\), found \(20,\)|\(20, 6\), found \(20,\)"),
        (tensor("W_dec", torch.zeros(F, D, 1)), r"W_dec must have shape \(.*\), found \(20, 6, 1\)"),
        (tensor("b_dec", torch.zeros(D + 1)), r"b_dec must have shape \(6,\), found \(7,\)"),
        (tensor("b_dec", torch.zeros(D, dtype=torch.int64)), "b_dec must contain floating-point numbers"),
    ],
)
def test_broken_folders_are_refused(folder: Path, reader: Callable[[Path], Any], spoil: Spoil, said: str) -> None:
    spoil(folder)
    with pytest.raises(SaetrainError, match=said):
        reader(folder)


@pytest.mark.parametrize("value", [{}, None, {"model_name": None, "context_size": None}])
def test_metadata_may_be_empty(folder: Path, value: Any) -> None:
    config_with(metadata=value)(folder)
    read(folder)
    finetune(folder)


def test_a_bias_that_is_not_subtracted_must_fit_too(tmp_path: Path) -> None:
    save_sae(tmp_path, TopK(D, F, K), {}, with_sparsify=False)
    config_with(saetrain=None, apply_b_dec_to_input=False)(tmp_path)
    tensor("b_dec", torch.zeros(D + 1))(tmp_path)
    with pytest.raises(SaetrainError, match=r"b_dec must have shape \(6,\), found \(7,\)"):
        read(tmp_path)


def test_more_active_latents_than_there_are_are_refused(folder: Path) -> None:
    config_with(k=F + 1)(folder)
    with pytest.raises(SaetrainError, match=r"cfg\.json: k is 21, more than the 20 latents"):
        read(folder)


def test_entries_of_our_own_are_checked(tmp_path: Path) -> None:
    save_sae(tmp_path, TopK(D, F, K), {"ctx_len": "128"})
    config = json.loads((tmp_path / "cfg.json").read_text())
    config["metadata"] = {}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(SaetrainError, match=r"cfg\.json: saetrain\.ctx_len must be a positive integer"):
        read(tmp_path)
    config["saetrain"] = {"format": 1}
    config["architecture"] = ["topk"]
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(SaetrainError, match=r"cfg\.json: architecture is \['topk'\]; this version supports topk"):
        read(tmp_path)


def test_whether_texts_began_with_a_bos_is_known(tmp_path: Path) -> None:
    save_sae(tmp_path, TopK(D, F, K), {"prepend_bos": True})
    config_with(saetrain=None)(tmp_path)
    assert read(tmp_path)[1]["prepend_bos"] is True
