"""SAEs of other libraries that are damaged, hostile or not supported are refused in one line that names the file."""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import saetrain
from saetrain.cli import main
from saetrain.errors import SaetrainError
from saetrain.interop.formats import load_sae
from tests.unit.interop.layouts import (
    D,
    F,
    K,
    draw_thresholds,
    draw_weights,
    name_as_linear,
    write_dictionary,
    write_gemma_scope,
    write_saelens,
)

Spoil = Callable[[Path], object]


def batchtopk(folder: Path, **changes: Any) -> Path:
    """Write a BatchTopK SAE of dictionary_learning; ``changes`` replace tensors."""
    tensors = {**name_as_linear(draw_weights()), "k": torch.tensor(K), "threshold": torch.tensor(0.5), **changes}
    return write_dictionary(
        folder, "BatchTopKSAE", {name: value for name, value in tensors.items() if value is not None}
    )


def with_tensors(**changes: Any) -> Spoil:
    return lambda folder: batchtopk(folder, **{name.replace("__", "."): value for name, value in changes.items()})


def with_state(state: Any) -> Spoil:
    return lambda folder: torch.save(state, folder / "ae.pt")


def with_bytes(name: str, change: Callable[[bytes], bytes]) -> Spoil:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def with_config(**entries: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))

    return spoil


class Hostile:
    """A pickle of this would run a command."""

    def __reduce__(self) -> Any:
        return print, ("the pickle has run",)


def pack_large_pickle(folder: Path) -> None:
    torch.save({f"tensor {number}": torch.zeros(1) for number in range(2000)}, folder / "ae.pt")


def expand_archive(name: str) -> Spoil:
    """Replace the archive by one of zeros, which are compressed to a thousandth."""

    def spoil(folder: Path) -> None:
        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
            content = io.BytesIO()
            np.save(content, np.zeros((1000, 1000), np.float32))
            archive.writestr("W_enc.npy", content.getvalue())

    return spoil


def delete(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def make_folder(name: str) -> Spoil:
    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return spoil


TRAINER = {"dict_class": "BatchTopKSAE", "k": K}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (delete("config.json"), r"config\.json: is missing"),
        (make_folder("ae.pt"), r"ae\.pt: is not a file"),
        (with_bytes("config.json", lambda data: data[:-3]), r"config\.json: is not valid JSON"),
        (with_config(trainer=None), r"config\.json: has no key 'trainer'"),
        (with_config(trainer=[1]), r"config\.json: trainer: found \[1\], must be an object"),
        (with_config(buffer=3), r"config\.json: buffer: found 3, must be an object"),
        (with_config(buffer={"ctx_len": "a"}), r"config\.json: buffer\.ctx_len: found 'a', must be a whole number"),
        (with_config(trainer={}), r"config\.json: has no key 'dict_class'"),
        (with_config(trainer={"dict_class": 3}), r"config\.json: dict_class: found 3, must be a string"),
        (
            with_config(trainer={"dict_class": "IdentityDict"}),
            r"config\.json: dict_class is 'IdentityDict'; saetrain reads AutoEncoder, AutoEncoderNew, GatedAuto",
        ),
        (with_config(trainer={**TRAINER, "lm_name": 3}), r"config\.json: trainer\.lm_name: found 3, must be a string"),
        (
            with_config(trainer={**TRAINER, "submodule_name": 3}),
            r"config\.json: trainer\.submodule_name: found 3, must be a string",
        ),
        (with_bytes("ae.pt", lambda data: b""), r"ae\.pt: is no archive, or other data precedes it"),
        (with_bytes("ae.pt", lambda data: pickle.dumps([[]] * 9) + data), r"ae\.pt: is no archive, or other data"),
        (with_bytes("ae.pt", lambda data: data[: len(data) // 2]), r"ae\.pt: is damaged, truncated or no archive"),
        (
            with_bytes("ae.pt", lambda data: data.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v9")),
            r"ae\.pt: is damaged, or contains objects other than tensors",
        ),
        (with_state({"k": Hostile()}), r"ae\.pt: is damaged, or contains objects other than tensors"),
        (pack_large_pickle, r"ae\.pt: describes more than an SAE \([\d,]+ bytes in data\.pkl\)"),
        (expand_archive("ae.pt"), r"ae\.pt: expands from [\d,]+ to 4,000,128 bytes; at most 4 times is allowed"),
        (with_state(torch.zeros(3)), r"ae\.pt: must contain tensors by name, found Tensor"),
        (with_state({"W_enc": [1]}), r"ae\.pt: must contain dense tensors by name, found 'W_enc': list"),
        (with_state({3: torch.zeros(3)}), r"ae\.pt: must contain dense tensors by name, found 3: Tensor"),
        (
            with_state({"ae": {}, "step": 3, "optimizer": {}, "norm_factor": 1.0}),
            r"ae\.pt: must contain dense tensors by name, found 'ae': dict; a backup of a training that has not ended",
        ),
        (
            with_state({"W_dec": torch.zeros(3, 3).to_sparse()}),
            r"ae\.pt: must contain dense tensors by name, found 'W_dec': Tensor",
        ),
        (
            with_tensors(b_dec=torch.zeros(1).expand(100_000)),
            r"ae\.pt: b_dec of shape \(100000,\) and torch\.float32 is not allowed",
        ),
        (with_tensors(b_dec=torch.zeros(D, dtype=torch.cfloat)), r"ae\.pt: b_dec of shape .* and torch\.complex64"),
        (with_tensors(b_dec=torch.full((D,), torch.nan)), r"ae\.pt: b_dec contains 6 values that are NaN or infinite"),
        (
            with_tensors(encoder__bias=torch.full((F,), torch.inf)),
            r"ae\.pt: encoder\.bias contains 20 values that are NaN or infinite",
        ),
        (with_tensors(decoder__weight=None), r"ae\.pt: W_dec must have shape \(F, D\), found nothing"),
        (with_tensors(b_dec=None), r'ae\.pt: its tensors are not those of BatchTopK: Missing key.*"b_dec"'),
        (with_tensors(extra=torch.zeros(3)), r"ae\.pt: its tensors are not those of BatchTopK: Unexpected key.*extra"),
        (with_tensors(encoder__bias=torch.zeros(F + 1)), r"ae\.pt: .*size mismatch for b_enc"),
        (with_tensors(threshold=torch.zeros(F)), r"ae\.pt: .*size mismatch for threshold"),
        (with_tensors(threshold=torch.tensor(-1.0)), r"ae\.pt: its threshold is not set \(-1\), so all positive"),
        (with_tensors(k=torch.tensor(0)), r"ae\.pt: k 0: must be at least 1"),
        (with_tensors(k=torch.tensor(F + 1)), r"ae\.pt: k 21: more than the 20 latents"),
        (with_tensors(k=None), r"config\.json: has no key 'k'"),
    ],
)
def test_files_of_dictionary_learning(
    spoil: Spoil, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(batchtopk(tmp_path))
    with pytest.raises(SaetrainError, match=said) as caught:
        load_sae(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(tmp_path)])
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert "Traceback" not in printed.err
    assert "the pickle has run" not in printed.out + printed.err


@pytest.mark.parametrize("sizes", [[5, 5], [5, -5, 20], [0, 5, 15], []])
def test_groups_that_do_not_fit_are_refused(sizes: list[int], tmp_path: Path) -> None:
    extra = {"threshold": torch.tensor(0.5), "group_sizes": torch.tensor(sizes, dtype=torch.int64)}
    write_dictionary(tmp_path, "MatryoshkaBatchTopKSAE", {**draw_weights(), **extra}, k=K)
    with pytest.raises(SaetrainError, match=r"ae\.pt: the prefixes \[.*\] must increase up to 20 latents"):
        load_sae(tmp_path)


def gemma_scope(folder: Path, **arrays: Any) -> Path:
    return write_gemma_scope(folder, {**draw_weights(), "threshold": draw_thresholds()}, **arrays)


def with_arrays(**changes: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        found = dict(np.load(folder / "params.npz")) | changes
        np.savez(folder / "params.npz", **{name: value for name, value in found.items() if value is not None})

    return spoil


def write_entry(folder: Path, content: bytes) -> None:
    with zipfile.ZipFile(folder / "params.npz", "a") as archive:
        archive.writestr("extra.npy", content)


def write_huge_header(folder: Path) -> None:
    """An array that says that it has 2⁵⁰ numbers."""
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": "<f4", "fortran_order": False, "shape": (2**50,)})
    write_entry(folder, content.getvalue())


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (make_folder("params.npz"), r"params\.npz: is not a file"),
        (with_bytes("params.npz", lambda data: b"PK"), r"params\.npz: is no archive, or other data precedes it"),
        (with_bytes("params.npz", lambda data: data[:-30]), r"params\.npz: is damaged, truncated or no archive"),
        (
            with_bytes("params.npz", lambda data: data.replace(b"NUMPY", b"NUMPX")),
            r"params\.npz: (is damaged, or contains objects other than arrays|\w+ must be an array)",
        ),
        (
            # The version of the format in the list of entries.
            with_bytes(
                "params.npz",
                lambda data: re.sub(rb"(PK\x01\x02..).", lambda found: found[1] + b"\xff", data, flags=re.DOTALL),
            ),
            r"params\.npz: is damaged, truncated or no archive: zip file version 25\.5",
        ),
        (expand_archive("params.npz"), r"params\.npz: expands from [\d,]+ to 4,000,128 bytes"),
        (write_huge_header, r"params\.npz: is damaged, or contains objects other than arrays"),
        (lambda folder: write_entry(folder, b"abc"), r"params\.npz: extra must be an array of floating-point"),
        (with_arrays(b_enc=np.array([Hostile()])), r"params\.npz: is damaged.*Object arrays cannot be loaded"),
        (with_arrays(b_enc=np.zeros(F, np.int32)), r"params\.npz: b_enc must be an array of floating-.*found int32"),
        (with_arrays(b_enc=np.full(F, np.nan, np.float32)), r"params\.npz: b_enc contains 20 values that are NaN"),
        (with_arrays(W_dec=None), r"params\.npz: W_dec must have shape \(F, D\), found nothing"),
        (with_arrays(W_dec=np.zeros(3, np.float32)), r"params\.npz: W_dec must have shape \(F, D\), found \(3,\)"),
        (
            with_arrays(W_enc=np.zeros((0, F), np.float32), W_dec=np.zeros((F, 0), np.float32)),
            rf"params\.npz: W_dec must have shape \(F, D\), found \({F}, 0\)",
        ),
        (with_arrays(threshold=None), r"params\.npz: its tensors are not those of JumpReLU: Missing key.*threshold"),
        (with_arrays(threshold=np.zeros((), np.float32)), r"params\.npz: .*size mismatch for threshold"),
        (with_arrays(scaling_factor=np.ones(F, np.float32)), r"Unexpected key.*scaling_factor"),
    ],
)
def test_files_of_gemma_scope(spoil: Spoil, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(gemma_scope(tmp_path))
    with pytest.raises(SaetrainError, match=said) as caught:
        load_sae(tmp_path)
    assert "\n" not in str(caught.value)
    assert "the pickle has run" not in capsys.readouterr().out


def test_compressed_arrays_and_other_floats_are_read(tmp_path: Path) -> None:
    gemma_scope(tmp_path)
    expected = saetrain.load(tmp_path).W_dec
    arrays = {name: value.astype(">f8") for name, value in np.load(tmp_path / "params.npz").items()}
    np.savez_compressed(tmp_path / "params.npz", **arrays)
    assert torch.equal(saetrain.load(tmp_path).W_dec, expected)


def test_transcoders_of_gemma_scope_are_refused_by_their_path(tmp_path: Path) -> None:
    """Their arrays are those of an SAE."""
    place = tmp_path / "google/gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_20"
    with pytest.raises(SaetrainError, match=r"params\.npz: is a transcoder of Gemma Scope; only SAEs are supported"):
        load_sae(gemma_scope(place))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"architecture": "transcoder"},
            "its architecture is 'transcoder'; saetrain reads topk, batchtopk, matryoshka_",
        ),
        ({"architecture": ["topk"]}, r"its architecture is \['topk'\]"),
        ({"normalize_activations": "layer_norm"}, "its normalize_activations is 'layer_norm'; only 'none'"),
        ({"reshape_activations": "hook_z"}, "its reshape_activations is 'hook_z'; only 'none'"),
        ({"matryoshka_widths": ["a"]}, r"cfg\.json: matryoshka_widths: found \['a'\], must be a list of whole numbers"),
        ({"matryoshka_widths": [5, 10]}, r"cfg\.json: the prefixes \[5, 10\] must increase up to 20 latents"),
        ({"k": None}, r"cfg\.json: has no key 'k'"),
        ({"k": float("inf")}, r"cfg\.json: k: found inf, must be a finite number"),
        ({"k": float("nan")}, r"cfg\.json: k: found nan, must be a finite number"),
    ],
)
def test_configurations_of_saelens(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    tensors = {**draw_weights(), "topk_threshold": torch.tensor(0.5)}
    write_saelens(tmp_path, **{"architecture": "matryoshka_batchtopk", "tensors": tensors, "k": 3.0, **config})
    with pytest.raises(SaetrainError, match=said):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"activation_fn_str": "tanh-relu"},
            r"cfg\.json: its activation_fn is 'tanh-relu'; only 'relu' and 'topk' are",
        ),
        ({"activation_fn": 3}, r"cfg\.json: activation_fn: found 3, must be a string"),
        ({"hook_point": 3}, r"cfg\.json: hook_name: found 3, must be a string"),
        ({"activation_fn": "topk"}, r"cfg\.json: has no key 'k'"),
        ({"activation_fn": "topk", "activation_fn_kwargs": 3}, r"cfg\.json: activation_fn_kwargs: found 3, must be an"),
        ({"normalize_activations": True}, "its normalize_activations is True; only 'none' is supported"),
        ({"hook_name": "blocks.3.attn.hook_z"}, "its reshape_activations is 'hook_z'; only 'none' is supported"),
    ],
)
def test_configurations_of_earlier_versions_of_saelens(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    write_saelens(tmp_path, "standard", draw_weights())
    (tmp_path / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": F, **config}))
    with pytest.raises(SaetrainError, match=said):
        load_sae(tmp_path)
