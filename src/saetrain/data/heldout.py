"""Which documents are never trained on: chosen by a hash of their text, so that copies fall on one side."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import xxhash

from saetrain.data.sequences import TokenTable
from saetrain.data.text import Batch
from saetrain.errors import SaetrainError

MIN_TOKENS = 20_000
MAX_SHARE = 0.1
STREAM_SHARE = 0.05
"""Share of a stream's texts that are held out, as the share of hash space that their hashes lie in."""
HASHES = 1 << 63


def distinct_rows(table: TokenTable) -> np.ndarray:
    """Row numbers of the first document with each text, (rows,) int64."""
    docs, first_row = np.unique(table.doc, return_index=True)
    _, first = np.unique(table.text_hash[first_row], return_index=True)
    kept = np.zeros(int(docs[-1]) + 1 if len(docs) else 0, dtype=bool)
    kept[docs[first]] = True
    return np.flatnonzero(kept[table.doc])


def split_rows(table: TokenTable, rows: np.ndarray, tokens: int) -> tuple[np.ndarray, np.ndarray, str, bool]:
    """(training rows, held-out rows, what was done, whether to whole documents), as row numbers of ``table``.

    Documents are taken in the order of their text's hash until ``tokens`` tokens (at least 20k) are held out, and
    never more than a tenth. Where single documents are too long for that, rows are taken instead.
    """
    lengths = table.lengths[rows] - table.special_counts[rows]
    limit = int(lengths.sum() * MAX_SHARE)
    target = min(max(tokens, MIN_TOKENS), limit)
    chosen = _smallest_hashes(table.text_hash[rows], lengths, target, limit)
    how = "documents chosen by a hash of their text"
    # With less than 200k tokens in all, whole documents are worth more than the last few held-out tokens.
    enough = MIN_TOKENS if 0.9 * limit >= MIN_TOKENS else target / 2
    whole = bool(lengths[chosen].sum() >= enough)
    if not whole:
        chosen = _smallest_hashes(row_hashes(table)[rows], lengths, target, limit)
        how = "parts of documents (whole documents are too long for a tenth)"
    return rows[~chosen], rows[chosen], how, whole


def _smallest_hashes(hashes: np.ndarray, lengths: np.ndarray, target: int, limit: int) -> np.ndarray:
    """Mask of the rows whose text hashes are smallest, as many as fit ``limit`` tokens, up to ``target``."""
    groups, group_of = np.unique(hashes, return_inverse=True)
    sizes = np.bincount(group_of, weights=lengths, minlength=len(groups)).astype(np.int64)
    taken = np.zeros(len(groups), dtype=bool)
    total = 0
    for group, size in enumerate(sizes):
        if total >= target:
            break
        if total + size <= limit:
            taken[group] = True
            total += int(size)
    return taken[group_of]


def row_hashes(table: TokenTable) -> np.ndarray:
    """(rows,) uint64, of each row its text's hash stirred with its number within the document: alike for every copy."""
    docs = table.doc
    begins = np.flatnonzero(np.concatenate([[True], docs[1:] != docs[:-1]])[: len(docs)])
    numbers = np.arange(len(docs)) - np.repeat(begins, np.diff(np.append(begins, len(docs))))
    stirred = table.text_hash.astype(np.uint64) ^ (numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    mixed = stirred * np.uint64(0xBF58476D1CE4E5B9)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))


@dataclass(frozen=True)
class HeldOutTexts:
    """Which rows are never trained on.

    Those of a text whose hash lies below ``limit`` or is among ``texts``, and those among ``rows`` (``row_hashes``).
    """

    limit: int = 0
    texts: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))

    def __call__(self, table: TokenTable) -> np.ndarray:
        """(rows,) bool."""
        text = table.text_hash
        parts = np.isin(row_hashes(table), self.rows) if len(self.rows) else False
        return np.asarray((text < self.limit) | np.isin(text, self.texts) | parts)

    def __bool__(self) -> bool:
        return bool(self.limit or len(self.texts) or len(self.rows))

    def digest(self) -> str:
        """Hash of what is left out."""
        digest = xxhash.xxh3_64(np.int64(self.limit).tobytes())
        for hashes in (self.texts, self.rows):
            digest.update(np.unique(hashes).tobytes())
        return str(digest.hexdigest())

    @staticmethod
    def of(table: TokenTable, rows: np.ndarray, whole_documents: bool) -> HeldOutTexts:
        """Those of ``rows``, by their texts where they are whole documents, so that every near copy is one of them."""
        if whole_documents:
            return HeldOutTexts(texts=np.unique(table.text_hash[rows]))
        return HeldOutTexts(rows=np.unique(row_hashes(table)[rows]))

    @staticmethod
    def union(parts: list[HeldOutTexts]) -> HeldOutTexts:
        """What any of ``parts`` leaves out."""
        if not parts:
            return HeldOutTexts()
        return HeldOutTexts(
            max(part.limit for part in parts),
            np.concatenate([part.texts for part in parts]),
            np.concatenate([part.rows for part in parts]),
        )


def divide_stream(
    train: Iterable[Batch], apart: Iterable[Batch] | None, tokens: int
) -> tuple[Batch, HeldOutTexts, float]:
    """(held-out rows, what is then not trained on, the share of the stream's texts that this is).

    The first documents of the split that is set ``apart``, until they hold ``tokens`` tokens (at least 20k). Where
    there is no such split, or too little in it, documents of the stream itself.
    """
    if apart is None:
        held, texts = split_stream(train, tokens)
        return held, texts, texts.limit / HASHES
    taken = _Taken(max(tokens, MIN_TOKENS))
    for block in apart:
        taken.add(block, np.ones(len(block["doc"]), dtype=bool))
        if taken.full:
            break
    hashes = np.unique(np.array(taken.rows["text_hash"], dtype=np.int64))
    if taken.held < MIN_TOKENS:
        # A stream that has nothing to give itself is held to the little that there is.
        with contextlib.suppress(SaetrainError):
            own, texts = split_stream(train, tokens)
            if count_text(own) > taken.held:
                return own, dataclasses.replace(texts, texts=hashes), texts.limit / HASHES
    return taken.rows, HeldOutTexts(0, hashes), 0.0


def split_stream(blocks: Iterable[Batch], tokens: int) -> tuple[Batch, HeldOutTexts]:
    """The held-out documents of a stream that sets none apart: the first of STREAM_SHARE of hash space.

    As many as hold ``tokens`` tokens (at least 20k), or all that the stream has of them; the one with the smallest
    hash, where it has none. SaetrainError when there is no other text to train on.
    """
    limit = int(STREAM_SHARE * HASHES)
    taken, smallest, least = _Taken(max(tokens, MIN_TOKENS)), _Taken(0), HASHES
    seen: set[int] = set()
    for block in blocks:
        hashes = np.array(block["text_hash"], dtype=np.int64)
        seen.update(hashes.tolist())
        taken.add(block, hashes < limit)
        if len(hashes) and hashes.min() < least:
            least, smallest = int(hashes.min()), _Taken(0)
        smallest.add(block, hashes == least)
        if taken.full:
            break
    if not taken.rows["ids"]:
        taken, limit = smallest, least + 1
    if all(text < limit for text in seen):
        raise SaetrainError("the data set is too small to train on and hold text out: no text would be left")
    return taken.rows, HeldOutTexts(limit)


def count_text(rows: Batch) -> int:
    """Tokens of stored rows, special ones not counted."""
    return sum(len(ids) - int(np.sum(special)) for ids, special in zip(rows["ids"], rows["special"], strict=True))


class _Taken:
    """Stored rows gathered until they hold enough tokens, special ones not counted."""

    def __init__(self, wanted: int) -> None:
        self.rows: Batch = {"ids": [], "special": [], "doc": [], "text_hash": []}
        self._wanted, self.held = wanted, 0

    @property
    def full(self) -> bool:
        return self.held >= self._wanted

    def add(self, block: Batch, chosen: np.ndarray) -> None:
        for at in np.flatnonzero(chosen):
            for name, values in self.rows.items():
                values.append(block[name][at])
            self.held += count_text({name: [block[name][at]] for name in ("ids", "special")})
