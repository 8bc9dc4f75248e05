"""Reading text ahead: one thread reads what a shard's next pool will hold while the step runs."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from saetrain.types import Cursor, TokenSequence

ReadResult = tuple[list[TokenSequence], Cursor]


class SequenceSource(Protocol):
    """What the buffer needs of the text (``data/loader.py`` says what each member promises)."""

    start_cursor: Cursor

    def read(self, shard: int, cursor: Cursor, tokens: int) -> ReadResult:
        """The shard's next sequences with that many kept tokens, and the cursor behind them."""

    def hint_cursors(self, cursors: Mapping[int, Cursor]) -> None:
        """Which shards will be read from where."""


class Prefetcher:
    """All reads of ``source``, by one thread in turn; what is read ahead changes nothing but time.

    For what a source gives is a function of (shard, cursor, tokens) alone, a read that turns out to be another than
    was expected is simply done.
    """

    def __init__(self, source: SequenceSource) -> None:
        self._source = source
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self._prefetches: dict[int, tuple[tuple[Cursor, int], Future[ReadResult]]] = {}

    def read(self, shard: int, cursor: Cursor, tokens: int) -> ReadResult:
        """As the source's, with its errors."""
        key, future = self._prefetches.pop(shard, (None, None))
        if future is not None and key == (cursor, tokens):
            return future.result()
        if future is not None:
            future.cancel()
        return self._thread.submit(self._source.read, shard, cursor, tokens).result()

    def is_ready(self, shard: int, cursor: Cursor, tokens: int) -> bool:
        """Whether :meth:`read` would give this at once, and without an error."""
        key, future = self._prefetches.get(shard, (None, None))
        if future is None or key != (cursor, tokens) or not future.done() or future.cancelled():
            return False
        return future.exception() is None

    def start_prefetch(self, shard: int, cursor: Cursor, tokens: int) -> None:
        """Begin to read what the shard will need next."""
        self._prefetches[shard] = (cursor, tokens), self._thread.submit(self._source.read, shard, cursor, tokens)

    def close(self) -> None:
        """End the thread as soon as the read under way is done; none that was expected begins any more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def cancel_prefetches(self) -> None:
        """Drop what was expected."""
        for _, future in self._prefetches.values():
            future.cancel()
        self._prefetches.clear()
