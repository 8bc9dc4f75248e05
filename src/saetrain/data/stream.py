"""Text that is read from front to back while training, in an order of our own that survives a restart.

The rows come in blocks of BLOCK_ROWS in the stream's order; block b belongs to virtual shard b mod V, is tokenized and
packed on its own, and its sequences are mixed by a seed of its own. So what a shard gives depends on the rows and the
cursor alone, and a cursor (ordinal of the block within the shard, index in the block) is found again by opening the
stream anew. The library's shuffle buffer is not used: it is lost at a restart.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np

from saetrain.data.loader import NO_KEPT_TOKEN, LoaderSettings, ShardedSource
from saetrain.data.rows import BAD_ROW, BadRow
from saetrain.data.sequences import TokenTable, batch_table, sequences_of
from saetrain.data.text import Batch
from saetrain.data.tokenize import Framing
from saetrain.errors import SaetrainError
from saetrain.types import Cursor, TokenSequence

BLOCK_ROWS = 32
PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""Seconds before each further try to read a row."""
LIBRARY_RETRIES = {
    "STREAMING_READ_MAX_RETRIES": 1,
    "STREAMING_READ_RETRY_INTERVAL": 0,
    "STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL": 0,
    "STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL": 0,
    "STREAMING_OPEN_MAX_RETRIES": 1,
    "STREAMING_OPEN_RETRY_INTERVAL": 0,
}
"""The library would try for minutes, in which no wish to stop is heard."""

Row = dict[str, Any]
Encode = Callable[[Batch, list[int]], Batch]


class StreamedRows:
    """The rows of a stream from any number on; where it fails it is opened again, and in the end given up."""

    def __init__(self, rows: Any, name: str, say: Callable[[str], None], diagnose: Callable[[], BadRow | None]) -> None:
        self._rows, self._name, self._say, self._diagnose = rows, name, say, diagnose
        import datasets

        for setting, value in LIBRARY_RETRIES.items():
            setattr(datasets.config, setting, value)
        self._bad: set[int] = set()
        self.check: Callable[[], None] = lambda: None
        """Called while waiting; may raise to give up."""

    def __call__(self, first: int) -> Iterator[Row]:
        """Rows number ``first`` and on, until the stream ends."""
        at, failures = first, 0
        while True:
            try:
                for row in self._rows.skip(at) if at else self._rows:
                    if row.get(BAD_ROW):
                        self._count_bad(at, row[BAD_ROW])
                    at, failures = at + 1, 0
                    yield row
                return
            except SaetrainError:
                raise
            except Exception as error:  # file systems, HTTP libraries and parsers all raise types of their own
                self._pause(at, failures, error)
                failures += 1

    def _pause(self, at: int, failures: int, error: Exception) -> None:
        """Wait for the next try; SaetrainError when a row is broken for good, or after the last try."""
        bad = self._diagnose()
        if bad is not None:
            raise SaetrainError(
                f"data set {self._name}: could not be read: {bad}; --skip_bad_rows leaves such rows out"
            ) from error
        shown = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        if failures == len(PAUSES_S):
            raise SaetrainError(
                f"data set {self._name}: row {at} (from 0) could not be read in {failures + 1} tries; the last error "
                f"was {shown}. What is saved is whole: start again with --resume when the source is back"
            ) from error
        self._say(f"data set {self._name}: reading row {at} failed ({shown}); again in {PAUSES_S[failures]:g} s")
        again = time.monotonic() + PAUSES_S[failures]
        while time.monotonic() < again:
            self.check()
            time.sleep(0.05)

    def _count_bad(self, at: int, problem: str) -> None:
        if at in self._bad:  # every pass meets the same ones again
            return
        self._bad.add(at)
        count = len(self._bad)
        if str(count).strip("0") == "1":
            self._say(f"data set {self._name}: {count} bad rows left out so far, the last: {problem}")


class BlockReader:
    """The blocks of the endlessly repeated stream by number, read forwards, with those met on the way kept."""

    def __init__(self, rows: StreamedRows, name: str, n_shards: int) -> None:
        self._rows, self._name, self._n_shards = rows, name, n_shards
        self._real: int | None = None
        self.period: int | None = None
        """Blocks in a pass, empty ones at its end included; None until the stream's end was seen."""
        self._iterator: Iterator[Row] | None = None
        self._at, self._opened_at = 0, 0
        self.waiting: dict[int, list[Row]] = {}

    def index(self, number: int) -> int:
        """The block's number within its pass."""
        return number % self.period if self.period is not None else number

    def get(self, number: int, lowest: int, wanted: Callable[[int], bool]) -> list[Row]:
        """Rows of block ``number``; if the stream has to be opened again it is at block ``lowest`` or before.

        Blocks that ``wanted`` names wait in memory, for the caller to drop.
        """
        if number not in self.waiting and (self._iterator is None or number < self._at):
            self._open(min(lowest, number))
        while number not in self.waiting:
            rows, met = self._next(), self._at - 1
            if met == number or wanted(met):
                self.waiting[met] = rows
        return self.waiting[number]

    def _open(self, number: int) -> None:
        self._at = self._opened_at = number
        index = self.index(number)
        self._iterator = self._rows(index * BLOCK_ROWS) if self._real is None or index < self._real else iter(())

    def _next(self) -> list[Row]:
        if self.period is not None and self.index(self._at) == 0:
            self._open(self._at)
        assert self._iterator is not None
        self._rows.check()
        rows = list(islice(self._iterator, BLOCK_ROWS))
        if self.period is None and len(rows) < BLOCK_ROWS:
            # Opened behind its end, a stream does not say where that was.
            seen = bool(rows) or self._at == 0 or self._at > self._opened_at
            self._end(self._at * BLOCK_ROWS + len(rows) if seen else None)
            if not rows:
                self._open(self._at)
                return self._next()
        self._at += 1
        return rows

    def _end(self, total: int | None) -> None:
        """The stream has ended behind ``total`` rows (None: somewhere before the row at which it was opened)."""
        if total is None:
            total = sum(1 for _ in self._rows(0))
        if total == 0:
            raise SaetrainError(f"data set {self._name}: it has no rows")
        self._real = -(-total // BLOCK_ROWS)
        # Without a common divisor, every shard meets every block sooner or later.
        self.period = self._real
        while math.gcd(self.period, self._n_shards) > 1:
            self.period += 1


class StreamedSequences(ShardedSource):
    """The sequences of a stream.

    ``encode`` tokenizes a batch of rows (``row_encoder``); those for which ``held_out`` is true are left out, wherever
    they occur.
    """

    start: Cursor = (0, 0)

    def __init__(
        self,
        rows: StreamedRows,
        name: str,
        encode: Encode,
        held_out: Callable[[TokenTable], np.ndarray],
        framing: Framing,
        *,
        loader: LoaderSettings,
        exclude_special: bool,
        exclude_first: bool,
    ) -> None:
        super().__init__(loader.data_shards, exclude_special, exclude_first)
        self._rows = rows
        self._blocks = BlockReader(rows, name, self.n_shards)
        self._encode, self._held_out, self._framing = encode, held_out, framing
        self._seed, self._exclude_special = loader.shuffle_seed, exclude_special
        self._expected = dict.fromkeys(range(self.n_shards), 0)
        self._current: dict[int, tuple[int, list[TokenSequence]]] = {}

    def expect(self, cursors: Mapping[int, Cursor]) -> None:
        """Of other shards no block waits in memory, and the stream is opened where the first of these needs it."""
        self._expected = {shard: cursor[0] for shard, cursor in cursors.items()}
        self._forget()

    def interrupt_by(self, check: Callable[[], None]) -> None:
        """Call ``check``, which may raise, while the stream is read or waited for."""
        self._rows.check = check

    def _forget(self) -> None:
        self._blocks.waiting = {number: rows for number, rows in self._blocks.waiting.items() if self._wanted(number)}

    def _wanted(self, number: int) -> bool:
        ordinal, shard = divmod(number, self.n_shards)
        return shard in self._expected and ordinal >= self._expected[shard]

    def read(self, shard: int, cursor: Cursor, tokens: int) -> tuple[list[TokenSequence], Cursor]:
        """The shard's sequences from ``cursor`` on until they hold ``tokens`` kept tokens, and the next cursor."""
        out: list[TokenSequence] = []
        held, empty = 0, 0
        ordinal, index = cursor
        while held < tokens:
            sequences = self._sequences(shard, ordinal)
            if index >= len(sequences):
                ordinal, index, empty = ordinal + 1, 0, empty + 1
                period = self._blocks.period
                if period is not None and empty > 2 * period:
                    raise SaetrainError(NO_KEPT_TOKEN)
                continue
            kept = int(self.keep(sequences[index]).sum())
            out.append(sequences[index])
            held, index = held + kept, index + 1
            empty = 0 if kept else empty
        return out, (ordinal, index)

    def _sequences(self, shard: int, ordinal: int) -> list[TokenSequence]:
        """The sequences of the shard's block, in their mixed order."""
        if self._current.get(shard, (None,))[0] != ordinal:
            number = ordinal * self.n_shards + shard
            self._expected[shard] = ordinal
            lowest = min(first * self.n_shards + other for other, first in self._expected.items())
            rows = self._blocks.get(number, lowest, self._wanted)
            self._forget()
            sequences = self._frame(self._blocks.index(number) * BLOCK_ROWS, rows)
            order = np.random.default_rng([self._seed, number]).permutation(len(sequences))
            self._current[shard] = ordinal, [sequences[position] for position in order]
        return self._current[shard][1]

    def _frame(self, first: int, rows: list[Row]) -> list[TokenSequence]:
        if not rows:
            return []
        batch = self._encode(columns_of(rows), list(range(first, first + len(rows))))
        table = batch_table(batch)
        kept = np.flatnonzero(~self._held_out(table))
        sequences = sequences_of(table, kept, self._framing, self._exclude_special)
        return [sequences[number] for number in range(len(sequences))]


def encoded_blocks(rows: StreamedRows, encode: Encode) -> Iterator[Batch]:
    """One pass over the stream, tokenized in the same blocks."""
    iterator, first = rows(0), 0
    while block := list(islice(iterator, BLOCK_ROWS)):
        yield encode(columns_of(block), list(range(first, first + len(block))))
        first += len(block)


def columns_of(rows: list[Row]) -> Batch:
    """The same rows as {column: values}; a column that a row lacks is None there."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}
