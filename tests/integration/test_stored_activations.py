"""Training on activations that somebody else wrote: without a model, with the same steps as with one."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import saetrain
from saetrain.activations.store import METADATA_FILE, list_shards
from saetrain.activations.stored import ActivationStore
from saetrain.cli import main
from saetrain.errors import SaetrainError
from saetrain.runs.train.stored_run import split_units
from tests.integration.test_resume import fingerprint

TOKENS = 40_000
FLAGS = (
    "--k 4 --num_latents 64 --batch_size 4 --ctx_len 32 --eval_tokens 500 --max_tokens 12800 --buffer_tokens 4096 "
    "--log_every 1 --lr 0.01 --save_every 50"
)


def build_values(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Sparse combinations of fixed directions, at two hookpoints."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.rand(TOKENS, 48, generator=generator) * (torch.rand(TOKENS, 48, generator=generator) < 0.05)
    return {
        name: (codes @ torch.randn(48, width, generator=generator) + 0.1).to(dtype)
        for name, width in {"blocks.0": 16, "blocks.1": 24}.items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stored") / "vit"
    saetrain.write_activations(path, build_values(), doc=np.arange(TOKENS) // 50)
    return path


def train(folder: Path, out: Path, name: str, *flags: str) -> dict[str, str]:
    main(["--activations", str(folder), *FLAGS.split(), *flags, "--save_dir", str(out), "--run_name", name])
    return fingerprint(out / name)


def test_a_run_without_a_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = train(folder, tmp_path, "run")
    printed = capsys.readouterr()
    assert printed.err.count("without a model there is no assessment, no features and no report") == 1
    assert "saetrain evaluate" not in printed.out
    final = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert final["kind"] == "final"
    assert {"blocks.0", "blocks.1"} == set(final["saes"])
    assert all(figures["fvu"] < 0.5 and figures["tokens"] == 500 for figures in final["saes"].values())
    sae = saetrain.load(tmp_path / "run" / "sae" / "blocks.0")
    assert sae.encode(build_values()["blocks.0"][:10]).values.shape[0] == 10
    # In parts, the bits are the same.
    parts, values = tmp_path / "parts", build_values()
    with saetrain.ActivationWriter(parts) as writer:
        for start in range(0, TOKENS, 2048):
            rows = slice(start, start + 2048)
            writer.write_tokens(
                {name: value[rows].numpy() for name, value in values.items()}, doc=(np.arange(TOKENS) // 50)[rows]
            )
    assert train(parts, tmp_path, "of-parts") == found
    shutil.rmtree(tmp_path / "run" / "sae")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{100:09d}")
    assert train(folder, tmp_path, "run", "--resume") == found


def test_the_folder_of_a_cache_is_an_input(
    tmp_path: Path, tiny_bert: str, topics_jsonl: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    words = ["--layers", "1", "--k", "4", "--num_latents", "64", "--ctx_len", "32", "--assess", "false"]
    words += ["--save_dir", str(tmp_path / "output")]
    main([tiny_bert, topics_jsonl, *words, "--max_tokens", "20000", "--cache_activations", "--cache_dir", str(cache)])
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    train(folder, tmp_path, "run")
    assert (tmp_path / "run" / "sae" / "encoder.layer.1").is_dir()


def test_settings_files_and_dry_runs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = train(folder, tmp_path, "run", "--hookpoints", "*.1")
    assert {Path(name).parts[1] for name in found} == {"blocks.1"}
    config = tmp_path / "run" / "config.yaml"
    main(["--config", str(config), "--save_dir", str(tmp_path), "--run_name", "again"])
    assert fingerprint(tmp_path / "again") == found
    capsys.readouterr()
    main(["train", "--activations", str(folder), *FLAGS.split(), "--dry_run"])
    assert "in total" in capsys.readouterr().out


@pytest.mark.parametrize("has_documents", [True, False])
def test_whole_documents_are_held_out(tmp_path: Path, has_documents: bool) -> None:
    doc = np.arange(TOKENS) // 37 if has_documents else None
    saetrain.write_activations(tmp_path / "x", build_values(torch.bfloat16), doc=doc, ids=np.arange(TOKENS))
    store = ActivationStore(tmp_path / "x")
    train, held_out, how = split_units(store, 1000)
    assert how.startswith("documents" if has_documents else "pieces")
    assert train.text_tokens + held_out.text_tokens == TOKENS
    assert 3000 < held_out.text_tokens <= 4000 if has_documents else 0 < held_out.text_tokens <= 4000
    ids = [np.concatenate([part[number].ids for number in range(len(part))]) for part in (train, held_out)]
    assert sorted(np.concatenate(ids)) == list(range(TOKENS))
    if has_documents:
        assert not set(ids[0] // 37) & set(ids[1] // 37)
    values = build_values(torch.bfloat16)
    for part in (train, held_out):
        sequence = part[len(part) - 1]
        found = store.read_values(sequence)
        assert all(torch.equal(found[name], values[name][torch.from_numpy(sequence.ids).long()]) for name in values)


def test_mistakes_are_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged, small = tmp_path / "damaged", tmp_path / "small"
    shutil.copytree(folder, damaged)
    content = bytearray(list_shards(damaged)[0].read_bytes())
    for place in range(len(content) // 4, len(content), 5000):
        content[place] ^= 1
    list_shards(damaged)[0].write_bytes(content)
    saetrain.write_activations(small, {"h": np.zeros((10, 4), np.float32)})
    hostile = tmp_path / "hostile"
    shutil.copytree(folder, hostile)
    metadata = json.loads((hostile / METADATA_FILE).read_text())
    (hostile / METADATA_FILE).write_text(json.dumps({**metadata, "hookpoints": {"../../x": 16}}))
    for words, message in {
        ("--activations", str(tmp_path)): f"{METADATA_FILE}: can't be read: No such file",
        ("--activations", str(damaged)): "is damaged .unit",
        ("--activations", str(small)): "too small to train on and hold out a part: 10 tokens in 1 units",
        ("--activations", str(hostile)): "hookpoint '../../x': must be a plain folder name",
        ("--activations", str(folder), "--layers", "1"): "--layers: needs a model, .* name hookpoints with",
        ("--activations", str(folder), "--loss_fn", "ce"): "--loss_fn ce: needs a model",
        ("--activations", str(folder), "--cache_activations"): "--cache_activations: needs a model",
        ("--activations", str(folder), "--dtype", "float16"): "--dtype float16: the activations are stored in float32",
        ("--activations", str(folder), "--hookpoints", "block.0"): "has no such hookpoint. Did you mean blocks.0",
        ("bert", "wiki", "--activations", str(folder)): "takes the place of MODEL and DATASET; omit bert",
    }.items():
        with pytest.raises(SystemExit) as caught:
            main([*words, *FLAGS.split(), "--save_dir", str(tmp_path), "--run_name", "run"])
        assert caught.value.code == 2
        assert re.search(message, capsys.readouterr().err), message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"activations": {}}, "name at least one hookpoint"),
        ({"activations": {"a": np.zeros((2, 3))}}, "found torch.float64; allowed are float32, bfloat16, float16"),
        ({"activations": {"a/b": np.zeros((2, 3), np.float32)}}, "'a/b': must be a plain folder name"),
        ({"activations": {"a": np.zeros(3, np.float32)}}, r"a has shape \(3,\)"),
        ({"activations": {"a": torch.zeros(2, 3), "b": torch.zeros(1, 3)}}, r"b has shape \(1, 3\)"),
        ({"activations": {"a": torch.zeros(2, 3)}, "doc": [1]}, "doc: has shape .1,. .* each of the 2 tokens"),
        ({"activations": {"a": torch.zeros(2, 3)}, "ids": [1, 2**31]}, "ids: 2147483648 does not fit into int32"),
        ({"activations": {"a": torch.zeros(2, 3)}, "ids": [0.5, 1]}, "ids: has shape .2,. and type float64"),
        ({"activations": {"a": torch.zeros(0, 3)}}, "no activations were written"),
    ],
)
def test_odd_activations_are_refused(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(SaetrainError, match=message):
        saetrain.write_activations(tmp_path / "x", **arguments)
    with pytest.raises(SaetrainError):
        ActivationStore(tmp_path / "x")


def test_parts_must_fit_together_and_folders_be_new(tmp_path: Path, folder: Path) -> None:
    with saetrain.ActivationWriter(tmp_path / "x") as writer:
        writer.write_tokens({"a": torch.zeros(2, 3)})
        with pytest.raises(SaetrainError, match="all parts must have the same hookpoints, widths and type"):
            writer.write_tokens({"a": torch.zeros(2, 4)})
    with pytest.raises(SaetrainError, match="already exists and is not empty"):
        saetrain.ActivationWriter(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(SaetrainError, match="file: already exists"):
        saetrain.ActivationWriter(tmp_path / "file")
