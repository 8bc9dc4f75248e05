"""Shards of activations keep their bits, and a file that is damaged or foreign is named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from saetrain.activations.cache_files import list_files, make_room, parse_size
from saetrain.activations.store import (
    METADATA_FILE,
    Shard,
    StoreMetadata,
    Unit,
    read_metadata,
    write_metadata,
    write_shard,
)
from saetrain.errors import SaetrainError

METADATA = StoreMetadata(hookpoints={"h.0": 3, "h.1:in": 5}, dtype="bfloat16", model="m", key={"weights": "x"})


def build_unit(number: int, tokens: int) -> Unit:
    generator = torch.Generator().manual_seed(number)
    values = {
        name: torch.randn(tokens, width, generator=generator).bfloat16() for name, width in METADATA.hookpoints.items()
    }
    columns = {
        "ids": np.arange(tokens, dtype=np.int32) + number,
        "position": np.arange(tokens, dtype=np.int32),
        "doc": np.full(tokens, number, dtype=np.int64),
    }
    return Unit(bytes([number]) * 16, values, columns)


@pytest.fixture
def units() -> list[Unit]:
    return [build_unit(number, tokens) for number, tokens in enumerate((4, 1, 0, 7))]


@pytest.fixture
def shard(tmp_path: Path, units: list[Unit]) -> Shard:
    write_metadata(tmp_path, METADATA)
    return write_shard(tmp_path, METADATA, units)


def test_units_keep_their_bits(tmp_path: Path, shard: Shard, units: list[Unit]) -> None:
    assert read_metadata(tmp_path) == METADATA
    found = Shard(shard.path, METADATA)
    assert len(found) == 12
    assert found.hashes == [unit.hash for unit in units]
    found.verify_units()
    for number, unit in enumerate(units):
        values, columns = found.read_unit(number), found.read_columns(number)
        assert all(torch.equal(values[name], unit.values[name]) for name in METADATA.hookpoints)
        assert all(np.array_equal(columns[name], unit.columns[name]) for name in unit.columns)
    # Any program that reads safetensors can read the values.
    assert load_file(shard.path)["values:h.0"].shape == (12, 3)


def test_every_changed_byte_of_a_shard_is_found(shard: Shard) -> None:
    content = shard.path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for place in range(start, len(content)):
        changed = bytearray(content)
        changed[place] ^= 1
        shard.path.write_bytes(changed)
        with pytest.raises(SaetrainError, match=shard.path.name):
            Shard(shard.path, METADATA).verify_units()
    for length in (0, 7, 8, start - 1, start, len(content) - 1):
        shard.path.write_bytes(content[:length])
        with pytest.raises(SaetrainError, match=shard.path.name):
            Shard(shard.path, METADATA).verify_units()


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("values:h.0", None, "'values:h.0' is missing"),
        ("values:h.0", torch.zeros(12, 3), "has type F32 and shape .12, 3.; it must have type BF16"),
        ("values:h.0", torch.zeros(12, 4).bfloat16(), "shape .12, 4.; it must have type BF16, shape .12, 3."),
        ("ids", torch.zeros(11, dtype=torch.int32), "'ids' has type I32 and shape .11.; it must"),
        ("unit_offsets", None, "is not a shard of activations .unit_offsets"),
        ("unit_offsets", torch.tensor([0, 4, 3, 5, 12]), "unit_offsets must start at 0 and increase"),
        ("unit_offsets", torch.zeros(0, dtype=torch.int64), "unit_offsets must start at 0 and increase"),
        ("unit_hashes", torch.zeros(4, 15, dtype=torch.uint8), "unit_hashes must have shape"),
        ("unit_checksums", torch.zeros(4, 2, dtype=torch.int64), "unit_checksums does not match"),
        ("more", torch.zeros(1, dtype=torch.float64), "has type 'F64'; allowed are"),
    ],
)
def test_foreign_tensors_are_named(shard: Shard, name: str, tensor: torch.Tensor | None, message: str) -> None:
    tensors = {key: value.clone() for key, value in load_file(shard.path).items()}
    tensors.pop(name, None)
    save_file({**tensors, **({} if tensor is None else {name: tensor})}, shard.path)
    with pytest.raises(SaetrainError, match=message):
        Shard(shard.path, METADATA)


@pytest.mark.parametrize("entry", [{"shape": [3]}, {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}, {}])
def test_odd_headers_are_refused(tmp_path: Path, entry: dict[str, object]) -> None:
    header = json.dumps({"unit_offsets": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(SaetrainError, match=r"x\.safetensors: its header: 'unit_offsets'"):
        Shard(path, METADATA)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "has format 2, and this version reads format 1"),
        ({"hookpoints": {}}, "names no hookpoint"),
        ({"hookpoints": {"h.0": 0}}, "hookpoints.h.0: found 0, must be at least 1"),
        ({"dtype": "int8"}, "dtype"),
        ({"hookpoints": ["h.0"]}, "hookpoints"),
    ],
)
def test_odd_metadata_is_refused(tmp_path: Path, shard: Shard, changes: dict[str, object], message: str) -> None:
    path = tmp_path / METADATA_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(SaetrainError, match=f"{METADATA_FILE}.*{message}"):
        read_metadata(tmp_path)


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("123", 123), ("2kB", 2000), ("500MB", 5 * 10**8), ("1.5 gb", 15 * 10**8), ("1T", 10**12)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "1e9", "5 PB", "1,5GB", "9999TB", "inf"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(SaetrainError, match=r"^--cache_size .*: must be a number of bytes, or one with a unit such as"):
        parse_size(text)


def test_the_least_recently_used_files_make_room(tmp_path: Path, units: list[Unit]) -> None:
    paths = []
    for number in range(4):
        folder = tmp_path / f"key{number % 2}"
        folder.mkdir(exist_ok=True)
        write_metadata(folder, METADATA)
        paths.append(write_shard(folder, METADATA, units).path)
        os.utime(paths[-1], (0, 100 + number))
    size = paths[0].stat().st_size
    assert not make_room(tmp_path, size, 2 * size, used_before=102)
    assert all(path.exists() for path in paths), "nothing is deleted in vain"
    assert make_room(tmp_path, size, 4 * size, used_before=102)
    assert [path.exists() for path in paths] == [False, True, True, True]
    assert make_room(tmp_path, 0, size)
    assert [file.path for number in range(2) for file in list_files(tmp_path / f"key{number}")] == [paths[3]]
