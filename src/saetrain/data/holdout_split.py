"""Held-out split: documents are chosen by a hash of their text, so that all copies of a text are on one side."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import xxhash

from saetrain.data.packing import TokenTable
from saetrain.data.text_column import Rows
from saetrain.errors import SaetrainError

MIN_HELD_OUT_TOKENS = 20_000
MAX_HELD_OUT_SHARE = 0.1
STREAM_HELD_OUT_SHARE = 0.05
"""Share of a stream's texts that is held out: the texts whose hash is in the lowest 5 % of hash space."""
HASH_SPACE = 1 << 63


def deduplicate_rows(table: TokenTable) -> np.ndarray:
    """Return the row numbers of the first document with each text, (rows,) int64."""
    docs, first_row = np.unique(table.doc, return_index=True)
    _, first = np.unique(table.text_hash[first_row], return_index=True)
    kept = np.zeros(int(docs[-1]) + 1 if len(docs) else 0, dtype=bool)
    kept[docs[first]] = True
    return np.flatnonzero(kept[table.doc])


def split_held_out_rows(table: TokenTable, rows: np.ndarray, tokens: int) -> tuple[np.ndarray, np.ndarray, str, bool]:
    """Split ``rows`` of ``table`` into training rows and held-out rows.

    Documents are held out in the order of their text's hash, until they have ``tokens`` tokens (at least 20k) or a
    tenth of all tokens. If single documents are too long for that, single rows are held out instead.

    Returns (training rows, held-out rows, description of the choice, whether whole documents were held out). Rows
    are row numbers of ``table``, int64.
    """
    lengths = table.lengths[rows] - table.special_counts[rows]
    limit = int(lengths.sum() * MAX_HELD_OUT_SHARE)
    target = min(max(tokens, MIN_HELD_OUT_TOKENS), limit)
    chosen = _select_smallest_hashes(table.text_hash[rows], lengths, target, limit)
    how = "documents chosen by a hash of their text"
    # Below 200k tokens in total, keeping documents whole matters more than the last few held-out tokens.
    min_held_out = MIN_HELD_OUT_TOKENS if 0.9 * limit >= MIN_HELD_OUT_TOKENS else target / 2
    whole = bool(lengths[chosen].sum() >= min_held_out)
    if not whole:
        chosen = _select_smallest_hashes(hash_rows(table)[rows], lengths, target, limit)
        how = "parts of documents (whole documents are too long for a tenth)"
    return rows[~chosen], rows[chosen], how, whole


def _select_smallest_hashes(hashes: np.ndarray, lengths: np.ndarray, target: int, limit: int) -> np.ndarray:
    """Return the mask of the rows with the smallest hashes, until ``target`` tokens and never above ``limit``."""
    groups, group_of = np.unique(hashes, return_inverse=True)
    sizes = np.bincount(group_of, weights=lengths, minlength=len(groups)).astype(np.int64)
    taken = np.zeros(len(groups), dtype=bool)
    n_taken = 0
    for group, size in enumerate(sizes):
        if n_taken >= target:
            break
        if n_taken + size <= limit:
            taken[group] = True
            n_taken += int(size)
    return taken[group_of]


def hash_rows(table: TokenTable) -> np.ndarray:
    """Return (rows,) uint64: the hash of each row's text and of the row's number within its document.

    Copies of a document have the same row hashes.
    """
    docs = table.doc
    starts = np.flatnonzero(np.concatenate([[True], docs[1:] != docs[:-1]])[: len(docs)])
    numbers = np.arange(len(docs)) - np.repeat(starts, np.diff(np.append(starts, len(docs))))
    combined = table.text_hash.astype(np.uint64) ^ (numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    mixed = combined * np.uint64(0xBF58476D1CE4E5B9)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))


@dataclass(frozen=True)
class HeldOutTexts:
    """Predicate of the rows that are never trained on.

    A row is held out if the hash of its text is below ``hash_limit`` or in ``texts``, or if its own hash
    (:func:`hash_rows`) is in ``rows``.
    """

    hash_limit: int = 0
    texts: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))

    def __call__(self, table: TokenTable) -> np.ndarray:
        """Return (rows,) bool: whether each row of ``table`` is held out."""
        text = table.text_hash
        parts = np.isin(hash_rows(table), self.rows) if len(self.rows) else False
        return np.asarray((text < self.hash_limit) | np.isin(text, self.texts) | parts)

    def __bool__(self) -> bool:
        return bool(self.hash_limit or len(self.texts) or len(self.rows))

    def digest(self) -> str:
        """Return a hash of the limit and of all hashes."""
        digest = xxhash.xxh3_64(np.int64(self.hash_limit).tobytes())
        for hashes in (self.texts, self.rows):
            digest.update(np.unique(hashes).tobytes())
        return str(digest.hexdigest())

    @staticmethod
    def from_rows(table: TokenTable, rows: np.ndarray, whole_documents: bool) -> HeldOutTexts:
        """Hold out ``rows`` of ``table``.

        With ``whole_documents`` rows are recognized by their text, so that near copies are held out too.
        """
        if whole_documents:
            return HeldOutTexts(texts=np.unique(table.text_hash[rows]))
        return HeldOutTexts(rows=np.unique(hash_rows(table)[rows]))

    @staticmethod
    def union(parts: list[HeldOutTexts]) -> HeldOutTexts:
        """Hold out every row that any of ``parts`` holds out."""
        if not parts:
            return HeldOutTexts()
        return HeldOutTexts(
            max(part.hash_limit for part in parts),
            np.concatenate([part.texts for part in parts]),
            np.concatenate([part.rows for part in parts]),
        )


def hold_out_from_stream(
    train: Iterable[Rows], held_out_blocks: Iterable[Rows] | None, tokens: int
) -> tuple[Rows, HeldOutTexts, float]:
    """Hold text out for a stream; return (held-out rows, predicate, held-out share of the stream's texts).

    The rows are the first documents of the held-out split, until they have ``tokens`` tokens (at least 20k). If there
    is no such split, or too little text in it, they are documents of the stream itself (:func:`hold_out_by_hash`).
    """
    if held_out_blocks is None:
        held, texts = hold_out_by_hash(train, tokens)
        return held, texts, texts.hash_limit / HASH_SPACE
    taken = _RowCollector(max(tokens, MIN_HELD_OUT_TOKENS))
    for block in held_out_blocks:
        taken.add_rows(block, np.ones(len(block["doc"]), dtype=bool))
        if taken.is_full:
            break
    hashes = np.unique(np.array(taken.rows["text_hash"], dtype=np.int64))
    if taken.n_tokens < MIN_HELD_OUT_TOKENS:
        # If the stream is too small to hold out documents of its own, the small split is used.
        with contextlib.suppress(SaetrainError):
            stream_rows, texts = hold_out_by_hash(train, tokens)
            if count_text_tokens(stream_rows) > taken.n_tokens:
                return stream_rows, dataclasses.replace(texts, texts=hashes), texts.hash_limit / HASH_SPACE
    return taken.rows, HeldOutTexts(0, hashes), 0.0


def hold_out_by_hash(blocks: Iterable[Rows], tokens: int) -> tuple[Rows, HeldOutTexts]:
    """Hold out documents of a stream whose text hash is in the lowest STREAM_HELD_OUT_SHARE of hash space.

    The rows are the first such documents, until they have ``tokens`` tokens (at least 20k) or the stream ends. If the
    stream has no such document, the document with the smallest hash is held out. Raises SaetrainError when no other
    text is left to train on.
    """
    limit = int(STREAM_HELD_OUT_SHARE * HASH_SPACE)
    taken, smallest, least = _RowCollector(max(tokens, MIN_HELD_OUT_TOKENS)), _RowCollector(0), HASH_SPACE
    seen: set[int] = set()
    for block in blocks:
        hashes = np.array(block["text_hash"], dtype=np.int64)
        seen.update(hashes.tolist())
        taken.add_rows(block, hashes < limit)
        if len(hashes) and hashes.min() < least:
            least, smallest = int(hashes.min()), _RowCollector(0)
        smallest.add_rows(block, hashes == least)
        if taken.is_full:
            break
    if not taken.rows["ids"]:
        taken, limit = smallest, least + 1
    if all(text < limit for text in seen):
        raise SaetrainError("the data set is too small to train on and hold text out: no training text would be left")
    return taken.rows, HeldOutTexts(limit)


def count_text_tokens(rows: Rows) -> int:
    """Return the number of tokens in the stored rows, without special tokens."""
    return sum(len(ids) - int(np.sum(special)) for ids, special in zip(rows["ids"], rows["special"], strict=True))


class _RowCollector:
    """Collects stored rows until they have ``target_tokens`` tokens, without special tokens."""

    def __init__(self, target_tokens: int) -> None:
        self.rows: Rows = {"ids": [], "special": [], "doc": [], "text_hash": []}
        self._target_tokens, self.n_tokens = target_tokens, 0

    @property
    def is_full(self) -> bool:
        return self.n_tokens >= self._target_tokens

    def add_rows(self, block: Rows, chosen: np.ndarray) -> None:
        for index in np.flatnonzero(chosen):
            for name, values in self.rows.items():
                values.append(block[name][index])
            self.n_tokens += count_text_tokens({name: [block[name][index]] for name in ("ids", "special")})
