"""Activations on disk: folders of safetensors files, which serve as a cache and as input. See docs/activations.md.

A folder contains METADATA_FILE, and shards with the activations of consecutive tokens. The tokens of a shard are split
into units, which are written, read and checked as a whole. Each read is checked against a hash of its bytes.
"""

from __future__ import annotations

import dataclasses
import math
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from saetrain.activations.model import DTYPES, Dtype
from saetrain.atomic_io import temporary_path, write_json
from saetrain.errors import SaetrainError
from saetrain.settings import MAX_TOTAL, Size
from saetrain.small_files import MAX_JSON_BYTES, parse_json, read_json
from saetrain.typed_values import require_type
from saetrain.untrusted import require_file_name, show_text, show_value

METADATA_FILE = "saetrain_activations.json"
FORMAT_VERSION = 1
SHARD_SUFFIX = ".safetensors"
VALUES_PREFIX = "values:"
COLUMNS: dict[str, type[np.generic]] = {"ids": np.int32, "position": np.int32, "doc": np.int64}
"""{column: type} of the integers per token besides the activations."""
UNIT_OFFSETS, UNIT_HASHES, UNIT_CHECKSUMS = "unit_offsets", "unit_hashes", "unit_checksums"
HASH_BYTES = 16
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
SAFETENSORS_DTYPES |= {torch.int32: "I32", torch.int64: "I64", torch.uint8: "U8"}


@dataclass(frozen=True, kw_only=True)
class StoreMetadata:
    """What METADATA_FILE records: ``hookpoints`` {name: width D}, the dtype, and the ``key`` if it is a cache."""

    format: int = FORMAT_VERSION
    hookpoints: dict[str, int]
    dtype: Dtype
    model: str = ""
    key: dict[str, Any] = field(default_factory=dict)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that the activations and the columns of a token take."""
        columns = sum(np.dtype(kind).itemsize for kind in COLUMNS.values())
        return sum(self.hookpoints.values()) * DTYPES[self.dtype].itemsize + columns


@dataclass(frozen=True)
class Unit:
    """Activations of N tokens: ``values`` {hookpoint: (N, D)} on the host, and (N,) integers as in COLUMNS.

    ``hash``: what identifies the unit, HASH_BYTES long.
    """

    hash: bytes
    values: dict[str, Tensor]
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


def hash_bytes(value: Tensor) -> int:
    """Return a hash of a contiguous tensor on the host as a signed integer, which safetensors and torch both have."""
    return xxhash.xxh3_64_intdigest(_view_bytes(value)) - (1 << 63)


def _view_bytes(value: Tensor) -> memoryview:
    return value.view(torch.uint8).numpy().data.cast("B") if value.numel() else memoryview(b"")


def write_metadata(folder: Path, metadata: StoreMetadata) -> None:
    """Write METADATA_FILE, atomically."""
    write_json(folder / METADATA_FILE, dataclasses.asdict(metadata))


def read_metadata(folder: Path) -> StoreMetadata:
    """Read METADATA_FILE; SaetrainError if it is missing, broken or of another version."""
    label = f"activations {folder}: {METADATA_FILE}"
    content = read_json(folder / METADATA_FILE, dict[str, Any], label)
    if content.get("format") != FORMAT_VERSION:
        raise SaetrainError(
            f"{label}: has format {show_value(content.get('format'))}, and this version reads format {FORMAT_VERSION}"
        )
    metadata: StoreMetadata = read_json(folder / METADATA_FILE, StoreMetadata, label)
    if not metadata.hookpoints:
        raise SaetrainError(f"{label}: names no hookpoint")
    for name, width in metadata.hookpoints.items():
        # The name becomes a folder of the run.
        require_file_name(name, f"{label}: hookpoint")
        require_type(width, Size, f"{label}: hookpoints.{show_text(name)}")
    return metadata


def list_shards(folder: Path) -> list[Path]:
    """Return the complete shards of a folder, by name."""
    return sorted(path for path in folder.glob(f"*{SHARD_SUFFIX}") if not path.name.startswith("."))


def write_shard(folder: Path, metadata: StoreMetadata, units: Sequence[Unit], name: str | None = None) -> Shard:
    """Write a shard of ``units`` under ``name`` or a new name, atomically, and return it; OSError if that fails."""
    columns = {name: torch.from_numpy(np.concatenate([unit.columns[name] for unit in units])) for name in COLUMNS}
    checksums = [
        [
            hash_bytes(torch.frombuffer(bytearray(unit.hash), dtype=torch.uint8)),
            *(hash_bytes(torch.from_numpy(unit.columns[name])) for name in COLUMNS),
            *(hash_bytes(unit.values[name]) for name in metadata.hookpoints),
        ]
        for unit in units
    ]
    tensors = {
        UNIT_OFFSETS: torch.tensor([0, *np.cumsum([len(unit) for unit in units]).tolist()]),
        UNIT_HASHES: torch.frombuffer(bytearray(b"".join(unit.hash for unit in units)), dtype=torch.uint8),
        UNIT_CHECKSUMS: torch.tensor(checksums),
        **columns,
        **{VALUES_PREFIX + name: torch.cat([unit.values[name] for unit in units]) for name in metadata.hookpoints},
    }
    tensors[UNIT_HASHES] = tensors[UNIT_HASHES].view(-1, HASH_BYTES)
    path = folder / f"{name or uuid.uuid4().hex}{SHARD_SUFFIX}"
    temporary = temporary_path(path)
    try:
        # The file is not synced: after a power failure the hashes of the units find what is missing.
        save_file(tensors, temporary)
        os.replace(temporary, path)
    except SafetensorError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path.name}: {error}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return Shard(path, metadata)


class Shard:
    """A shard that is open for reading; it holds no file open.

    ``offsets`` (U + 1,) int64: the first token of each of U units, and the number of tokens. ``hashes`` identify the
    units, and ``checksums`` are those of their bytes. Raises SaetrainError if the file is not a shard with these
    hookpoints, and OSError if it can't be read.
    """

    def __init__(self, path: Path, metadata: StoreMetadata) -> None:
        self.path, self._metadata = path, metadata
        with open(path, "rb") as file:
            self._places = _read_header(file, path)
            self.offsets = self._read_table(file, UNIT_OFFSETS, torch.int64, 1)
            units = len(self.offsets) - 1
            hashes = self._read_table(file, UNIT_HASHES, torch.uint8, 2)
            self.checksums = self._read_table(file, UNIT_CHECKSUMS, torch.int64, 2)
        n_tokens = int(self.offsets[-1]) if units >= 0 else -1
        if units < 0 or self.offsets[0] or (np.diff(self.offsets) < 0).any():
            raise SaetrainError(f"{path}: {UNIT_OFFSETS} must start at 0 and increase")
        if hashes.shape != (units, HASH_BYTES):
            raise SaetrainError(f"{path}: {UNIT_HASHES} must have shape {(units, HASH_BYTES)}, found {hashes.shape}")
        if self.checksums.shape != (units, 1 + len(COLUMNS) + len(metadata.hookpoints)):
            raise SaetrainError(f"{path}: {UNIT_CHECKSUMS} does not match the units and hookpoints")
        self.hashes = [row.tobytes() for row in hashes]
        for name, kind in COLUMNS.items():
            self._require_place(name, torch.from_numpy(np.zeros(0, kind)).dtype, [n_tokens])
        for name, width in metadata.hookpoints.items():
            self._require_place(VALUES_PREFIX + name, DTYPES[metadata.dtype], [n_tokens, width])

    def __len__(self) -> int:
        return int(self.offsets[-1])

    @property
    def file_bytes(self) -> int:
        """Size of the file, or 0 if it was deleted."""
        return self.path.stat().st_size if self.path.exists() else 0

    def _require_place(self, name: str, dtype: torch.dtype, shape: list[int]) -> None:
        wanted = (SAFETENSORS_DTYPES[dtype], shape)
        place = self._places.get(name)
        found = None if place is None else (place.dtype, place.shape)
        if found != wanted:
            shown = "is missing" if found is None else f"has type {found[0]} and shape {found[1]}"
            raise SaetrainError(
                f"{self.path}: {show_value(name)} {shown}; it must have type {wanted[0]}, shape {shape}"
            )

    def _read_table(self, file: BinaryIO, name: str, dtype: torch.dtype, dims: int) -> np.ndarray:
        place = self._places.get(name)
        if place is None or place.dtype != SAFETENSORS_DTYPES[dtype] or len(place.shape) != dims:
            raise SaetrainError(f"{self.path}: is not a shard of activations ({name} is missing or of another type)")
        table = torch.empty(place.shape, dtype=dtype)
        self._read_rows(file, table, name, 0)
        return table.numpy()

    def _read_rows(self, file: BinaryIO, out: Tensor, name: str, first: int) -> None:
        """Read rows of a tensor into ``out``, from row ``first`` on."""
        place = self._places[name]
        row_bytes = out.nbytes // max(1, len(out))
        file.seek(place.start + first * row_bytes)
        view, done = _view_bytes(out), 0
        while done < len(view):
            count = file.readinto(view[done:])  # type: ignore[attr-defined]
            if not count:
                raise SaetrainError(f"{self.path}: ends before {show_value(name)} is complete")
            done += count

    def read_unit(self, number: int, *, pin_memory: bool = False) -> dict[str, Tensor]:
        """Return {hookpoint: (N, D)} of a unit on the host.

        Raises SaetrainError if the bytes do not match their hash, and OSError if the file can't be read.
        """
        first, stop = int(self.offsets[number]), int(self.offsets[number + 1])
        dtype, values = DTYPES[self._metadata.dtype], {}
        with open(self.path, "rb", buffering=0) as file:
            for column, (name, width) in enumerate(self._metadata.hookpoints.items(), 1 + len(COLUMNS)):
                values[name] = torch.empty(stop - first, width, dtype=dtype, pin_memory=pin_memory)
                self._read_rows(file, values[name], VALUES_PREFIX + name, first)
                self._check_bytes(values[name], number, column)
        return values

    def read_columns(self, number: int) -> dict[str, np.ndarray]:
        """Return {column: (N,)} of a unit; raises as :meth:`read_unit`."""
        first, stop = int(self.offsets[number]), int(self.offsets[number + 1])
        found: dict[str, np.ndarray] = {}
        with open(self.path, "rb", buffering=0) as file:
            for column, (name, kind) in enumerate(COLUMNS.items(), 1):
                value = torch.from_numpy(np.empty(stop - first, kind))
                self._read_rows(file, value, name, first)
                self._check_bytes(value, number, column)
                found[name] = value.numpy()
        return found

    def _check_bytes(self, value: Tensor, number: int, column: int) -> None:
        if hash_bytes(value) != self.checksums[number, column]:
            raise SaetrainError(f"{self.path}: is damaged (unit {number} does not match its hash)")

    def verify_units(self) -> None:
        """Read everything; raises as :meth:`read_unit`."""
        for number, unit in enumerate(self.hashes):
            self._check_bytes(torch.frombuffer(bytearray(unit), dtype=torch.uint8), number, 0)
            self.read_columns(number)
            self.read_unit(number)


@dataclass(frozen=True)
class _Place:
    """Where a tensor is in a file: type and shape as safetensors writes them, and the first byte."""

    dtype: str
    shape: list[int]
    start: int


def _read_header(file: BinaryIO, path: Path) -> dict[str, _Place]:
    """Return {tensor: its place} of a safetensors file; SaetrainError if the file is not valid."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= min(MAX_JSON_BYTES, size - 8):
        raise SaetrainError(f"{path}: is not a safetensors file")
    header = parse_json(file.read(length), f"{path}: its header", dict[str, dict[str, Any]])
    header.pop("__metadata__", None)
    places = {}
    for name, entry in header.items():
        label = f"{path}: its header: {show_value(name)}"
        dtype = require_type(entry.get("dtype"), str, label)
        shape, offsets = (require_type(entry.get(key), list[int], label) for key in ("shape", "data_offsets"))
        bits = {"F32": 4, "BF16": 2, "F16": 2, "I32": 4, "I64": 8, "U8": 1}.get(dtype)
        if bits is None:
            raise SaetrainError(f"{label}: has type {show_value(dtype)}; allowed are F32, BF16, F16, I32, I64 and U8")
        valid = len(offsets) == 2 and all(0 <= count <= MAX_TOTAL for count in (*shape, *offsets))
        if not valid or offsets[1] - offsets[0] != math.prod(shape) * bits or 8 + length + offsets[1] > size:
            raise SaetrainError(f"{label}: its place {show_value(offsets)} does not fit its shape or the file")
        places[name] = _Place(dtype, shape, 8 + length + offsets[0])
    return places
