"""Whole runs over every kind of source: the same text gives the same SAE, wherever it lies."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

from saetrain.cli import main, parse_train
from saetrain.config import from_flat
from saetrain.data.tokenize import Framing
from saetrain.runs.text_data import load_text
from saetrain.small_files import read_settings
from saetrain.types import DATASET_ROW_BITS
from tests.integration.test_resume import fingerprint

BASE = (
    "--k 4 --num_latents 64 --batch_size 2 --ctx_len 32 --eval_tokens 500 --max_tokens 1280 --device cpu "
    "--assess false --data_shards 4"
)


def run(folder: Path, name: str, *words: str) -> Path:
    main([*words, *BASE.split(), "--save_dir", str(folder), "--run_name", name])
    return folder / name


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    return capsys.readouterr().err


def about(run: Path) -> dict[str, Any]:
    (path,) = run.glob("sae/*/cfg.json")
    return dict(json.loads(path.read_text())["saetrain"])


@pytest.fixture(params=["tiny_bert", "tiny_gpt2"])
def model(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


def test_token_folders_give_the_bits_of_the_text(model: str, topics_jsonl: str, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    shutil.copy(topics_jsonl, text / "train.jsonl")
    Path(text / "validation.jsonl").write_text("".join(Path(topics_jsonl).read_text().splitlines(True)[:9]))
    for name, data in (("alone", topics_jsonl), ("split", str(text))):
        main(["tokenize", model, data, str(tmp_path / f"{name}-tokens"), "--ctx_len", "32"])
        direct = run(tmp_path, f"{name}-a", model, data)
        stored = run(tmp_path, f"{name}-b", model, str(tmp_path / f"{name}-tokens"))
        assert fingerprint(direct) == fingerprint(stored)
        assert about(direct)["fingerprint"] == about(stored)["fingerprint"]


def test_context_length_is_the_token_folder_s(tiny_bert: str, topics_jsonl: str, tmp_path: Path) -> None:
    out = str(tmp_path / "tokens")
    main(["tokenize", tiny_bert, topics_jsonl, out, "--ctx-len=48"])
    words = [word for word in BASE.split() if word not in ("--ctx_len", "32")]
    main([tiny_bert, out, *words, "--save_dir", str(tmp_path), "--run_name", "r"])
    assert about(tmp_path / "r")["ctx_len"] == 48


def test_rows_of_ids_plain_streamed_and_mixed(model: str, topics_jsonl: str, topics: list[str], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = [tokenizer(text, truncation=True, max_length=100)["input_ids"] for text in topics for _ in range(2)]
    path = str(tmp_path / "ids.parquet")
    datasets.Dataset.from_dict({"input_ids": ids}).to_parquet(path)
    for name, words in {"plain": [path], "streamed": [path, "--streaming"], "mixed": [path, topics_jsonl]}.items():
        run(tmp_path, name, model, *words)
    assert about(tmp_path / "plain")["text_columns"] == ["input_ids"]
    assert about(tmp_path / "streamed")["train_tokens_available"] is None
    assert about(tmp_path / "mixed")["text_columns"] == [["input_ids"], ["text"]]
    assert about(tmp_path / "mixed")["mix"] == [0.5, 0.5]


def test_raw_ids(tiny_gpt2: str, topics: list[str], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    ids = [i for text in topics[:30] for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    np.array(ids, dtype=np.uint16).tofile(tmp_path / "train.bin")
    plain = run(tmp_path, "plain", tiny_gpt2, str(tmp_path / "train.bin"))
    run(tmp_path, "streamed", tiny_gpt2, str(tmp_path / "train.bin"), "--streaming")
    path = str(tmp_path / "text.parquet")
    datasets.Dataset.from_dict({"text": topics[:30]}).to_parquet(path)
    text = run(tmp_path, "text", tiny_gpt2, path)
    assert about(plain)["train_tokens_available"] == pytest.approx(about(text)["train_tokens_available"], rel=0.05)


def test_bad_rows_are_left_out_and_counted(
    tiny_bert: str, topics: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps({"text": text}) for text in topics]
    (tmp_path / "good.jsonl").write_text("\n".join([*lines, ""]))
    (tmp_path / "bad.jsonl").write_text("\n".join([*lines[:5], '{"text": "cut', *lines[5:], '{"text": 5}', ""]))
    good = run(tmp_path, "good", tiny_bert, str(tmp_path / "good.jsonl"))
    bad = run(tmp_path, "bad", tiny_bert, str(tmp_path / "bad.jsonl"), "--skip_bad_rows")
    assert fingerprint(good) == fingerprint(bad)
    found = capsys.readouterr()
    assert f"skipped 2 bad rows of {len(lines) + 2}, the first: " in found.out + found.err
    assert "bad.jsonl, line 6" in found.out + found.err
    run(tmp_path, "streamed", tiny_bert, str(tmp_path / "bad.jsonl"), "--skip_bad_rows", "--streaming")
    found = capsys.readouterr()
    assert "1 bad rows skipped so far" in found.out + found.err


def test_settings_file_keeps_one_data_set_plain_and_several_as_a_list(
    tiny_bert: str, topics_jsonl: str, tmp_path: Path
) -> None:
    one = run(tmp_path, "one", tiny_bert, topics_jsonl)
    two = run(tmp_path, "two", tiny_bert, topics_jsonl, topics_jsonl, "--mix", "3", "1")
    assert read_settings(str(one / "config.yaml"))["dataset"] == topics_jsonl
    flat = read_settings(str(two / "config.yaml"))
    assert (flat["dataset"], flat["mix"]) == ([topics_jsonl] * 2, [3.0, 1.0])
    assert from_flat(flat, "there").dataset == (topics_jsonl,) * 2
    main(["--config", str(two / "config.yaml"), "--save_dir", str(tmp_path), "--run_name", "again"])
    assert fingerprint(tmp_path / "again") == fingerprint(two)


@pytest.mark.parametrize("streaming", [False, True])
def test_what_one_data_set_holds_out_no_other_trains_on(
    model: str, topics: list[str], streaming: bool, tmp_path: Path
) -> None:
    halves = {"a": topics[:50], "b": topics[30:]}
    for name, texts in halves.items():
        rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text(rows)
    config = parse_train([model, *(str(tmp_path / f"{name}.jsonl") for name in halves), *BASE.split()])
    config = dataclasses.replace(config, source=dataclasses.replace(config.source, streaming=streaming))
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = load_text(config, tokenizer, Framing.from_tokenizer(tokenizer, "gpt2" in model, 32), 256)
    held = {topic(halves, int(doc)) for number in range(len(text.held_out)) for doc in set(text.held_out[number].doc)}
    trained: set[str] = set()
    for shard in range(text.train_source.n_shards):
        batches, _ = text.train_source.read(shard, text.train_source.start_cursor, 60_000)
        trained |= {topic(halves, int(doc)) for batch in batches for sequence in batch for doc in set(sequence.doc)}
    assert held & set(topics[30:50]), "both have some of them"
    assert all(how.startswith("documents chosen") for how in text.metadata["held_out"])
    assert not held & trained
    assert len(trained) > 50


def topic(halves: dict[str, list[str]], doc: int) -> str:
    """The text that a document number of a mixed source stands for."""
    return list(halves.values())[doc >> DATASET_ROW_BITS][doc % (1 << DATASET_ROW_BITS)]


def test_resume_refuses_a_stream_of_which_other_text_is_held_out(
    tiny_bert: str, topics: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for name, texts in (("train", topics), ("validation", topics[:20])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run(tmp_path, "r", tiny_bert, str(folder), "--streaming")
    with open(folder / "validation.jsonl", "a") as file:
        file.write(json.dumps({"text": topics[60]}) + "\n")
    end = [*BASE.split(), "--save_dir", str(tmp_path), "--run_name", "r", "--resume"]
    assert "DATASET: its text is not" in refused(capsys, tiny_bert, str(folder), "--streaming", *end)


def test_near_copies_of_what_another_data_set_holds_out_are_left_out(
    tiny_bert: str, topics: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for name, texts in (("train", topics[:40]), ("validation", topics[40:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    loud = tmp_path / "loud.jsonl"
    loud.write_text("".join(json.dumps({"text": "  ".join(text.upper().split())}) + "\n" for text in topics[30:]))
    config = parse_train([tiny_bert, str(folder), str(loud), *BASE.split()])
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    text = load_text(config, tokenizer, Framing.from_tokenizer(tokenizer, False, 32), 256)
    batches, _ = text.train_source.read(0, text.train_source.start_cursor, 60_000)
    docs = {int(doc) for batch in batches for sequence in batch for doc in sequence.doc}
    loud_docs = {doc % (1 << DATASET_ROW_BITS) for doc in docs if doc >> DATASET_ROW_BITS == 1}
    assert loud_docs <= set(range(10)), "those from the tenth on are the first data set's validation split"
    assert loud_docs


def test_resume_refuses_another_stream_and_other_weights(
    tiny_bert: str, topics: list[str], topics_jsonl: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, "r", tiny_bert, topics_jsonl, "--streaming")
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in topics[1:]))
    end = [*BASE.split(), "--save_dir", str(tmp_path), "--run_name", "r", "--resume"]
    assert "DATASET: its text is not" in refused(capsys, tiny_bert, str(path), "--streaming", *end)
    run(tmp_path, "m", tiny_bert, topics_jsonl, topics_jsonl)
    end[-2] = "m"
    assert "--mix is 3.0 1.0 now" in refused(capsys, tiny_bert, topics_jsonl, topics_jsonl, "--mix", "3", "1", *end)


def test_tokenize_says_what_is_wrong(
    tiny_bert: str, topics_jsonl: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "tokens")
    assert "--layers: no such flag" in refused(capsys, "tokenize", tiny_bert, topics_jsonl, out, "--layers", "3")
    assert "--ctx_len 129: " in refused(capsys, "tokenize", tiny_bert, topics_jsonl, out, "--ctx_len", "129")
    assert "is neither a local path" in refused(capsys, "tokenize", tiny_bert, "nobody/nothing", out)
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"text": "plain"}\n{"text": "caf\u00e9"}\n'.encode("latin-1"))
    assert "latin.jsonl, line 2: is not UTF-8; if" in refused(capsys, "tokenize", tiny_bert, str(latin), out)
    assert not Path(out).exists()
    main(["tokenize", tiny_bert, topics_jsonl, out])
    assert "already exists and is not empty" in refused(capsys, "tokenize", tiny_bert, topics_jsonl, out)
    assert "is already a token folder" in refused(capsys, "tokenize", tiny_bert, out, str(tmp_path / "more"))
    with pytest.raises(SystemExit) as caught:
        main(["tokenize", "--help"])
    assert not caught.value.code
    assert "OUT" in capsys.readouterr().out
