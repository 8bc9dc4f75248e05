"""Every kind of source gives its rows, and what is wrong with one is said in a SaetrainError."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import datasets
import pytest

from saetrain.data.sources import SourceSettings, TextSource, open_dataset
from saetrain.data.streaming import StreamedRows
from saetrain.errors import SaetrainError

TEXTS = [f"text number {i}" for i in range(20)]
CONFIGS_CARD = """---
configs:
- config_name: first
  data_files: first/*.parquet
- config_name: second
  data_files: second/*.parquet
---
"""


@pytest.fixture
def rows() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": TEXTS})


@pytest.fixture
def two_configs(tmp_path: Path, rows: datasets.Dataset) -> Path:
    """A folder as a data set on the hub with two configurations looks."""
    folder = tmp_path / "two"
    for name in ("first", "second"):
        (folder / name).mkdir(parents=True)
        rows.to_parquet(folder / name / "train.parquet")
    (folder / "README.md").write_text(CONFIGS_CARD)
    return folder


def open_(path: object, **settings: Any) -> TextSource:
    return open_dataset(str(path), SourceSettings(**settings))


def texts(source: TextSource) -> list[str]:
    return list(source.train["text"])


def test_parquet_folder_gives_the_split_and_holds_out_validation_before_test(
    tmp_path: Path, rows: datasets.Dataset
) -> None:
    rows.to_parquet(tmp_path / "train.parquet")
    rows.select(range(3)).to_parquet(tmp_path / "test.parquet")
    rows.select(range(2)).to_parquet(tmp_path / "validation.parquet")
    source = open_(tmp_path)
    assert texts(source) == TEXTS
    assert source.held_out is not None
    assert (source.held_out_split, len(source.held_out)) == ("validation", 2)
    assert open_(tmp_path, split="train[:10%]").train["text"][:] == TEXTS[:2]
    assert open_(tmp_path, split="train[:10%]").held_out_split == "validation"
    # A split that is trained on is never held out, wherever it stands in the expression.
    assert open_(tmp_path, split="validation").held_out_split == "test"
    mixed = open_(tmp_path, split="train[:5]+validation")
    assert (len(mixed.train), mixed.held_out_split) == (7, "test")
    assert open_(tmp_path, split="train+validation+test").held_out is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)),
        ("a.json", json.dumps([{"text": text} for text in TEXTS])),
        ("a.ndjson", "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)),
        ("a.csv", "number,text\n" + "".join(f"{i},{text}\n" for i, text in enumerate(TEXTS))),
        ("a.tsv", "number\ttext\n" + "".join(f"{i}\t{text}\n" for i, text in enumerate(TEXTS))),
        ("a.txt", "".join(text + "\n" for text in TEXTS)),
        ("b.txt", "\n\n".join(TEXTS) + "\n"),
    ],
)
@pytest.mark.parametrize("folder", [False, True])
def test_text_files_give_their_rows_alone_and_in_a_folder(
    tmp_path: Path, name: str, content: str, folder: bool
) -> None:
    (tmp_path / name).write_text(content)
    source = open_(tmp_path if folder else tmp_path / name)
    assert [text.strip() for text in texts(source)] == TEXTS
    assert source.held_out is None


def test_plain_text_is_parted_at_blank_lines_where_there_are_any(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n\r\nthree\r\n")
    assert texts(open_(tmp_path / "a.txt")) == ["one\ntwo", "three\n"]


def test_parquet_file_alone(tmp_path: Path, rows: datasets.Dataset) -> None:
    rows.to_parquet(tmp_path / "some.parquet")
    assert texts(open_(tmp_path / "some.parquet")) == TEXTS


def test_folders_that_datasets_saved(tmp_path: Path, rows: datasets.Dataset) -> None:
    rows.save_to_disk(tmp_path / "one")
    assert texts(open_(tmp_path / "one")) == TEXTS
    datasets.DatasetDict(train=rows, dev=rows.select([4]), test=rows.select([5])).save_to_disk(tmp_path / "many")
    source = open_(tmp_path / "many")
    assert texts(source) == TEXTS
    assert source.held_out is not None
    assert (source.held_out_split, source.held_out["text"][:]) == ("dev", [TEXTS[4]])
    assert open_(tmp_path / "many", split="test").train["text"][:] == [TEXTS[5]]


def test_a_part_of_a_saved_data_set_is_refused_with_the_splits_that_there_are(
    tmp_path: Path, rows: datasets.Dataset
) -> None:
    rows.save_to_disk(tmp_path / "one")
    with pytest.raises(SaetrainError, match=r"train\[:10%\].*a part of a split can't be selected; pass one of train$"):
        open_(tmp_path / "one", split="train[:10%]")


def test_a_local_folder_called_like_a_hub_data_set_wins(
    tmp_path: Path, rows: datasets.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wikitext").mkdir()
    rows.to_parquet("wikitext/train.parquet")
    source = open_("wikitext")
    assert texts(source) == TEXTS
    assert "local folder wikitext" in source.description


def test_empty_folder_and_empty_file(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("no data")
    with pytest.raises(SaetrainError, match="contains no data"):
        open_(tmp_path)
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(SaetrainError, match="contains no data"):
        open_(tmp_path)
    with pytest.raises(SaetrainError, match="the file is empty"):
        open_(tmp_path / "a.jsonl")


def test_unknown_file_ending_lists_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(SaetrainError, match=r"'\.pdf' can't be read; allowed are \.parquet, \.jsonl"):
        open_(tmp_path / "a.pdf")


@pytest.mark.parametrize("split", ["tran", "tran[:10%]", "train+tran"])
def test_unknown_split_lists_the_splits(topics_jsonl: str, split: str) -> None:
    with pytest.raises(SaetrainError, match=r"no split 'tran'\. Did you mean train\? It has: train"):
        open_(topics_jsonl, split=split)


def test_malformed_split_is_refused(topics_jsonl: str) -> None:
    with pytest.raises(SaetrainError, match=r"train\[:1"):
        open_(topics_jsonl, split="train[:1")


def test_several_configurations_must_be_chosen_from(two_configs: Path) -> None:
    with pytest.raises(SaetrainError, match=r"--dataset_config\. It has: first, second"):
        open_(two_configs)
    with pytest.raises(SaetrainError, match="Did you mean second"):
        open_(two_configs, dataset_config="secnd")
    assert texts(open_(two_configs, dataset_config="second")) == TEXTS


def test_configuration_of_what_has_none_is_refused(topics_jsonl: str) -> None:
    with pytest.raises(SaetrainError, match=r"--dataset_config x: .* has no configurations"):
        open_(topics_jsonl, dataset_config="x")


@pytest.mark.parametrize("folder", [False, True])
def test_truncated_parquet_is_a_user_error(tmp_path: Path, rows: datasets.Dataset, folder: bool) -> None:
    file = tmp_path / "train.parquet"
    rows.to_parquet(file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SaetrainError, match=r"could not be read: .*Parquet"):
        open_(tmp_path if folder else file)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "b'),
        ("a.json", b'{"a": [1,'),
        ("a.txt", b"caf\xe9 in Latin-1\n"),
    ],
)
def test_broken_text_files_are_user_errors(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SaetrainError, match=f"{name}.* could not be read: ") as caught:
        open_(tmp_path / name)
    assert "Error:" not in str(caught.value)


def test_truncated_saved_data_set_is_a_user_error(tmp_path: Path, rows: datasets.Dataset) -> None:
    rows.save_to_disk(tmp_path / "saved")
    for file in (tmp_path / "saved").glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(SaetrainError, match="could not be read"):
        open_(tmp_path / "saved")


@pytest.mark.parametrize("name", ["someone/nothing", "wikitext", "squad", "imdb"])
def test_missing_data_set_without_a_network_is_said_within_seconds(hub_cache: Path, name: str) -> None:
    start = time.monotonic()
    with pytest.raises(SaetrainError, match="no network"):
        open_(name)
    assert time.monotonic() - start < 15


def prepared_cache(tmp_path: Path, folder: Path, owner: str, name: str, config: str) -> None:
    """Lay down what `datasets` keeps of a hub data set that it has opened before."""
    out = tmp_path / "prepared" / f"{owner}___{name}" / config / "0.0.0" / "0123456789"
    builder = datasets.load_dataset_builder(str(folder), config, cache_dir=str(tmp_path / "elsewhere"))
    builder.download_and_prepare(output_dir=str(out))
    for file in out.glob("*.arrow"):
        file.rename(out / f"{name}-{file.name.rsplit('-', 1)[1]}")


def test_data_set_that_was_opened_before_needs_no_network(hub_cache: Path, tmp_path: Path, two_configs: Path) -> None:
    prepared_cache(tmp_path, two_configs, "someone", "thing", "second")
    source = open_("someone/thing", dataset_config="second")
    assert texts(source) == TEXTS
    assert source.description == "hub data set someone/thing (second)"
    # The only configuration that is there need not be named, and the line that is printed names it.
    assert "(second)" in open_("someone/thing").description
    with pytest.raises(SaetrainError, match="no split 'validation'"):
        open_("someone/thing", split="validation")
    with pytest.raises(SaetrainError, match="no network"):
        open_("someone/thing", dataset_config="first")
    prepared_cache(tmp_path, two_configs, "someone", "thing", "first")
    with pytest.raises(SaetrainError, match="It has: first, second"):
        open_("someone/thing")
    # A process that was killed may leave half a description.
    (info,) = (tmp_path / "prepared").glob("*/first/*/*/dataset_info.json")
    info.write_bytes(info.read_bytes()[:50])
    with pytest.raises(SaetrainError, match="data set 'someone/thing' could not be read"):
        open_("someone/thing")


@pytest.mark.parametrize("skip_bad_rows", [False, True])
def test_what_was_opened_or_downloaded_before_is_streamed_without_a_network(
    hub_cache: Path, tmp_path: Path, cached_dataset: Path, two_configs: Path, skip_bad_rows: bool
) -> None:
    prepared_cache(tmp_path, two_configs, "someone", "thing", "second")
    for name in ("someone/thing", "someone/else"):
        source = open_(name, dataset_config="second", streaming=True, skip_bad_rows=skip_bad_rows)
        assert isinstance(source.train, datasets.IterableDataset)
        assert [row["text"] for row in source.train.skip(3)] == TEXTS[3:]


def test_wikitext_means_its_raw_configuration(hub_cache: Path, tmp_path: Path, rows: datasets.Dataset) -> None:
    folder, config = tmp_path / "wiki", "wikitext-103-raw-v1"
    folder.mkdir()
    rows.to_parquet(folder / "train.parquet")
    rows.select([1]).to_parquet(folder / "test.parquet")
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {config}\n  data_files:\n  - split: train\n    path: train.parquet\n"
        "  - split: test\n    path: test.parquet\n---\n"
    )
    prepared_cache(tmp_path, folder, "Salesforce", "wikitext", config)
    source = open_("wikitext")
    assert texts(source) == TEXTS
    assert (source.held_out_split, source.text_column) == ("test", "text")


def test_downloaded_data_set_needs_no_network(cached_dataset: Path) -> None:
    assert texts(open_("someone/else", dataset_config="first")) == TEXTS
    with pytest.raises(SaetrainError, match="It has: first, second"):
        open_("someone/else")
    # Of a download of a part, what is there can be used.
    shutil.rmtree(cached_dataset / "second")
    assert texts(open_("someone/else", dataset_config="first")) == TEXTS
    with pytest.raises(SaetrainError, match="someone/else"):
        open_("someone/else", dataset_config="second")


def test_squad_means_its_paragraphs(hub_cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "squad-files"
    folder.mkdir()
    squad = datasets.Dataset.from_dict({"question": ["a?", "b?"], "context": ["one text", "one text"]})
    squad.to_parquet(folder / "train.parquet")
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: plain_text\n  data_files: '*.parquet'\n---\n")
    prepared_cache(tmp_path, folder, "rajpurkar", "squad", "plain_text")
    source = open_("squad")
    assert (source.text_column, source.deduplicate) == ("context", True)
    assert open_dataset("squad", SourceSettings(text_column="question")).text_column == "question"


DEEP = '{"text": ' + "[" * 50_000 + "]" * 50_000 + "}\n"
GOOD = '{"text": "some words"}\n'


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("skip_bad_rows", [False, True])
def test_a_row_of_many_brackets_is_named_or_skipped(tmp_path: Path, streaming: bool, skip_bad_rows: bool) -> None:
    """pyarrow's JSON parser would end the process by SIGSEGV."""
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD * 20_000 + DEEP + GOOD)
    settings = SourceSettings(streaming=streaming, skip_bad_rows=skip_bad_rows)

    def read() -> list[str | None]:
        source = open_dataset(str(path), settings)
        rows = StreamedRows(source.train, "d", print, source.find_bad_row)(0) if streaming else source.train
        return [row["text"] for row in rows]

    if skip_bad_rows:
        assert read() == ["some words"] * 20_000 + [None, "some words"]
    else:
        with pytest.raises(SaetrainError, match=r"a\.jsonl, line 20001: is nested 50,001 levels deep.*--skip_bad_rows"):
            read()


def test_a_json_list_of_many_brackets_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" * 50_000)
    with pytest.raises(SaetrainError, match="levels deep"):
        open_dataset(str(tmp_path / "a.json"), SourceSettings(skip_bad_rows=True))
    with pytest.raises(SaetrainError, match=r"a\.json' could not be read"):
        open_dataset(str(tmp_path / "a.json"), SourceSettings())


def test_a_script_next_to_the_data_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "train.jsonl").write_text(GOOD)
    (folder / "texts.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')")
    with pytest.raises(SaetrainError, match=r"could not be read: .*texts\.py"):
        open_dataset(str(folder), SourceSettings())
    assert not (tmp_path / "was-run").exists()


def test_what_is_neither_file_nor_folder_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    for path in (tmp_path / "a.jsonl", Path("/dev/zero")):
        with pytest.raises(SaetrainError, match=f"data set {path}: is neither a regular file nor a folder"):
            open_dataset(str(path), SourceSettings())
