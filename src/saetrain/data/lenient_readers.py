"""Readers of jsonl, csv and parquet files that read row by row, so that a bad row can be named or skipped.

The library `datasets` reads such files in large blocks and reports at best where in the block the error is.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from saetrain.data.json_depth import describe_depth
from saetrain.data.text_column import SAMPLE_ROWS, TextColumn, choose_text_column, matches_kind
from saetrain.errors import SaetrainError
from saetrain.small_files import MAX_DEPTH, measure_depth, parse_json
from saetrain.untrusted import show_value

CACHE_FORMAT_VERSION = 1
"""Part of the cache key of read rows: raise it when a reader gives other rows for the same file."""
BAD_ROW_COLUMN = "bad_row"
"""Column with the description of what is wrong with a row; empty for good rows."""
CONVERT = "convert the file with iconv -f {} -t UTF-8 FILE > NEW_FILE"
NOT_UTF_8 = f"is not UTF-8; if the file is Latin-1, {CONVERT.format('LATIN1')}"
LONE_SURROGATE = "half of a surrogate pair, which UTF-8 can't encode"


@dataclass(frozen=True)
class RowFiles:
    """The files of a split, all of one kind."""

    kind: str
    """`json`, `csv`, `text` or `parquet`."""
    paths: tuple[str, ...]
    """Local paths or URLs."""
    separator: str = ","
    """Field separator of csv files."""
    sample_by: str = "line"
    """`line` or `paragraph`: what a row of a text file is."""

    @property
    def are_local(self) -> bool:
        """Whether all files are on this machine."""
        return all(os.path.exists(path) for path in self.paths)


@dataclass(frozen=True)
class BadRow:
    """A row that can't be read; in parquet, one row of a row group that can't be read."""

    location: str
    problem: str

    def __str__(self) -> str:
        return f"{self.location}: {self.problem}"


RowOrError = dict[str, Any] | BadRow


def find_split_files(path: str, config: str | None, split: str, **options: Any) -> RowFiles | None:
    """Return the files of ``split`` (one name, or several joined by +), or None if no reader here supports them."""
    import datasets

    builder = datasets.load_dataset_builder(path, config, **options)
    kind = type(builder).__module__.rsplit(".", 1)[1]
    settings = builder.config
    if kind not in READERS or getattr(settings, "field", None) is not None or not settings.data_files:
        return None
    paths = tuple(str(file) for name in split.split("+") for file in settings.data_files[name.strip()])
    separator = (getattr(settings, "delimiter", None) or getattr(settings, "sep", None)) if kind == "csv" else None
    return RowFiles(kind, paths, separator or ",", getattr(settings, "sample_by", "line"))


def find_first_bad_row(files: RowFiles) -> BadRow | None:
    """Return the first row that can't be read, or None."""
    return next((row for row in iterate_rows(files) if isinstance(row, BadRow)), None)


def iterate_rows(files: RowFiles) -> Iterator[RowOrError]:
    """Yield all rows of all files, in order."""
    for path in files.paths:
        with _open_file(path) as handle:
            is_utf_16 = files.kind != "parquet" and handle.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        if is_utf_16:
            yield BadRow(f"{path}, line 1", f"is UTF-16 instead of UTF-8; {CONVERT.format('UTF-16')}")
        else:
            yield from READERS[files.kind](path, files)


def choose_file_column(files: RowFiles, wanted: str | None) -> TextColumn:
    """Choose the text column from the first readable rows; SaetrainError if there are none."""
    good: list[dict[str, Any]] = []
    first_bad = ""
    for row in iterate_rows(files):
        if isinstance(row, dict):
            good.append(row)
        else:
            first_bad = first_bad or f"; the first problem: {row}"
        if len(good) == SAMPLE_ROWS:
            break
    names = list(dict.fromkeys(name for row in good for name in row))
    if not good:
        raise SaetrainError(f"data set {files.paths[0]}: contains no readable row{first_bad}")
    return choose_text_column(names, {name: [row.get(name) for row in good] for name in names}, wanted)


def load_leniently(files: RowFiles, column: TextColumn, streaming: bool) -> Any:
    """Load the text columns of ``files`` and BAD_ROW_COLUMN as a data set of the library `datasets`.

    A row that can't be read is kept with empty columns, so that row numbers do not change.
    """
    import datasets
    from datasets import Features, List, Value

    options: dict[str, Any] = {"files": files, "column": column}
    if streaming:
        return datasets.IterableDataset.from_generator(_iterate_text_rows, gen_kwargs=options)
    # The version is part of the cache key. Hub URLs need no stamp because they contain the commit.
    stamps = [os.stat(path) for path in files.paths if os.path.exists(path)]
    options["version"] = (CACHE_FORMAT_VERSION, tuple((stat.st_size, stat.st_mtime_ns) for stat in stamps))
    kind = {"text": Value("string"), "prompt": Value("string"), "ids": List(Value("int64"))}.get(column.kind)
    features = Features({**dict.fromkeys(column.columns, kind), BAD_ROW_COLUMN: Value("string")}) if kind else None
    return datasets.Dataset.from_generator(_iterate_text_rows, features=features, gen_kwargs=options)


def _iterate_text_rows(files: RowFiles, column: TextColumn, version: object = None) -> Iterator[dict[str, Any]]:
    for row in iterate_rows(files):
        problem = str(row) if isinstance(row, BadRow) else _describe_wrong_value(row, column)
        yield {
            **{name: None if isinstance(row, BadRow) or problem else row.get(name) for name in column.columns},
            BAD_ROW_COLUMN: problem,
        }


def _describe_wrong_value(row: dict[str, Any], column: TextColumn) -> str:
    for name in column.columns:
        value = row.get(name)
        if not matches_kind(value, column.kind):
            return f"column {name} contains {show_value(value)} instead of {column.kind}"
        if isinstance(value, str) and not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            return f"column {name} contains {LONE_SURROGATE}"
    return ""


def _read_json_rows(path: str, files: RowFiles) -> Iterator[RowOrError]:
    with _open_file(path) as handle:
        if handle.read(1) == b"[":
            yield from _read_json_list(path, handle)
            return
    with _open_file(path) as handle:
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                continue
            location = f"{path}, line {number}"
            depth = measure_depth(line)
            if depth > MAX_DEPTH:
                yield BadRow(location, describe_depth(depth))
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                yield BadRow(location, NOT_UTF_8)
                continue
            except ValueError as error:
                yield BadRow(location, f"is not valid JSON: {error}")
                continue
            if not isinstance(row, dict):
                yield BadRow(location, f"contains {show_value(line)} instead of an object with columns")
            elif b"\\ud" in line.lower() and _has_lone_surrogate(row):
                yield BadRow(location, f"contains {LONE_SURROGATE}")
            else:
                yield row


def _has_lone_surrogate(row: dict[str, Any]) -> bool:
    """Return whether a string of the row contains half of a surrogate pair, which UTF-8 can't encode."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _read_json_list(path: str, handle: IO[bytes]) -> Iterator[RowOrError]:
    rows = parse_json(b"[" + handle.read(), f"data set {path}: no single row of a JSON list can be skipped: the list")
    for number, row in enumerate(rows, start=1):
        yield row if isinstance(row, dict) else BadRow(f"{path}, item {number}", "is not an object with columns")


def _read_csv_rows(path: str, files: RowFiles) -> Iterator[RowOrError]:
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        # Bytes that are not UTF-8 become lone surrogates, so that their row can be named.
        with _open_file(path, mode="rt", encoding="utf-8", errors="surrogateescape", newline="") as handle:
            reader = csv.reader(handle, delimiter=files.separator)
            header = next(reader, [])
            while True:
                location = f"{path}, line {reader.line_num + 1}"
                try:
                    fields = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield BadRow(location, str(error))
                    continue
                if fields:
                    yield _parse_csv_row(header, fields, location)
    finally:
        csv.field_size_limit(before)


def _parse_csv_row(header: list[str], fields: list[str], location: str) -> RowOrError:
    if len(fields) != len(header):
        return BadRow(location, f"has {len(fields)} fields, the header has {len(header)}")
    if any("\udc80" <= char <= "\udcff" for field in fields if not field.isascii() for char in field):
        return BadRow(location, NOT_UTF_8)
    return dict(zip(header, fields, strict=True))


def _read_parquet_rows(path: str, files: RowFiles) -> Iterator[RowOrError]:
    import pyarrow.parquet

    with _open_file(path) as handle:
        try:
            file = pyarrow.parquet.ParquetFile(handle)
        except Exception as error:  # Arrow raises several unrelated types for a broken file
            raise SaetrainError(f"data set {path}: is not a complete parquet file: {error}") from error
        first = 1
        for group in range(file.metadata.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            try:
                rows: list[RowOrError] = file.read_row_group(group).to_pylist()
            except Exception as error:
                location = f"{path}, rows {first} to {first + count - 1} (row group {group})"
                rows = [BadRow(location, str(error).splitlines()[0])] * count
            yield from rows
            first += count


def _read_text_rows(path: str, files: RowFiles) -> Iterator[RowOrError]:
    """Yield each line, or each paragraph (lines up to a blank line), as the library `datasets` does."""
    lines: list[str] = []
    problem: BadRow | None = None
    with _open_file(path) as handle:
        for number, line in enumerate(itertools.chain(handle, [b"\n"]), start=1):
            try:
                lines.append(line.decode())
            except UnicodeDecodeError:
                problem = problem or BadRow(f"{path}, line {number}", NOT_UTF_8)
            if files.sample_by == "line" or not line.strip(b"\r\n"):
                if problem or "".join(lines).strip():
                    yield problem or {"text": "".join(lines).rstrip("\r\n")}
                lines, problem = [], None


READERS = {"json": _read_json_rows, "csv": _read_csv_rows, "text": _read_text_rows, "parquet": _read_parquet_rows}


def _open_file(path: str, **options: Any) -> Any:
    import fsspec

    compression = None if path.endswith(".parquet") else "infer"
    return fsspec.open(path, compression=compression, **options)
