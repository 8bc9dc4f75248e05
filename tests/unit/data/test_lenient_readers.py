"""Broken rows of jsonl, csv and parquet are named by file and line, or left out and counted."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from saetrain.data.lenient_readers import BAD_ROW_COLUMN, find_first_bad_row, find_split_files
from saetrain.data.sources import SourceSettings, open_dataset
from saetrain.data.streaming import StreamedRows
from saetrain.data.tokenize import TokenSettings
from saetrain.errors import SaetrainError
from saetrain.runs.text_data import open_text, tokenize_source

GOOD = [f"text number {i}" for i in range(50)]
AT = 20
JSON_BREAKS = {
    "cut": b'{"text": "broken',
    "no object": b'["text"]',
    "not UTF-8": b'{"text": "caf\xe9"}',
    "number": b'{"text": 5}',
    "half a character": b'{"text": "\\ud800"}',
    "garbage": b"\x00\x01\x02",
}
CSV_BREAKS = {"too many": b"20,a,b,c", "too few": b"20", "not UTF-8": b"20,caf\xe9"}


def write_jsonl(path: Path, broken: bytes) -> Path:
    lines = [json.dumps({"text": text}).encode() for text in GOOD]
    lines[AT] = broken
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def write_csv(path: Path, broken: bytes) -> Path:
    lines = [b"number,text", *(f"{i},{text}".encode() for i, text in enumerate(GOOD))]
    lines[AT + 1] = broken
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def write_parquet(path: Path, group: int = 2) -> Path:
    """Row groups of ten rows, of which one has lost its page header."""
    pq.write_table(pa.table({"text": GOOD}), path, row_group_size=10, use_dictionary=False)
    offset = pq.ParquetFile(path).metadata.row_group(group).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[offset : offset + 30] = b"\xff" * 30
    path.write_bytes(content)
    return path


def read(path: Path, streaming: bool) -> tuple[list[str | None], list[str]]:
    """(texts, what is wrong with the bad ones) when bad rows are left out."""
    source = open_dataset(str(path), SourceSettings(skip_bad_rows=True, streaming=streaming))
    rows = list(source.train)
    return [row["text"] for row in rows], [row[BAD_ROW_COLUMN] for row in rows if row[BAD_ROW_COLUMN]]


def without(*numbers: int) -> list[str | None]:
    return [None if i in numbers else text for i, text in enumerate(GOOD)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", JSON_BREAKS)
def test_broken_json_lines_are_left_out(tmp_path: Path, name: str, streaming: bool) -> None:
    texts, bad = read(write_jsonl(tmp_path / "a.jsonl", JSON_BREAKS[name]), streaming)
    assert texts == without(AT), "rows keep their numbers"
    assert len(bad) == 1


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", CSV_BREAKS)
def test_csv_rows_of_the_wrong_number_of_fields_are_left_out(tmp_path: Path, name: str, streaming: bool) -> None:
    texts, bad = read(write_csv(tmp_path / "a.csv", CSV_BREAKS[name]), streaming)
    assert texts == without(AT)
    assert len(bad) == 1
    assert "a.csv, line 22" in bad[0]


@pytest.mark.parametrize("streaming", [False, True])
def test_broken_row_groups_are_left_out(tmp_path: Path, streaming: bool) -> None:
    texts, bad = read(write_parquet(tmp_path / "a.parquet"), streaming)
    assert texts == without(*range(20, 30))
    assert len(bad) == 10
    assert "a.parquet, rows 21 to 30 (row group 2)" in bad[0]


@pytest.mark.parametrize("name", ["cut", "no object", "garbage"])
def test_broken_json_line_is_named_while_loading(tmp_path: Path, name: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", JSON_BREAKS[name])
    with pytest.raises(SaetrainError, match=r"could not be read: .*a\.jsonl, line 21: .* --skip_bad_rows skips"):
        open_dataset(str(path), SourceSettings())


def test_broken_csv_and_parquet_rows_are_named_while_loading(tmp_path: Path) -> None:
    with pytest.raises(SaetrainError, match=r"a\.csv, line 22: has 4 fields, the header has 2; --skip_bad_rows"):
        open_dataset(str(write_csv(tmp_path / "a.csv", CSV_BREAKS["too many"])), SourceSettings())
    with pytest.raises(SaetrainError, match=r"a\.parquet, rows 21 to 30 \(row group 2\): .*--skip_bad_rows"):
        open_dataset(str(write_parquet(tmp_path / "a.parquet")), SourceSettings())


def test_broken_rows_are_named_while_streaming_without_further_tries(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet")
    source = open_dataset(str(path), SourceSettings(streaming=True))
    said: list[str] = []
    with pytest.raises(SaetrainError, match=r"a\.parquet, rows 21 to 30 .*--skip_bad_rows"):
        list(StreamedRows(source.train, str(path), said.append, source.find_bad_row)(0))
    assert not said


def test_a_folder_with_a_validation_file_and_a_compressed_one(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", JSON_BREAKS["cut"])
    content = (tmp_path / "train.jsonl").read_bytes()
    (tmp_path / "validation.jsonl").write_bytes(content)
    source = open_dataset(str(tmp_path), SourceSettings(skip_bad_rows=True))
    assert source.held_out_split == "validation"
    assert [len(source.train), len(source.held_out)] == [50, 50]
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "train.jsonl.gz").write_bytes(gzip.compress(content))
    files = find_split_files(str(tmp_path / "packed"), None, "train")
    assert files is not None
    assert str(find_first_bad_row(files)).startswith(f"{files.paths[0]}, line 21")


def test_other_columns_and_ids(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"input_ids": [1, 2]}\n{"input_ids": "x"}\n{"input_ids": [3]}\n')
    source = open_dataset(str(path), SourceSettings(skip_bad_rows=True))
    assert source.column is not None
    assert (source.column.kind, source.train["input_ids"][:]) == ("ids", [[1, 2], None, [3]])
    with pytest.raises(SaetrainError, match="--text_column body: no such column"):
        open_dataset(str(path), SourceSettings(skip_bad_rows=True, text_column="body"))


def test_files_that_changed_are_read_anew(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", JSON_BREAKS["cut"])
    settings = SourceSettings(skip_bad_rows=True)
    first, again = (open_dataset(str(path), settings).train for _ in range(2))
    assert first._fingerprint == again._fingerprint
    path.write_text('{"text": "new"}\n')
    changed = open_dataset(str(path), settings).train
    assert changed["text"][:] == ["new"]
    assert changed._fingerprint != first._fingerprint


def test_whole_files_give_what_the_library_gives(topics_jsonl: str) -> None:
    plain = open_dataset(topics_jsonl, SourceSettings()).train
    lenient: Any = open_dataset(topics_jsonl, SourceSettings(skip_bad_rows=True)).train
    assert isinstance(lenient, datasets.Dataset)
    assert lenient["text"][:] == plain["text"][:]
    assert not any(lenient[BAD_ROW_COLUMN])


ROWS = [f"Wärme und Kälte {number}" for number in range(30)]
CONTENTS = {
    "txt": "\n\n".join(ROWS),
    "csv": "text,n\n" + "".join(f"{row},{number}\n" for number, row in enumerate(ROWS)),
    "jsonl": "".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in ROWS),
}


def read_as_run(path: Path, skip_bad_rows: bool) -> None:
    source = open_text(str(path), SourceSettings(skip_bad_rows=skip_bad_rows), None)
    tokenize_source(str(path), source, None, None, TokenSettings())  # type: ignore[arg-type]


@pytest.mark.parametrize("skip_bad_rows", [False, True])
@pytest.mark.parametrize("suffix", list(CONTENTS))
@pytest.mark.parametrize(("encoding", "name"), [("latin-1", "LATIN1"), ("utf-16", "UTF-16")])
def test_other_encodings_are_named_with_line_and_remedy(
    tmp_path: Path, suffix: str, encoding: str, name: str, skip_bad_rows: bool
) -> None:
    path = tmp_path / f"text.{suffix}"
    path.write_bytes(CONTENTS[suffix].encode(encoding))
    line = 2 if (suffix, name) == ("csv", "LATIN1") else 1
    with pytest.raises(SaetrainError, match=rf"text\.{suffix}, line {line}: is .*iconv -f {name} -t UTF-8"):
        read_as_run(path, skip_bad_rows)


def test_paragraphs_that_are_not_utf_8_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"one\nstill one\n\nW\xe4rme\nmore\n\nthree")
    rows = open_text(str(path), SourceSettings(skip_bad_rows=True), None).train
    assert rows["text"] == ["one\nstill one", None, "three"]
    assert "line 4: is not UTF-8" in rows["bad_row"][1]
