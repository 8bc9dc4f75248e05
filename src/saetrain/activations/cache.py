"""Cache of activations: model batches that a run has computed are read by the next run with the same model.

A batch is identified by its token ids and their layout, because nothing else in the text affects its activations. It is
stored before tokens are selected, so runs may differ in token policy, norm limits, seed, buffer, order and length.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from torch import Tensor

from saetrain.activations.cache_files import lock_cache, make_room, mark_used
from saetrain.activations.cache_key import hash_batch, name_folder
from saetrain.activations.store import (
    METADATA_FILE,
    Shard,
    StoreMetadata,
    Unit,
    list_shards,
    write_metadata,
    write_shard,
)
from saetrain.async_copy import PendingCopy
from saetrain.errors import SaetrainError
from saetrain.types import ModelBatch

SHARD_BYTES = 64 << 20
"""Size at which new units are written."""
MIN_SHARDS = 8
"""A small cache has at least that many shards, so that it does not lose everything at once."""
MAX_PENDING_WRITES = 2
"""Number of shards in memory that wait to be written, before the model waits for the disk."""


class ActivationCache:
    """Stored batches of one model and set of hookpoints, in a folder below ``cache_dir``.

    One thread reads batches ahead, and another one writes new batches. ``max_bytes``: size of all of ``cache_dir``.
    ``log`` is called with one line if a shard is damaged or if no more is stored. ``n_read`` and ``n_computed`` count
    tokens. Raises SaetrainError if the folder can't be written.
    """

    def __init__(
        self,
        cache_dir: Path,
        metadata: StoreMetadata,
        max_bytes: int,
        log: Callable[[str], None],
        *,
        pin_memory: bool = False,
    ) -> None:
        self.folder = cache_dir / name_folder(metadata)
        self._cache_dir, self._metadata, self._max_bytes, self._log = cache_dir, metadata, max_bytes, log
        self._pin_memory, self._opened_at, self._is_storing = pin_memory, time.time(), True
        self._shard_bytes = min(SHARD_BYTES, max_bytes // MIN_SHARDS)
        self._paths: set[Path] = set()
        self._used_paths: set[Path] = set()
        self._places: dict[bytes, tuple[Shard, int]] = {}
        self._unwritten: dict[bytes, tuple[ModelBatch, dict[str, PendingCopy]]] = {}
        self._next_shard: list[bytes] = []
        self._next_shard_bytes = 0
        self._reads: dict[bytes, Future[dict[str, Tensor] | None]] = {}
        self._writes: list[Future[None]] = []
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cache-reader")
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="cache-writer")
        self.n_read = self.n_computed = 0
        try:
            cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            with lock_cache(cache_dir):
                self._create_folder()
        except OSError as error:
            raise SaetrainError(f"--cache_dir {cache_dir}: can't be written: {error.strerror or error}") from error
        self._find_shards()

    @property
    def n_stored(self) -> int:
        """Number of tokens that are stored for this model and these hookpoints."""
        return sum(len(shard) for shard in {shard.path: shard for shard, _ in self._places.values()}.values())

    def _create_folder(self) -> None:
        self.folder.mkdir(mode=0o700, exist_ok=True)
        if not (self.folder / METADATA_FILE).exists():
            write_metadata(self.folder, self._metadata)

    def _find_shards(self) -> None:
        """Register the shards that this or other processes have written."""
        for path in list_shards(self.folder):
            if path not in self._paths:
                try:
                    self._register_shard(Shard(path, self._metadata))
                except SaetrainError as error:
                    self._delete_damaged(path, error)
                except OSError:
                    # Another process has deleted it.
                    continue

    def _register_shard(self, shard: Shard) -> None:
        self._paths.add(shard.path)
        for number, unit in enumerate(shard.hashes):
            self._places.setdefault(unit, (shard, number))

    def _forget_shard(self, shard: Shard) -> None:
        for unit in shard.hashes:
            if self._places.get(unit, (None, 0))[0] is shard:
                self._places.pop(unit, None)

    def _delete_damaged(self, path: Path, error: SaetrainError) -> None:
        self._log(f"activation cache: {error}; the file is deleted, and its activations are computed again")
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)

    def read_batch(self, batch: ModelBatch) -> dict[str, Tensor] | None:
        """Return {hookpoint: (N, D)} of all tokens of a batch, on the host, or None if they are not stored."""
        unit = hash_batch(batch)
        future, unwritten = self._reads.pop(unit, None), self._unwritten.get(unit)
        if unwritten is not None:
            values: dict[str, Tensor] | None = {name: copy.get() for name, copy in unwritten[1].items()}
        else:
            values = self._read_unit(unit) if future is None else future.result()
        if values is not None:
            self.n_read += sum(map(len, batch))
        return values

    def _read_unit(self, unit: bytes) -> dict[str, Tensor] | None:
        shard, number = self._places.get(unit, (None, 0))
        if shard is None:
            return None
        if shard.path not in self._used_paths:
            self._used_paths.add(shard.path)
            mark_used(shard.path)
        try:
            return shard.read_unit(number, pin_memory=self._pin_memory)
        except SaetrainError as error:
            self._forget_shard(shard)
            self._delete_damaged(shard.path, error)
        except OSError:
            # Another process has deleted it to make room.
            self._forget_shard(shard)
        return None

    def prefetch_batches(self, batches: Iterable[ModelBatch]) -> None:
        """Start to read the stored ones among ``batches``, which are kept in memory until they are requested."""
        for unit in map(hash_batch, batches):
            if unit in self._places and unit not in self._reads:
                self._reads[unit] = self._reader.submit(self._read_unit, unit)

    def add_batch(self, batch: ModelBatch, values: dict[str, Tensor]) -> None:
        """Store {hookpoint: (N, D)} of all tokens of a batch; the tensors must not change afterwards."""
        unit = hash_batch(batch)
        self.n_computed += sum(map(len, batch))
        if not self._is_storing or unit in self._unwritten or unit in self._places:
            return
        self._unwritten[unit] = batch, {name: PendingCopy(value) for name, value in values.items()}
        self._next_shard.append(unit)
        self._next_shard_bytes += sum(value.nbytes for value in values.values())
        if self._next_shard_bytes >= self._shard_bytes:
            self._start_write()

    def _start_write(self) -> None:
        if self._next_shard:
            self._writes.append(self._writer.submit(self._write_units, self._next_shard))
        self._next_shard, self._next_shard_bytes = [], 0
        while len(self._writes) > MAX_PENDING_WRITES:
            self._writes.pop(0).result()

    def _write_units(self, units: list[bytes]) -> None:
        """Write a shard with the units that no process has stored yet."""
        try:
            with lock_cache(self._cache_dir):
                self._create_folder()
                self._find_shards()
                new = [self._build_unit(unit) for unit in units if unit not in self._places]
                n_bytes = self._metadata.bytes_per_token * sum(map(len, new))
                if not make_room(self._cache_dir, n_bytes, self._max_bytes, self._opened_at):
                    self._stop_storing(f"is full ({self._max_bytes:,} bytes in use by this run); raise --cache_size")
                elif new:
                    self._register_shard(write_shard(self.folder, self._metadata, new))
        except OSError as error:
            self._stop_storing(f"can't be written ({error.strerror or error})")
        finally:
            for unit in units:
                self._unwritten.pop(unit, None)

    def _build_unit(self, unit: bytes) -> Unit:
        batch, copies = self._unwritten[unit]
        columns = {
            "ids": np.concatenate([sequence.ids for sequence in batch]),
            "position": np.concatenate([np.arange(len(sequence), dtype=np.int32) for sequence in batch]),
            "doc": np.concatenate([sequence.doc for sequence in batch]),
        }
        return Unit(unit, {name: copy.get() for name, copy in copies.items()}, columns)

    def _stop_storing(self, problem: str) -> None:
        if self._is_storing:
            self._is_storing = False
            self._log(f"activation cache {self._cache_dir}: {problem}; new activations are not stored")

    def close(self) -> None:
        """Write the units that are still in memory, and end both threads."""
        self._start_write()
        self._reader.shutdown(cancel_futures=True)
        self._writer.shutdown()
