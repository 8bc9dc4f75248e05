"""From stored tokens to sequences of the model's input: random access by number, read from memory-mapped files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import xxhash

from saetrain.data.text_column import Rows
from saetrain.data.tokenize import Framing
from saetrain.types import ModelBatch, TokenKind, TokenSequence, batch_by_length

if TYPE_CHECKING:
    import datasets

GROUP_SEQUENCES = 64
"""Consecutive sequences of an evaluation that are batched by length."""
DIGEST_CHUNK_TOKENS = 1 << 22
"""Number of tokens per update of the hash."""


class TokenTable:
    """Rows of token ids in Arrow chunks, memory-mapped if they come from disk.

    Attributes, all (rows,) int64: ``lengths`` tokens per row, ``special_counts`` special tokens per row, ``doc``
    row of the data set, and ``text_hash``.
    """

    def __init__(self, rows: datasets.Dataset | pa.Table) -> None:
        if isinstance(rows, pa.Table):
            table = rows
        else:
            assert rows._indices is None, "a selection of rows has no Arrow chunks"
            table = rows.data
        ids = table.column("ids").chunks
        special = table.column("special").chunks
        self._ids = [(chunk.values.to_numpy(), chunk.offsets.to_numpy()) for chunk in ids]
        self._special = [(chunk.values, chunk.offsets.to_numpy()) for chunk in special]
        self._chunk_starts = np.cumsum([0] + [len(chunk) for chunk in ids])
        self.lengths = _concat_int64([np.diff(offsets) for _, offsets in self._ids])
        self.special_counts = _concat_int64([self._count_special(values, offsets) for values, offsets in self._special])
        self.doc = table.column("doc").to_numpy().astype(np.int64)
        self.text_hash = table.column("text_hash").to_numpy().astype(np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def digest(self, rows: np.ndarray) -> str:
        """Return a hash of all token ids and of ``rows`` (int64); it does not depend on the chunks."""
        digest = xxhash.xxh3_64(rows.tobytes())
        digest.update(self.lengths.tobytes())
        for values, offsets in self._ids:
            for start in range(int(offsets[0]), int(offsets[-1]), DIGEST_CHUNK_TOKENS):
                digest.update(
                    values[start : min(start + DIGEST_CHUNK_TOKENS, int(offsets[-1]))].astype(np.uint32).tobytes()
                )
        return str(digest.hexdigest())

    @staticmethod
    def _count_special(values: object, offsets: np.ndarray) -> np.ndarray:
        flags = values.to_numpy(zero_copy_only=False)  # type: ignore[attr-defined]
        running = np.concatenate([[0], np.cumsum(flags, dtype=np.int64)])
        return np.asarray(running[offsets[1:]] - running[offsets[:-1]])

    def get_row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids, special) of a row, both (length,)."""
        chunk = int(np.searchsorted(self._chunk_starts, index, side="right")) - 1
        local = index - int(self._chunk_starts[chunk])
        ids, offsets = self._ids[chunk]
        start, stop = int(offsets[local]), int(offsets[local + 1])
        flags, flag_offsets = self._special[chunk]
        first = int(flag_offsets[local])
        special = flags.slice(first, stop - start).to_numpy(zero_copy_only=False)
        return ids[start:stop], special


def build_token_table(batch: Rows) -> TokenTable:
    """Build the table of one batch of tokenized documents, in memory."""
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in batch["ids"]], dtype=np.int64)]).astype(np.int32)

    def build_list_array(name: str, dtype: type) -> pa.Array:
        values = np.concatenate([np.asarray(v) for v in batch[name]]) if batch[name] else np.zeros(0)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.astype(dtype)))

    return TokenTable(
        pa.table(
            {
                "ids": build_list_array("ids", np.uint32),
                "special": build_list_array("special", np.bool_),
                "doc": pa.array(batch["doc"], pa.int64()),
                "text_hash": pa.array(batch["text_hash"], pa.int64()),
            }
        )
    )


def _concat_int64(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)


class Sequences(ABC):
    """A numbered set of sequences.

    ``text_tokens``: number of tokens that the token policy keeps in all sequences. Position 0 of a causal model
    counts as excluded, even if it is kept. ``lengths`` (count,) int64: upper bound of the tokens of each sequence.
    """

    text_tokens: int
    lengths: np.ndarray

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> TokenSequence: ...

    def iterate_batches(self, indices: np.ndarray, batch_tokens: int) -> Iterator[ModelBatch]:
        """Yield the sequences at ``indices`` in model batches, for evaluation."""
        for start in range(0, len(indices), GROUP_SEQUENCES):
            group = [self[int(number)] for number in indices[start : start + GROUP_SEQUENCES]]
            yield from batch_by_length(group, batch_tokens)

    def shuffled_order(self, seed: int) -> np.ndarray:
        """Return the numbers of the sequences in the order in which an evaluation reads them."""
        return np.random.default_rng([seed, 1]).permutation(len(self))


class DocumentSequences(Sequences):
    """Sequences of an encoder: each stored row is one sequence."""

    def __init__(self, table: TokenTable, rows: np.ndarray, exclude_special: bool) -> None:
        self._table, self._rows = table, rows
        self.lengths = table.lengths[rows]
        kept = self.lengths - (table.special_counts[rows] if exclude_special else 0)
        self.text_tokens = int(kept.sum())

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> TokenSequence:
        row = int(self._rows[index])
        ids, special = self._table.get_row(row)
        return TokenSequence(ids.astype(np.int32), _token_kinds(special), np.full(len(ids), self._table.doc[row]))


class PackedSequences(Sequences):
    """Sequences of a causal model: documents are concatenated and cut into windows of ``ctx_len`` tokens.

    The last window may be shorter. If the tokenizer adds BOS, every window starts with BOS; a window that starts with
    a document uses the document's own BOS.
    """

    def __init__(self, table: TokenTable, rows: np.ndarray, framing: Framing, exclude_special: bool) -> None:
        self._table, self._rows, self._framing = table, rows, framing
        self._ends = np.cumsum(table.lengths[rows])
        self._stride = framing.ctx_len - (framing.bos is not None)
        n_tokens = int(self._ends[-1]) if len(rows) else 0
        self._count = -(-n_tokens // self._stride)
        self.lengths = np.full(self._count, framing.ctx_len, dtype=np.int64)
        special = int(table.special_counts[rows].sum()) if exclude_special else 0
        self.text_tokens = max(n_tokens - special - (self._count if framing.bos is None else 0), 0)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> TokenSequence:
        start = index * self._stride
        stop = min(start + self._stride, int(self._ends[-1]))
        first = int(np.searchsorted(self._ends, start, side="right"))
        ids, special, docs = [], [], []
        position, row_index = start, first
        while position < stop:
            row = int(self._rows[row_index])
            offset = position - (int(self._ends[row_index]) - int(self._table.lengths[row]))
            row_ids, row_special = self._table.get_row(row)
            take = min(stop - position, len(row_ids) - offset)
            ids.append(row_ids[offset : offset + take])
            special.append(row_special[offset : offset + take])
            docs.append(np.full(take, self._table.doc[row]))
            position, row_index = position + take, row_index + 1
        return self._build_window(np.concatenate(ids), np.concatenate(special), np.concatenate(docs))

    def _build_window(self, ids: np.ndarray, special: np.ndarray, docs: np.ndarray) -> TokenSequence:
        kinds = _token_kinds(special)
        if self._framing.bos is not None and ids[0] != self._framing.bos:
            ids = np.concatenate([[self._framing.bos], ids])
            kinds = np.concatenate([[np.uint8(TokenKind.SPECIAL)], kinds])
            docs = np.concatenate([docs[:1], docs])
        kinds[0] |= np.uint8(TokenKind.FIRST)
        return TokenSequence(ids.astype(np.int32), kinds, docs)


def _token_kinds(special: np.ndarray) -> np.ndarray:
    return np.where(special, np.uint8(TokenKind.SPECIAL), np.uint8(TokenKind.TEXT))


def build_sequences(table: TokenTable, rows: np.ndarray, framing: Framing, exclude_special: bool) -> Sequences:
    """Build the sequences of the table's ``rows`` (int64 row numbers) as ``framing`` describes."""
    if framing.causal:
        return PackedSequences(table, rows, framing, exclude_special)
    return DocumentSequences(table, rows, exclude_special)
