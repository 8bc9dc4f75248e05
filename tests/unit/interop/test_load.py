"""Broken folders of SAEs are refused with the file and the key that is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import saetrain
from saetrain.coders.topk import TopK
from saetrain.errors import SaetrainError
from saetrain.interop.finetune import initialize_from_sae
from saetrain.interop.formats import find_sae_folders, load_sae, save_sae
from saetrain.interop.metadata import SaeMetadata
from saetrain.runs.evaluate.load_saes import load_saes

D, F, K = 6, 20, 3
Spoil = Callable[[Path], None]


@pytest.fixture(params=["ours", "saelens", "sparsify"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A small SAE in one of the three layouts."""
    save_sae(tmp_path, TopK(D, F, K, seed=1), SaeMetadata(model="m", hookpoint="h.0", ctx_len=8))
    config = json.loads((tmp_path / "cfg.json").read_text())
    if request.param != "ours":
        del config["saetrain"]
    if request.param == "sparsify":
        (tmp_path / "sae_weights.safetensors").unlink()
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    return tmp_path


def finetune(folder: Path) -> None:
    initialize_from_sae(TopK(D, F, K), str(folder), "h.0", ["h.0"])


def config_with(**values: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "cfg.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return spoil


def tensor(name: str, value: torch.Tensor, add: bool = False) -> Spoil:
    """In every file of weights that holds it, or in all."""

    def spoil(folder: Path) -> None:
        for path in folder.glob("*.safetensors"):
            weights = load_file(path)
            if add or name in weights:
                save_file({**weights, name: value}, path)

    return spoil


def test_what_is_whole_is_read(folder: Path) -> None:
    coder, metadata = load_sae(folder)
    finetune(folder)
    assert isinstance(coder, TopK)
    assert (coder.d_in, coder.num_latents, coder.k) == (D, F, K)
    for name, value in TopK(D, F, K, seed=1).state_dict().items():
        assert torch.equal(coder.state_dict()[name], value)
        assert coder.state_dict()[name].stride() == value.stride(), "the encoder reads whole latents"
    # sparsify stores no metadata, so its hookpoint is the folder's name.
    sparsify = not (folder / "sae_weights.safetensors").exists()
    assert metadata.ctx_len == (None if sparsify else 8)
    assert metadata.hook_name == (folder.name if sparsify else None)


@pytest.mark.parametrize("reader", [load_sae, finetune])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "cfg.json").write_bytes(b'{"k": "\xff"}'), r"cfg\.json: line 1 is not UTF-8"),
        (lambda folder: (folder / "cfg.json").write_text("[]"), r"cfg\.json: must contain a JSON object"),
        (config_with(metadata=["a"]), r"cfg\.json: metadata: found \['a'\], must be an object"),
        (config_with(metadata="a"), r"cfg\.json: metadata: found 'a', must be an object"),
        (config_with(saetrain=[1]), r"cfg\.json: saetrain: found \[1\], must be an object"),
        (config_with(d_in="8"), r"cfg\.json: d_in: found '8', must be a whole number"),
        (config_with(k=True), r"cfg\.json: k: found True, must be a whole number"),
        (config_with(k=0), r"cfg\.json: k 0: must be at least 1"),
        (config_with(k=F + 1), r"cfg\.json: k 21: more than the 20 latents"),
        (config_with(k=None), r"cfg\.json: has no key 'k'"),
        (tensor("W_dec", torch.zeros(F)), r"safetensors: W_dec must have shape \(F, D\), found \(20,\)"),
        (tensor("W_dec", torch.zeros(F, D, 1)), r"safetensors: W_dec must have shape \(F, D\), found \(20, 6, 1\)"),
        (tensor("b_dec", torch.zeros(D + 1)), r"its tensors are not those of TopK: size mismatch for b_dec: .*\[7\]"),
        (tensor("b_dec", torch.zeros(D, dtype=torch.int64)), r"b_dec must have dtype torch.float32, found torch.int64"),
        (tensor("extra", torch.zeros(1), add=True), r"its tensors are not those of TopK: Unexpected key.*extra"),
    ],
)
def test_broken_folders_are_refused(folder: Path, reader: Callable[[Path], Any], spoil: Spoil, said: str) -> None:
    spoil(folder)
    with pytest.raises(SaetrainError, match=said):
        reader(folder)


@pytest.mark.parametrize("folder", ["saelens"], indirect=True)
@pytest.mark.parametrize("key", ["apply_b_dec_to_input", "rescale_acts_by_decoder_norm"])
def test_a_switch_of_saelens_is_a_boolean(folder: Path, key: str) -> None:
    config_with(**{key: "false"})(folder)
    with pytest.raises(SaetrainError, match=rf"cfg\.json: {key}: found 'false', must be true or false"):
        load_sae(folder)


@pytest.mark.parametrize("folder", ["sparsify"], indirect=True)
@pytest.mark.parametrize("key", ["transcode", "skip_connection"])
def test_a_switch_of_sparsify_is_a_boolean(folder: Path, key: str) -> None:
    config_with(**{key: 0})(folder)
    with pytest.raises(SaetrainError, match=rf"cfg\.json: {key}: found 0, must be true or false"):
        load_sae(folder)


@pytest.mark.parametrize("reader", [saetrain.load, load_saes, load_sae, finetune])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["b_dec", "W_dec"])
def test_weights_that_are_not_finite_are_refused_by_name(
    folder: Path, name: str, value: float, reader: Callable[[Any], Any]
) -> None:
    for path in folder.glob("*.safetensors"):
        weights = load_file(path)
        weights[name].view(-1)[1] = value
        save_file(weights, path)
    with pytest.raises(SaetrainError, match=rf"safetensors: {name} contains 1 values that are NaN or infinite"):
        reader(str(folder) if reader is load_saes else folder)


def test_weights_that_are_no_file_are_refused(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()
        path.mkdir()
    with pytest.raises(SaetrainError, match=r"safetensors: is not a file"):
        load_sae(folder)


@pytest.mark.parametrize("value", [{}, None, {"model_name": None, "context_size": None}])
def test_metadata_may_be_empty(folder: Path, value: Any) -> None:
    config_with(metadata=value)(folder)
    load_sae(folder)
    finetune(folder)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"context_size": "128"}, r"cfg\.json: metadata\.context_size: found '128', must be a whole number"),
        ({"hf_hook_name": 3}, r"cfg\.json: metadata\.hf_hook_name: found 3, must be a string"),
        ({"prepend_bos": "no"}, r"metadata\.prepend_bos: found 'no', must be true or false"),
        ({"dataset_path": 1}, r"metadata\.dataset_path: found 1, must be a string or a list of strings"),
    ],
)
def test_metadata_of_saelens_are_checked(tmp_path: Path, entry: dict[str, Any], said: str) -> None:
    save_sae(tmp_path, TopK(D, F, K), SaeMetadata())
    config_with(saetrain=None, metadata=entry)(tmp_path)
    with pytest.raises(SaetrainError, match=said):
        load_sae(tmp_path)


def test_metadata_of_saelens_are_translated(tmp_path: Path) -> None:
    save_sae(tmp_path, TopK(D, F, K), SaeMetadata())
    entry = {
        "model_name": "gpt2",
        "hook_name": "blocks.3.hook_resid_post",
        "hf_hook_name": "",
        "dataset_path": "wikitext",
        "context_size": 64,
        "prepend_bos": True,
        "exclude_special_tokens": [0, 1],
    }
    config_with(saetrain=None, metadata=entry)(tmp_path)
    assert load_sae(tmp_path)[1] == SaeMetadata(
        model="gpt2", hook_name="blocks.3.hook_resid_post", dataset="wikitext", ctx_len=64, prepend_bos=True
    )
    config_with(metadata={"exclude_special_tokens": False})(tmp_path)
    assert load_sae(tmp_path)[1] == SaeMetadata(exclude_special_tokens=False)


def test_the_codes_of_saelens_do_not_depend_on_how_it_stores_the_sae(tmp_path: Path) -> None:
    """A bias that is not subtracted, and norms that take part in the ranking, are folded into the weights."""
    coder = TopK(D, F, K, seed=1).requires_grad_(False)
    coder.b_dec += torch.arange(D) / D
    save_sae(tmp_path, coder, SaeMetadata())
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(2))
    norms = torch.rand(F, generator=torch.Generator().manual_seed(3)) + 0.5
    config_with(saetrain=None, apply_b_dec_to_input=False, rescale_acts_by_decoder_norm=True)(tmp_path)
    tensor("W_dec", coder.W_dec * norms[:, None])(tmp_path)
    tensor("W_enc", (coder.W_enc / norms).contiguous())(tmp_path)
    tensor("b_enc", (coder.b_enc - coder.b_dec @ coder.W_enc) / norms)(tmp_path)
    found, _ = load_sae(tmp_path)
    torch.testing.assert_close(found.encode(x).to_dense(), coder.encode(x).to_dense())
    torch.testing.assert_close(found.decode(found.encode(x)), coder.decode(coder.encode(x)))


def test_a_bias_that_is_not_subtracted_must_fit_too(tmp_path: Path) -> None:
    save_sae(tmp_path, TopK(D, F, K), SaeMetadata(), skip_files=["sae.safetensors"])
    config_with(saetrain=None, apply_b_dec_to_input=False)(tmp_path)
    tensor("b_dec", torch.zeros(D + 1))(tmp_path)
    with pytest.raises(SaetrainError, match=r"size mismatch for b_dec"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"saetrain": {"format": 2}},
            r"was not written by this version of saetrain \(no 'saetrain' entry of format 1\)",
        ),
        ({"saetrain": {}}, r"was not written by this version of saetrain"),
        ({"architecture": ["topk"]}, r"cfg\.json: architecture is \['topk'\]; this version supports topk"),
        ({"architecture": None}, r"cfg\.json: architecture is None; this version supports topk"),
        ({"d_sae": None}, r"cfg\.json: has no key 'd_sae'"),
        ({"d_sae": F + 1}, r"sae_weights\.safetensors: W_dec has shape"),
        ({"saetrain": {"format": 1, "coder": [1]}}, r"cfg\.json: coder: found \[1\], must be an object"),
    ],
)
def test_entries_of_our_own_are_checked(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    save_sae(tmp_path, TopK(D, F, K), SaeMetadata())
    config_with(**values)(tmp_path)
    with pytest.raises(SaetrainError, match=said):
        load_sae(tmp_path)


def test_folders_that_disappear_while_they_are_searched_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "cfg.json").write_text("{}")
    scandir = os.scandir

    def scan(path: Any) -> Any:
        if str(path).endswith("gone"):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    assert list(find_sae_folders(tmp_path).values()) == [tmp_path / "one"]
