"""Which documents are never trained on: chosen by a hash of their text, so that copies fall on one side."""

from __future__ import annotations

import numpy as np

from saetrain.data.sequences import TokenTable

MIN_TOKENS = 20_000
MAX_SHARE = 0.1


def distinct_rows(table: TokenTable) -> np.ndarray:
    """Row numbers of the first document with each text, (rows,) int64."""
    docs, first_row = np.unique(table.doc, return_index=True)
    _, first = np.unique(table.text_hash[first_row], return_index=True)
    kept = np.zeros(int(docs[-1]) + 1 if len(docs) else 0, dtype=bool)
    kept[docs[first]] = True
    return np.flatnonzero(kept[table.doc])


def split_rows(table: TokenTable, rows: np.ndarray, tokens: int) -> tuple[np.ndarray, np.ndarray, str]:
    """(training rows, held-out rows, what was done), as row numbers of ``table``.

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
    if lengths[chosen].sum() < enough:
        chosen = _smallest_hashes(_part_hashes(table.text_hash[rows], table.doc[rows]), lengths, target, limit)
        how = "parts of documents (whole documents are too long for a tenth)"
    return rows[~chosen], rows[chosen], how


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


def _part_hashes(hashes: np.ndarray, docs: np.ndarray) -> np.ndarray:
    """A hash for each part of a document: its text's, stirred with the part's number, the same for every copy."""
    begins = np.flatnonzero(np.concatenate([[True], docs[1:] != docs[:-1]]))
    numbers = np.arange(len(docs)) - np.repeat(begins, np.diff(np.append(begins, len(docs))))
    stirred = hashes.astype(np.uint64) ^ (numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    mixed = stirred * np.uint64(0xBF58476D1CE4E5B9)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))
