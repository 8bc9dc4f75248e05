"""Prefetch: a thread reads the text of the shards' next pools while the training step runs."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from saetrain.types import Cursor, ModelBatch

ReadResult = tuple[list[ModelBatch], Cursor]


class SequenceSource(Protocol):
    """Interface of a source of sequences, implemented and documented in ``data/sharded.py``."""

    start_cursor: Cursor

    def read(self, shard: int, cursor: Cursor, tokens: int) -> ReadResult:
        """Return the shard's next batches with ``tokens`` kept tokens, and the cursor after them."""

    def hint_cursors(self, cursors: Mapping[int, Cursor]) -> None:
        """Announce which shards will be read, and from which cursor."""


class Prefetcher:
    """Does all reads of ``source`` in one thread.

    The result of a read depends only on (shard, cursor, tokens). Therefore prefetching affects only time, and a read
    that was not prefetched is simply done when it is requested.
    """

    def __init__(self, source: SequenceSource) -> None:
        self._source = source
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._prefetches: dict[int, tuple[tuple[Cursor, int], Future[ReadResult]]] = {}

    def read(self, shard: int, cursor: Cursor, tokens: int) -> ReadResult:
        """Return the result of ``source.read``, or raise its error; uses the prefetched result if there is one."""
        key, future = self._prefetches.pop(shard, (None, None))
        if future is not None and key == (cursor, tokens):
            return future.result()
        if future is not None:
            future.cancel()
        return self._thread.submit(self._source.read, shard, cursor, tokens).result()

    def is_ready(self, shard: int, cursor: Cursor, tokens: int) -> bool:
        """Return whether :meth:`read` with these arguments would return immediately and without an error."""
        return self.peek_batches(shard, cursor, tokens) is not None

    def peek_batches(self, shard: int, cursor: Cursor, tokens: int) -> list[ModelBatch] | None:
        """Return the batches that :meth:`read` would return, which still returns them, or None if it is not ready."""
        key, future = self._prefetches.get(shard, (None, None))
        if future is None or key != (cursor, tokens) or not future.done() or future.cancelled():
            return None
        return None if future.exception() is not None else future.result()[0]

    def start_prefetch(self, shard: int, cursor: Cursor, tokens: int) -> None:
        """Start to read what the shard will need next."""
        self._prefetches[shard] = (cursor, tokens), self._thread.submit(self._source.read, shard, cursor, tokens)

    def close(self) -> None:
        """Cancel pending reads and end the thread after the current read, without waiting for it."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def cancel_prefetches(self) -> None:
        """Cancel and forget all prefetched reads."""
        for _, future in self._prefetches.values():
            future.cancel()
        self._prefetches.clear()
