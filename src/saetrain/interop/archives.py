"""Tensors in zip archives, which ``torch.save`` and ``numpy.savez`` write: read without objects, and with limits."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saetrain.errors import SaetrainError
from saetrain.interop.schema import require_file, require_finite
from saetrain.untrusted import show_value

ARCHIVE_START = b"PK\x03\x04"
MAX_EXPANSION = 4
"""Largest size of the entries of an archive, relative to the file; compression makes weights little smaller."""
MAX_PICKLE_BYTES = 100_000
"""Largest description of the tensors in a file of PyTorch; that of ten tensors has about 1 kB."""


def read_torch_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a state dict that ``torch.save`` wrote, on the CPU.

    Raises SaetrainError if the file is missing or damaged, if it contains anything but tensors by name, or if a value
    is not finite.
    """
    for entry in _list_entries(path):
        if entry.filename.endswith("data.pkl") and entry.file_size > MAX_PICKLE_BYTES:
            raise SaetrainError(f"{path}: describes more than an SAE ({entry.file_size:,} bytes in data.pkl)")
    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make the unpickler fail in many ways
        raise SaetrainError(f"{path}: is damaged, or contains objects other than tensors") from error
    size = path.stat().st_size
    if not isinstance(found, dict):
        raise SaetrainError(f"{path}: must contain tensors by name, found {type(found).__name__}")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or value.layout is not torch.strided:
            raise SaetrainError(
                f"{path}: must contain dense tensors by name, found {show_value(name)}: {type(value).__name__}; "
                "a backup of a training that has not ended can't be read"
            )
        # A tensor may repeat the same bytes.
        if value.numel() * value.element_size() > size or value.is_complex() or value.is_quantized:
            raise SaetrainError(f"{path}: {name} of shape {tuple(value.shape)} and {value.dtype} is not allowed")
    return require_finite(path, found)


def read_numpy_tensors(path: Path) -> dict[str, Tensor]:
    """Return the arrays of numbers that ``numpy.savez`` wrote, in float32.

    Raises SaetrainError if the file is missing or damaged, if it contains anything but floating-point arrays, or if a
    value is not finite.
    """
    _list_entries(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # NumPy parses headers as Python, which fails in many ways
        problem = str(error).partition("\n")[0]
        raise SaetrainError(f"{path}: is damaged, or contains objects other than arrays: {problem}") from error
    for name, value in arrays.items():
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f":
            kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
            raise SaetrainError(f"{path}: {name} must be an array of floating-point numbers, found {kind}")
    return require_finite(
        path, {name: torch.from_numpy(value.astype(np.float32, copy=False)) for name, value in arrays.items()}
    )


def _list_entries(path: Path) -> list[zipfile.ZipInfo]:
    """Return the entries of an archive; raise SaetrainError if it is none, or if they are much larger than the file."""
    require_file(path)
    with open(path, "rb") as file:
        # torch reads a file with another beginning as a pickle, although zipfile would find an archive in it.
        if file.read(len(ARCHIVE_START)) != ARCHIVE_START:
            raise SaetrainError(f"{path}: is no archive, or other data precedes it")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise SaetrainError(f"{path}: is damaged, truncated or no archive: {error}") from error
    total, size = sum(entry.file_size for entry in entries), path.stat().st_size
    if total > MAX_EXPANSION * size:
        raise SaetrainError(
            f"{path}: expands from {size:,} to {total:,} bytes; at most {MAX_EXPANSION} times is allowed"
        )
    return entries
