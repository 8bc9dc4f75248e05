"""Write activations of any origin in the format of :mod:`saetrain.activations.store`, to train on them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saetrain.activations.model import DTYPES
from saetrain.activations.store import COLUMNS, HASH_BYTES, StoreMetadata, Unit, write_metadata, write_shard
from saetrain.errors import SaetrainError
from saetrain.untrusted import require_file_name

UNIT_TOKENS = 2048
"""Consecutive tokens that a run reads together."""
SHARD_BYTES = 64 << 20


class ActivationWriter:
    """Writes activations to the new folder ``folder`` in any number of parts, which need not fit into memory together.

    Use it in a ``with`` block. The folder is complete after the block. Raises SaetrainError if the folder is not empty
    or can't be written, and if the parts do not fit together.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._metadata: StoreMetadata | None = None
        self._units: list[Unit] = []
        self._n_bytes = self._n_units = self._n_shards = 0
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise SaetrainError(
                f"{self.folder}: already exists and is not empty; use another folder, or delete this one"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SaetrainError(f"{self.folder}: can't be written: {error.strerror}") from error

    def __enter__(self) -> ActivationWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

    def write_tokens(
        self, activations: Mapping[str, Any], ids: Any = None, position: Any = None, doc: Any = None
    ) -> None:
        """Append N tokens.

        Args:
            activations: {hookpoint: (N, D)}, tensors or arrays in float32, bfloat16 or float16. Every call has the same
                hookpoints, widths and type. A name is the SAE's folder name, so it has no ``/``.
            ids: (N,) token ids; by default -1.
            position: (N,) positions in the sequence; by default -1.
            doc: (N,) numbers of the documents, images or other items that the tokens come from. A run holds out whole
                items. By default -1: it holds out pieces of UNIT_TOKENS tokens.
        """
        values = {name: torch.as_tensor(value).detach().cpu().contiguous() for name, value in activations.items()}
        metadata = _describe_values(values)
        if self._metadata not in (None, metadata):
            raise SaetrainError(
                f"{self.folder}: all parts must have the same hookpoints, widths and type; found "
                f"{metadata.hookpoints} in {metadata.dtype} after {self._metadata}"
            )
        self._metadata, n_tokens = metadata, len(next(iter(values.values())))
        columns = {
            name: _convert_column(name, given, n_tokens)
            for name, given in (("ids", ids), ("position", position), ("doc", doc))
        }
        for start in range(0, n_tokens, UNIT_TOKENS):
            rows = slice(start, start + UNIT_TOKENS)
            # A copy, because the caller may reuse its tensor for the next part.
            part = {name: value[rows].clone() for name, value in values.items()}
            key = self._n_units.to_bytes(HASH_BYTES, "little")
            self._units.append(Unit(key, part, {name: column[rows] for name, column in columns.items()}))
            self._n_units += 1
            self._n_bytes += sum(value.nbytes for value in part.values())
            if self._n_bytes >= SHARD_BYTES:
                self._write_shard()

    def _write_shard(self) -> None:
        assert self._metadata is not None
        try:
            write_shard(self.folder, self._metadata, self._units, f"{self._n_shards:08d}")
        except OSError as error:
            raise SaetrainError(f"{self.folder}: can't be written: {error.strerror or error}") from error
        self._units, self._n_bytes, self._n_shards = [], 0, self._n_shards + 1

    def close(self) -> None:
        """Write the rest, and mark the folder as complete."""
        if self._units:
            self._write_shard()
        if self._metadata is None or not self._n_shards:
            raise SaetrainError(f"{self.folder}: no activations were written")
        write_metadata(self.folder, self._metadata)


def write_activations(
    folder: str | Path, activations: Mapping[str, Any], ids: Any = None, position: Any = None, doc: Any = None
) -> None:
    """Write the activations of N tokens to ``folder``, as :meth:`ActivationWriter.write_tokens` describes them."""
    with ActivationWriter(folder) as writer:
        writer.write_tokens(activations, ids, position, doc)


def _describe_values(values: Mapping[str, Tensor]) -> StoreMetadata:
    if not values:
        raise SaetrainError("activations: name at least one hookpoint")
    first = next(iter(values.values()))
    for name, value in values.items():
        require_file_name(name, "activations: hookpoint")
        if value.dim() != 2 or not value.shape[1] or len(value) != len(first) or value.dtype != first.dtype:
            raise SaetrainError(
                f"activations: {name} has shape {tuple(value.shape)} and type {value.dtype}; it must have shape "
                "(N, D), with the same N and type at all hookpoints"
            )
    names = [name for name, dtype in DTYPES.items() if dtype is first.dtype]
    if not names:
        raise SaetrainError(f"activations: found {first.dtype}; allowed are {', '.join(DTYPES)}")
    return StoreMetadata(hookpoints={name: value.shape[1] for name, value in values.items()}, dtype=names[0])


def _convert_column(name: str, given: Any, n_tokens: int) -> np.ndarray:
    """Return a column with the type of the format; -1 if none is given."""
    if given is None:
        return np.full(n_tokens, -1, dtype=COLUMNS[name])
    found = np.asarray(given)
    if found.shape != (n_tokens,) or found.dtype.kind not in "iu":
        raise SaetrainError(
            f"{name}: has shape {found.shape} and type {found.dtype}; it must be a whole number for each of the "
            f"{n_tokens} tokens"
        )
    if n_tokens and found.max() > np.iinfo(np.dtype(COLUMNS[name])).max:
        raise SaetrainError(f"{name}: {found.max()} does not fit into {np.dtype(COLUMNS[name])}")
    return found.astype(COLUMNS[name])
