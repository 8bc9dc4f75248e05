"""Tokens on disk are what the text would give, and are refused where they were made for something else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from saetrain import manifest
from saetrain.data import token_store
from saetrain.data.text_column import TextColumn
from saetrain.data.token_store import (
    METADATA_FILE,
    TokenMetadata,
    is_token_folder,
    open_raw_ids,
    open_tokens,
    save_tokens,
    stored_ctx_len,
)
from saetrain.data.tokenize import Framing, tokenize_rows
from saetrain.errors import SaetrainError

TEXT = TextColumn("text", ("text",), "")
ABOUT = TokenMetadata(
    model="some-model",
    dataset="text",
    split="train",
    dataset_config=None,
    text_columns=["text"],
    distinct=False,
    held_out_split=None,
)


def rows_of(tokenizer: Any, framing: Framing, texts: list[str]) -> datasets.Dataset:
    return tokenize_rows(datasets.Dataset.from_dict({"text": texts}), TEXT, tokenizer, framing, 1)


@pytest.fixture
def framing(wordpiece: Any) -> Framing:
    return Framing.from_tokenizer(wordpiece, False, 32)


@pytest.fixture
def folder(tmp_path: Path, wordpiece: Any, framing: Framing, topics: list[str]) -> Path:
    save_tokens(
        tmp_path / "t", {"train": rows_of(wordpiece, framing, topics[:5])}, ABOUT.with_framing(wordpiece, framing)
    )
    return tmp_path / "t"


def test_rows_come_back_as_they_were(folder: Path, wordpiece: Any, framing: Framing, topics: list[str]) -> None:
    rows, about = open_tokens(folder, wordpiece, framing)
    assert rows["train"].to_dict() == rows_of(wordpiece, framing, topics[:5]).to_dict()
    assert rows["train"].features["ids"].feature.dtype == "uint16"
    assert rows["train"].cache_files, "memory-mapped"
    assert about.model == "some-model"
    assert stored_ctx_len((str(folder.parent), str(folder))) == 32
    assert is_token_folder(str(folder)) > is_token_folder(str(folder.parent))
    assert [path.name for path in folder.parent.iterdir()] == ["t"]


def test_ids_beyond_two_bytes_never_wrap(tmp_path: Path, bpe: Any) -> None:
    bpe.add_tokens([f"extra{i}" for i in range(1 << 16)])
    framing = Framing.from_tokenizer(bpe, True, 16)
    rows = rows_of(bpe, framing, ["a extra65535 b"])
    save_tokens(tmp_path / "t", {"train": rows}, ABOUT.with_framing(bpe, framing))
    stored = open_tokens(tmp_path / "t", bpe, framing)[0]["train"]
    assert stored.features["ids"].feature.dtype == "uint32"
    assert max(stored[0]["ids"]) == len(bpe) - 1 > 1 << 16


def test_what_was_made_for_something_else_is_refused_by_name(
    folder: Path, wordpiece: Any, bpe: Any, framing: Framing
) -> None:
    def refused(tokenizer: Any, wanted: Framing) -> str:
        with pytest.raises(SaetrainError) as caught:
            open_tokens(folder, tokenizer, wanted)
        return str(caught.value)

    assert "was made for an encoder, but the model is a causal model" in refused(
        bpe, Framing.from_tokenizer(bpe, True, 32)
    )
    assert "was made with another tokenizer (the one of some-model)" in refused(bpe, framing)
    assert "was made for --ctx_len 32, but this command uses --ctx_len 16" in refused(
        wordpiece, dataclasses.replace(framing, ctx_len=16)
    )
    wordpiece.add_tokens(["newtoken"])
    assert "another tokenizer" in refused(wordpiece, framing)


def test_a_causal_model_s_tokens_serve_any_context_length(tmp_path: Path, bpe: Any) -> None:
    framing = Framing.from_tokenizer(bpe, True, 32)
    save_tokens(tmp_path / "t", {"train": rows_of(bpe, framing, ["some text"])}, ABOUT.with_framing(bpe, framing))
    assert len(open_tokens(tmp_path / "t", bpe, Framing.from_tokenizer(bpe, True, 64))[0]["train"]) == 1


def test_an_interrupted_write_leaves_nothing_that_is_taken_for_whole(
    tmp_path: Path, wordpiece: Any, framing: Framing, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {"train": rows_of(wordpiece, framing, ["some text"])}
    for module, step in ((manifest, "fsync_files"), (manifest, "write_json"), (token_store, "write_json")):
        for error in (OSError("disk full"), KeyboardInterrupt()):

            def fail(*_: Any, error: BaseException = error) -> None:
                raise error

            with monkeypatch.context() as patch:
                patch.setattr(module, step, fail)
                with pytest.raises((SaetrainError, KeyboardInterrupt)):
                    save_tokens(tmp_path / "t", rows, ABOUT.with_framing(wordpiece, framing))
            assert not list(tmp_path.iterdir())
    save_tokens(tmp_path / "t", rows, ABOUT.with_framing(wordpiece, framing))
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
    with pytest.raises(SaetrainError, match="already exists and is not empty"):
        save_tokens(tmp_path / "t", rows, ABOUT.with_framing(wordpiece, framing))


def cut_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def zero_middle(path: Path) -> None:
    content = path.read_bytes()
    quarter = len(content) // 4
    path.write_bytes(content[:quarter] + bytes(2 * quarter) + content[3 * quarter :])


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (cut_file, "train/data-00000-of-00001.arrow does not match its hash"),
        (zero_middle, "train/data-00000-of-00001.arrow does not match its hash"),
        (lambda path: path.write_bytes(b""), "does not match its hash"),
        (Path.unlink, "'train/data-00000-of-00001.arrow' is missing"),
        (lambda path: path.with_name("more.arrow").write_bytes(b""), "'train/more.arrow' is not listed in manifest"),
        (lambda path: (path.parents[1] / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda path: (path.parents[1] / "manifest.json").write_text('{"sha256": {}}'), "is not listed in manifest"),
    ],
)
def test_damaged_folders_are_refused(
    harm: Callable[[Path], object], said: str, folder: Path, wordpiece: Any, framing: Framing
) -> None:
    (rows,) = (folder / "train").glob("*.arrow")
    harm(rows)
    with pytest.raises(SaetrainError) as caught:
        open_tokens(folder, wordpiece, framing)
    assert said in str(caught.value)
    assert "write the folder again with saetrain tokenize" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"format": 99}', "has format 99, and this version reads format 2"),
        ("{}", "has format None"),
        ("{", "is broken: "),
        ("[1]", "is broken: "),
        ("[" * 5000, "is broken: "),
        ("\ud800", "is broken: "),
        ('{"format": 2}', "is broken: model: Field required; write the folder again"),
        ({"ctx_len": "32"}, "is broken: ctx_len: Input should be a valid integer; write"),
        ({"ctx_len": 0}, "ctx_len: found 0, must be at least 4"),
        ({"ctx_len": 10**12}, "ctx_len: found 1000000000000, must be at most 10000000"),
        ({"causal": None}, "is broken: causal: Input"),
        ({"text_columns": [1]}, "is broken: text_columns.0: Input"),
    ],
)
def test_broken_metadata_is_refused(folder: Path, content: str | dict[str, Any], said: str) -> None:
    path = folder / METADATA_FILE
    if isinstance(content, dict):
        content = json.dumps({**json.loads(path.read_text()), **content})
    path.write_text(content, errors="surrogatepass")
    with pytest.raises(SaetrainError) as caught:
        stored_ctx_len((str(folder),))
    assert said in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_raw_ids_are_parted_behind_each_end_of_text(tmp_path: Path, bpe: Any, streaming: bool) -> None:
    end = bpe.eos_token_id
    documents = [[300, 301, end], [302, end], [303, 304]]
    np.array(sum(documents, []), dtype=np.uint16).tofile(tmp_path / "a.bin")  # noqa: RUF017
    source = open_raw_ids(tmp_path / "a.bin", bpe, streaming)
    assert [row["input_ids"] for row in source.train] == documents


def test_raw_ids_follow_the_vocabulary_and_the_file(tmp_path: Path, bpe: Any) -> None:
    path = tmp_path / "a.bin"
    np.array([300, 301, 302], dtype=np.uint16).tofile(path)
    assert open_raw_ids(path, bpe, False).train["input_ids"][:] == [[300, 301, 302]]
    np.array([300, 301, 303, 304], dtype=np.uint16).tofile(path)
    assert open_raw_ids(path, bpe, False).train["input_ids"][:] == [[300, 301, 303, 304]]
    bpe.add_tokens([f"extra{i}" for i in range(1 << 16)])
    np.array([70_000], dtype=np.uint32).tofile(path)
    assert open_raw_ids(path, bpe, False).train["input_ids"][:] == [[70_000]]
    path.write_bytes(b"123")
    with pytest.raises(SaetrainError, match=r"3 bytes, is not a positive multiple of 4; .* uint32 ids"):
        open_raw_ids(path, bpe, False)
