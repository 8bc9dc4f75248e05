"""Activations of a folder in place of a model: what a run needs of a model, without one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saetrain.activations.model import DTYPES, BaseModel
from saetrain.activations.store import Shard, list_shards, read_metadata
from saetrain.errors import SaetrainError
from saetrain.types import ModelBatch, TokenSequence


@dataclass(frozen=True)
class StoredSequence(TokenSequence):
    """Tokens of a stored unit: ``rows`` (S,) int64 are their numbers in unit number ``unit``."""

    unit: int
    rows: np.ndarray


class ActivationStore:
    """The units of a folder of activations in order; SaetrainError if the folder is not one, or is damaged.

    ``lengths`` (U,) int64: tokens per unit.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.metadata = folder, read_metadata(folder)
        try:
            shards = [Shard(path, self.metadata) for path in list_shards(folder)]
        except OSError as error:
            raise SaetrainError(f"activations {folder}: can't be read: {error.strerror or error}") from error
        self._units = [(shard, number) for shard in shards for number in range(len(shard.hashes))]
        self.lengths = np.concatenate([np.zeros(0, np.int64), *(np.diff(shard.offsets) for shard in shards)])
        digest = hashlib.sha256(repr(self.metadata).encode())
        for shard in shards:
            digest.update(shard.checksums.tobytes())
        self.fingerprint = digest.hexdigest()

    def read_columns(self, unit: int) -> dict[str, np.ndarray]:
        """Return {column: (N,)} of a unit; SaetrainError if it is damaged."""
        shard, number = self._units[unit]
        return shard.read_columns(number)

    def read_values(self, sequence: StoredSequence, *, pin_memory: bool = False) -> dict[str, Tensor]:
        """Return {hookpoint: (S, D)} of the tokens of ``sequence``; SaetrainError if the unit is damaged."""
        shard, number = self._units[sequence.unit]
        values = shard.read_unit(number, pin_memory=pin_memory)
        if len(sequence) == self.lengths[sequence.unit]:
            return values
        rows = torch.from_numpy(sequence.rows)
        return {name: value.index_select(0, rows) for name, value in values.items()}


class StoredCapture:
    """Replaces the capture of a model whose activations are stored: ``hookpoints``, and ``widths`` {hookpoint: D}."""

    def __init__(self, store: ActivationStore, hookpoints: list[str], device: torch.device) -> None:
        self.hookpoints = hookpoints
        self.widths = {name: store.metadata.hookpoints[name] for name in hookpoints}
        self.model = BaseModel(
            module=_StoredModule(),
            name=str(store.folder),
            config=_StoredConfig(store.fingerprint),
            causal=False,
            max_positions=None,
            device=device,
            dtype=DTYPES[store.metadata.dtype],
            revision=None,
        )

    def __call__(self, ids_BS: Tensor, mask_BS: Tensor) -> dict[str, Tensor]:
        """Never called, because all batches are stored."""
        raise AssertionError("stored activations have no model")


class _StoredModule(nn.Module):
    """A module without weights, which takes no time."""

    def forward(self, **inputs: Tensor) -> None:
        return None


@dataclass(frozen=True)
class _StoredConfig:
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """Return what identifies the activations."""
        return {"activations": self.fingerprint}


class StoredBatches:
    """Reads batches of :class:`StoredSequence` for the extractor; a thread reads ahead."""

    def __init__(self, store: ActivationStore, *, pin_memory: bool) -> None:
        self._store, self._pin_memory = store, pin_memory
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="activation-reader")
        self._reads: dict[tuple[int, ...], Future[dict[str, Tensor]]] = {}

    def read_batch(self, batch: ModelBatch) -> dict[str, Tensor]:
        """Return {hookpoint: (N, D)} of all tokens of a batch, on the host."""
        future = self._reads.pop(_identify_batch(batch), None)
        return self._read_batch(batch) if future is None else future.result()

    def _read_batch(self, batch: ModelBatch) -> dict[str, Tensor]:
        parts = []
        for sequence in batch:
            assert isinstance(sequence, StoredSequence)
            parts.append(self._store.read_values(sequence, pin_memory=self._pin_memory))
        return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def prefetch_batches(self, batches: Iterable[ModelBatch]) -> None:
        """Start to read the batches, which are kept in memory until they are requested."""
        for batch in batches:
            key = _identify_batch(batch)
            if key not in self._reads:
                self._reads[key] = self._reader.submit(self._read_batch, batch)

    def add_batch(self, batch: ModelBatch, values: dict[str, Tensor]) -> None:
        """Never called, because all batches are stored."""
        raise AssertionError("stored activations have no model")

    def close(self) -> None:
        """End the thread."""
        self._reader.shutdown(cancel_futures=True)


def _identify_batch(batch: ModelBatch) -> tuple[int, ...]:
    # A unit has at most one training sequence and one held-out sequence, which differ in their first row.
    return tuple(
        number for each in batch if isinstance(each, StoredSequence) for number in (each.unit, int(each.rows[0]))
    )
