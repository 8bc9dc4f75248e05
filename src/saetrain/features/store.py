"""The files of the collected features: parquet and JSON, written once and read column by column."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from saetrain.atomic_io import atomic_replace, write_json
from saetrain.errors import SaetrainError
from saetrain.features.pairs import STREAM_COLUMNS, TokenStream
from saetrain.small_files import read_json_object

FORMAT_VERSION = 1
METADATA_FILE = "metadata.json"
STREAM_FILE, VOCABULARY_FILE = "stream.parquet", "vocabulary.parquet"
LATENTS_FILE, CONTEXTS_FILE = "latents.parquet", "contexts.parquet"
ROWS_PER_GROUP = 1 << 16
LIST_OF_IDS, LIST_OF_VALUES = pa.list_(pa.int32()), pa.list_(pa.float32())
SCHEMAS = {
    STREAM_FILE: pa.schema([(name, pa.from_numpy_dtype(dtype)) for name, dtype in STREAM_COLUMNS.items()]),
    VOCABULARY_FILE: pa.schema([("token_id", pa.int32()), ("text", pa.string())]),
    LATENTS_FILE: pa.schema(
        [
            ("latent", pa.int32()),
            ("count", pa.int64()),
            ("max", pa.float32()),
            ("mean_active", pa.float32()),
            ("histogram", LIST_OF_IDS),
            ("quantiles", LIST_OF_VALUES),
            ("token_ids", LIST_OF_IDS),
            ("token_counts", LIST_OF_IDS),
            ("purity", pa.float32()),
            ("entropy", pa.float32()),
            ("positions", LIST_OF_IDS),
            ("cofiring", LIST_OF_IDS),
            ("cofiring_lift", LIST_OF_VALUES),
            ("neighbours", LIST_OF_IDS),
            ("neighbour_cosines", LIST_OF_VALUES),
            ("lens_top", LIST_OF_IDS),
            ("lens_top_logits", LIST_OF_VALUES),
            ("lens_bottom", LIST_OF_IDS),
            ("lens_bottom_logits", LIST_OF_VALUES),
            ("encoder_decoder_cosine", pa.float32()),
            ("variance_explained", pa.float32()),
            ("loss_effect", pa.float32()),
            ("loss_effect_low", pa.float32()),
            ("loss_effect_high", pa.float32()),
        ]
    ),
    CONTEXTS_FILE: pa.schema(
        [
            ("latent", pa.int32()),
            ("band", pa.int8()),
            ("rank", pa.int8()),
            ("token", pa.int32()),
            ("value", pa.float32()),
            ("offsets", pa.list_(pa.int8())),
            ("activations", LIST_OF_VALUES),
        ]
    ),
}
"""Columns of each file; docs/features.md describes them."""


def build_table(file: str, columns: Mapping[str, Any]) -> pa.Table:
    """Return the table of ``file``; nan becomes null, and 2-D arrays and (offsets, values) become lists."""
    schema = SCHEMAS[file]
    return pa.table([_build_column(columns[field.name], field.type) for field in schema], schema=schema)


def _build_column(values: Any, kind: pa.DataType) -> pa.Array:
    if not pa.types.is_list(kind):
        return pa.array(values, type=kind, from_pandas=True)
    if isinstance(values, tuple):
        offsets, flat = values
    else:
        offsets, flat = np.arange(len(values) + 1) * values.shape[1], values.reshape(-1)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(flat, kind.value_type))


def select_valid(values: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the entries of each row of ``values`` where ``valid``, both 2-D, as (offsets, values) of lists."""
    return np.concatenate([[0], np.cumsum(valid.sum(axis=1))]), values[valid]


def write_tables(folder: Path, file: str, tables: Iterable[pa.Table]) -> None:
    """Write the rows of ``tables`` to a parquet file, atomically."""
    with atomic_replace(folder / file) as path, pq.ParquetWriter(path, SCHEMAS[file], compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)


def write_stream(folder: Path, stream: TokenStream) -> None:
    """Write the token stream, one group of rows at a time."""
    write_tables(
        folder,
        STREAM_FILE,
        (
            build_table(
                STREAM_FILE, {name: stream.read_column(name)[start : start + ROWS_PER_GROUP] for name in STREAM_COLUMNS}
            )
            for start in range(0, max(len(stream), 1), ROWS_PER_GROUP)
        ),
    )


def write_metadata(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write the metadata, which marks the folder as complete."""
    write_json(folder / METADATA_FILE, {"format": FORMAT_VERSION, **metadata})


def read_metadata(folder: Path) -> dict[str, Any]:
    """Return the metadata of collected features; SaetrainError if there are none, or of another version."""
    path = folder / METADATA_FILE
    if not path.exists():
        raise SaetrainError(
            f"{folder}: contains no features; collect them with `saetrain features RUN`, or train with --feature_tokens"
        )
    metadata = read_json_object(path, "; collect the features again")
    if metadata.get("format") != FORMAT_VERSION:
        raise SaetrainError(
            f"{path}: was not written by this version of saetrain (no 'format' {FORMAT_VERSION}); collect the "
            "features again with `saetrain features RUN`"
        )
    return metadata


def read_table(folder: Path, file: str) -> pa.Table:
    """Return the table of ``file``; SaetrainError if it is missing, damaged, or lacks a column."""
    try:
        table = pq.read_table(folder / file)
    except (OSError, pa.ArrowException) as error:
        raise SaetrainError(f"{folder / file}: can't be read: {error}; collect the features again") from error
    for field in SCHEMAS[file]:
        if field.name not in table.column_names or table.schema.field(field.name).type != field.type:
            raise SaetrainError(f"{folder / file}: has no column '{field.name}' of type {field.type}; collect again")
    return table.combine_chunks()
