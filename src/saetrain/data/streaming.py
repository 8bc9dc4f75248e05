"""Streamed text: it is read from start to end while training, in an order that can be continued after a restart.

The stream is cut into blocks of BLOCK_ROWS rows. Block b belongs to virtual shard b mod V. Each block is tokenized and
packed separately, its sequences are grouped into model batches, and these are shuffled with a seed per block.
Therefore the batches of a shard depend only on the rows and the cursor (number of the block within the shard, index in
the block), and a restart finds the cursor by reading the stream again. The shuffle buffer of `datasets` is not used
because its content is lost at a restart.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np

from saetrain.data.lenient_readers import BAD_ROW_COLUMN, BadRow
from saetrain.data.packing import TokenTable, build_sequences, build_token_table
from saetrain.data.sharded import NO_KEPT_TOKEN, LoaderSettings, ShardedSource
from saetrain.data.text_column import Rows
from saetrain.data.tokenize import Framing
from saetrain.distributed import record_progress
from saetrain.errors import SaetrainError
from saetrain.types import Cursor, ModelBatch, TokenSequence, batch_by_length

BLOCK_ROWS = 32
RETRY_DELAYS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""Seconds to wait before each retry of reading a row."""
LIBRARY_RETRIES = {
    "STREAMING_READ_MAX_RETRIES": 1,
    "STREAMING_READ_RETRY_INTERVAL": 0,
    "STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL": 0,
    "STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL": 0,
    "STREAMING_OPEN_MAX_RETRIES": 1,
    "STREAMING_OPEN_RETRY_INTERVAL": 0,
}
"""Settings of `datasets` that switch off its own retries, which take minutes and ignore preemption."""

Row = dict[str, Any]
RowEncoder = Callable[[Rows, list[int]], Rows]


class StreamedRows:
    """The rows of a stream from any row number on.

    If reading fails, the stream is opened again after each of RETRY_DELAYS_S; then SaetrainError is raised.
    """

    def __init__(
        self, rows: Any, name: str, log: Callable[[str], None], find_bad_row: Callable[[], BadRow | None]
    ) -> None:
        self._rows, self._name, self._log, self._find_bad_row = rows, name, log, find_bad_row
        import datasets

        for setting, value in LIBRARY_RETRIES.items():
            setattr(datasets.config, setting, value)
        self._bad_rows: set[int] = set()
        self.check_interrupt: Callable[[], None] = lambda: None
        """Called while waiting; may raise to stop."""

    def __call__(self, first: int) -> Iterator[Row]:
        """Yield the rows from number ``first`` on, until the stream ends."""
        row_number, failures = first, 0
        while True:
            try:
                for row in self._rows.skip(row_number) if row_number else self._rows:
                    if row.get(BAD_ROW_COLUMN):
                        self._count_bad_row(row_number, row[BAD_ROW_COLUMN])
                    row_number, failures = row_number + 1, 0
                    record_progress()
                    yield row
                return
            except SaetrainError:
                raise
            except Exception as error:  # file systems, HTTP libraries and parsers raise many unrelated types
                self._wait_before_retry(row_number, failures, error)
                failures += 1

    def _wait_before_retry(self, row_number: int, failures: int, error: Exception) -> None:
        """Wait for the next retry; SaetrainError when a local row can't be read, or after the last retry."""
        bad = self._find_bad_row()
        if bad is not None:
            raise SaetrainError(
                f"data set {self._name}: could not be read: {bad}; --skip_bad_rows skips such rows"
            ) from error
        error_text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        if failures == len(RETRY_DELAYS_S):
            raise SaetrainError(
                f"data set {self._name}: row {row_number} (from 0) could not be read in {failures + 1} tries; the last "
                f"error was {error_text}. Saved checkpoints are intact: continue with --resume when the source is back"
            ) from error
        self._log(
            f"data set {self._name}: reading row {row_number} failed ({error_text}); "
            f"retrying in {RETRY_DELAYS_S[failures]:g} s"
        )
        retry_time = time.monotonic() + RETRY_DELAYS_S[failures]
        while time.monotonic() < retry_time:
            self.check_interrupt()
            time.sleep(0.05)

    def _count_bad_row(self, row_number: int, problem: str) -> None:
        if row_number in self._bad_rows:  # each pass reads the same bad rows again
            return
        self._bad_rows.add(row_number)
        count = len(self._bad_rows)
        if str(count).strip("0") == "1":
            self._log(f"data set {self._name}: {count} bad rows skipped so far, the last: {problem}")


class BlockReader:
    """Reads blocks of the endlessly repeated stream by number.

    The stream is read forwards. Blocks that are read on the way and needed later wait in ``waiting_blocks``.
    """

    def __init__(self, rows: StreamedRows, name: str, n_shards: int) -> None:
        self._rows, self._name, self._n_shards = rows, name, n_shards
        self._n_blocks: int | None = None
        self.blocks_per_pass: int | None = None
        """Blocks per pass, including empty blocks at its end; None until the end of the stream was reached."""
        self._iterator: Iterator[Row] | None = None
        self._next_number, self._opened_number = 0, 0
        self.waiting_blocks: dict[int, list[Row]] = {}

    def index_in_pass(self, number: int) -> int:
        """Return the block's number within its pass."""
        return number % self.blocks_per_pass if self.blocks_per_pass is not None else number

    def read_block(self, number: int, lowest: int, is_wanted: Callable[[int], bool]) -> list[Row]:
        """Return the rows of block ``number``.

        If the stream must be opened again, it is opened at block ``lowest`` or ``number``, whichever comes first.
        Blocks for which ``is_wanted`` is true are kept in ``waiting_blocks`` until the caller removes them.
        """
        if number not in self.waiting_blocks and (self._iterator is None or number < self._next_number):
            self._open_stream(min(lowest, number))
        while number not in self.waiting_blocks:
            rows, read_number = self._read_next_block(), self._next_number - 1
            if read_number == number or is_wanted(read_number):
                self.waiting_blocks[read_number] = rows
        return self.waiting_blocks[number]

    def _open_stream(self, number: int) -> None:
        self._next_number = self._opened_number = number
        index = self.index_in_pass(number)
        self._iterator = (
            self._rows(index * BLOCK_ROWS) if self._n_blocks is None or index < self._n_blocks else iter(())
        )

    def _read_next_block(self) -> list[Row]:
        if self.blocks_per_pass is not None and self.index_in_pass(self._next_number) == 0:
            self._open_stream(self._next_number)
        assert self._iterator is not None
        self._rows.check_interrupt()
        rows = list(islice(self._iterator, BLOCK_ROWS))
        if self.blocks_per_pass is None and len(rows) < BLOCK_ROWS:
            # A stream that was opened after its end does not show where the end is.
            end_seen = bool(rows) or self._next_number == 0 or self._next_number > self._opened_number
            self._set_stream_end(self._next_number * BLOCK_ROWS + len(rows) if end_seen else None)
            if not rows:
                self._open_stream(self._next_number)
                return self._read_next_block()
        self._next_number += 1
        return rows

    def _set_stream_end(self, n_rows: int | None) -> None:
        """Set the length of the stream, in rows. None: it is unknown, so the rows are counted."""
        if n_rows is None:
            n_rows = sum(1 for _ in self._rows(0))
        if n_rows == 0:
            raise SaetrainError(f"data set {self._name}: has no rows")
        self._n_blocks = -(-n_rows // BLOCK_ROWS)
        # Without a common divisor with the number of shards, every shard reads every block over several passes.
        self.blocks_per_pass = self._n_blocks
        while math.gcd(self.blocks_per_pass, self._n_shards) > 1:
            self.blocks_per_pass += 1


class StreamedSequences(ShardedSource):
    """Source over a stream. The cursor is (number of the block within the shard, index in the block).

    ``encode`` tokenizes a batch of rows (:func:`build_row_encoder`). Rows for which ``is_held_out`` is true are
    skipped wherever they occur.
    """

    start_cursor: Cursor = (0, 0)

    def __init__(
        self,
        rows: StreamedRows,
        name: str,
        encode: RowEncoder,
        is_held_out: Callable[[TokenTable], np.ndarray],
        framing: Framing,
        *,
        loader: LoaderSettings,
        exclude_special: bool,
        exclude_first: bool,
        batch_tokens: int,
    ) -> None:
        super().__init__(loader.data_shards, exclude_special, exclude_first)
        self._rows, self._batch_tokens = rows, batch_tokens
        self._blocks = BlockReader(rows, name, self.n_shards)
        self._encode, self._is_held_out, self._framing = encode, is_held_out, framing
        self._seed, self._exclude_special = loader.shuffle_seed, exclude_special
        self._expected_ordinals = dict.fromkeys(range(self.n_shards), 0)
        self._current_blocks: dict[int, tuple[int, list[ModelBatch]]] = {}

    def hint_cursors(self, cursors: Mapping[int, Cursor]) -> None:
        """Keep only blocks of these shards in memory, and open the stream at the first block that they need."""
        self._expected_ordinals = {shard: cursor[0] for shard, cursor in cursors.items()}
        self._discard_unwanted_blocks()

    def set_interrupt_check(self, check: Callable[[], None]) -> None:
        """Call ``check``, which may raise, while the stream is read or waited for."""
        self._rows.check_interrupt = check

    def _discard_unwanted_blocks(self) -> None:
        self._blocks.waiting_blocks = {
            number: rows for number, rows in self._blocks.waiting_blocks.items() if self._is_wanted(number)
        }

    def _is_wanted(self, number: int) -> bool:
        ordinal, shard = divmod(number, self.n_shards)
        return shard in self._expected_ordinals and ordinal >= self._expected_ordinals[shard]

    def read(self, shard: int, cursor: Cursor, tokens: int) -> tuple[list[ModelBatch], Cursor]:
        """Read the shard's batches from ``cursor`` on, as :meth:`ShardedSource.read`."""
        out: list[ModelBatch] = []
        held, empty = 0, 0
        ordinal, index = cursor
        while held < tokens:
            batches = self._load_block(shard, ordinal)
            if index >= len(batches):
                ordinal, index, empty = ordinal + 1, 0, empty + 1
                blocks_per_pass = self._blocks.blocks_per_pass
                if blocks_per_pass is not None and empty > 2 * blocks_per_pass:
                    raise SaetrainError(NO_KEPT_TOKEN)
                continue
            kept = self.count_kept(batches[index])
            out.append(batches[index])
            held, index = held + kept, index + 1
            empty = 0 if kept else empty
        return out, (ordinal, index)

    def _load_block(self, shard: int, ordinal: int) -> list[ModelBatch]:
        """Return the batches of a block of the shard, in shuffled order."""
        if self._current_blocks.get(shard, (None,))[0] != ordinal:
            number = ordinal * self.n_shards + shard
            self._expected_ordinals[shard] = ordinal
            lowest = min(first * self.n_shards + other for other, first in self._expected_ordinals.items())
            rows = self._blocks.read_block(number, lowest, self._is_wanted)
            self._discard_unwanted_blocks()
            sequences = self._encode_block(self._blocks.index_in_pass(number) * BLOCK_ROWS, rows)
            batches = batch_by_length(sequences, self._batch_tokens)
            order = np.random.default_rng([self._seed, number]).permutation(len(batches))
            self._current_blocks[shard] = ordinal, [batches[position] for position in order]
        return self._current_blocks[shard][1]

    def _encode_block(self, first: int, rows: list[Row]) -> list[TokenSequence]:
        if not rows:
            return []
        batch = self._encode(to_columns(rows), list(range(first, first + len(rows))))
        table = build_token_table(batch)
        kept = np.flatnonzero(~self._is_held_out(table))
        sequences = build_sequences(table, kept, self._framing, self._exclude_special)
        return [sequences[number] for number in range(len(sequences))]


def iterate_encoded_blocks(rows: StreamedRows, encode: RowEncoder) -> Iterator[Rows]:
    """Yield the tokenized blocks of one pass over the stream, each of BLOCK_ROWS rows."""
    iterator, first = rows(0), 0
    while block := list(islice(iterator, BLOCK_ROWS)):
        yield encode(to_columns(block), list(range(first, first + len(block))))
        first += len(block)


def to_columns(rows: list[Row]) -> Rows:
    """Return ``rows`` as {column: values}, with None for columns that a row does not have."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}
