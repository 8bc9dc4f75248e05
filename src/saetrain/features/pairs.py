"""Temporary files: the tokens that were read, and the (latent, token, value) pairs of an SAE's codes.

Both are written during one pass over the text. Memory does not grow with the text: pairs are sorted by latent in runs
of RUN_PAIRS, as in an external merge sort, and then read back for one range of latents at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from saetrain.types import TokenSequence

RUN_PAIRS = 1 << 20
"""Pairs that are sorted at once."""
RANGE_PAIRS = 1 << 20
"""Pairs of a range of latents that is loaded, unless a single latent has more."""
RANGE_LATENTS = 1 << 14
"""Latents per range. Numbers below 2^16 are sorted by numpy in linear time."""
POSITION_BINS = 16
STREAM_COLUMNS: dict[str, np.dtype] = {
    "token_id": np.dtype(np.int32),
    "doc": np.dtype(np.int64),
    "position": np.dtype(np.int32),
    "sequence": np.dtype(np.int32),
    "kept": np.dtype(np.bool_),
}
"""Columns of the token stream, one row per token."""
POSITION_BIN = "position_bin"
"""Temporary column: POSITION_BINS · position // length of the sequence."""


class ColumnFiles:
    """Columns of numbers, one file each, which are appended to and then read as memory maps."""

    def __init__(self, folder: Path, columns: Mapping[str, np.dtype]) -> None:
        self._folder, self._columns = folder, dict(columns)
        folder.mkdir()
        self.n_rows = 0

    def append_rows(self, values: Mapping[str, np.ndarray]) -> None:
        """Append rows; every column has the same number."""
        for name, dtype in self._columns.items():
            with open(self._folder / name, "ab") as file:
                file.write(np.ascontiguousarray(values[name], dtype=dtype).data)
        self.n_rows += len(next(iter(values.values())))

    def read_column(self, name: str) -> np.ndarray:
        """Return a column as a memory map."""
        if not self.n_rows:
            return np.zeros(0, dtype=self._columns[name])
        return np.memmap(self._folder / name, dtype=self._columns[name], mode="r", shape=(self.n_rows,))


class TokenStream:
    """The tokens of the text in the order in which they were read, including those that the policy excludes."""

    def __init__(self, folder: Path) -> None:
        self._files = ColumnFiles(folder, {**STREAM_COLUMNS, POSITION_BIN: np.dtype(np.uint8)})
        self._read: dict[str, np.ndarray] = {}
        self.n_sequences = self.n_kept = 0

    def __len__(self) -> int:
        return self._files.n_rows

    def append_tokens(self, sequences: list[TokenSequence], kept: np.ndarray) -> None:
        """Append the tokens of whole sequences; ``kept`` (N,) bool covers all of them."""
        lengths = [len(sequence) for sequence in sequences]
        position = np.concatenate([np.arange(length) for length in lengths])
        length_of = np.repeat(lengths, lengths)
        self._files.append_rows(
            {
                "token_id": np.concatenate([sequence.ids for sequence in sequences]),
                "doc": np.concatenate([sequence.doc for sequence in sequences]),
                "position": position,
                "sequence": np.repeat(self.n_sequences + np.arange(len(sequences)), lengths),
                "kept": kept,
                POSITION_BIN: position * POSITION_BINS // length_of,
            }
        )
        self.n_sequences += len(sequences)
        self.n_kept += int(kept.sum())

    def distinct_ids(self) -> np.ndarray:
        """Return the token ids that occur, ascending."""
        found, token_id = np.zeros(0, dtype=np.int32), self.read_column("token_id")
        for start in range(0, len(self), RUN_PAIRS):
            found = np.union1d(found, token_id[start : start + RUN_PAIRS])
        return found

    def read_column(self, name: str) -> np.ndarray:
        """Return a column of STREAM_COLUMNS or POSITION_BIN; no token may be appended afterwards."""
        if name not in self._read:
            self._read[name] = self._files.read_column(name)
        return self._read[name]


@dataclass(frozen=True)
class PairRange:
    """All pairs of the latents from ``first`` to ``stop``, sorted by latent and then by token.

    ``latent`` (P,) uint16, counted from ``first``; ``token`` (P,) int32 rows of the stream; ``value`` (P,) fp32;
    ``starts`` (latents + 1,) int64, the first pair of each latent.
    """

    first: int
    stop: int
    latent: np.ndarray
    token: np.ndarray
    value: np.ndarray
    starts: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """Number of pairs of each latent."""
        return np.diff(self.starts)


class PairFile:
    """The pairs of the codes of one SAE with F latents."""

    def __init__(self, folder: Path, n_latents: int) -> None:
        self._files = ColumnFiles(
            folder, {"latent": np.dtype(np.int32), "token": np.dtype(np.int32), "value": np.dtype(np.float32)}
        )
        self._n_latents = n_latents
        self._pending: list[dict[str, np.ndarray]] = []
        self._n_pending = 0
        self._runs: list[int] = [0]
        self.counts = np.zeros(n_latents, dtype=np.int64)
        """(F,) number of tokens on which each latent fires."""
        self.n_products = 0
        """Number of pairs of latents that fire together, summed over the tokens (itself included)."""

    def append_pairs(self, latent: np.ndarray, token: np.ndarray, value: np.ndarray) -> None:
        """Append P pairs in the order of their tokens, rows of the stream; all pairs of a token come together."""
        self.counts += np.bincount(latent, minlength=self._n_latents)
        ends = np.flatnonzero(np.diff(token, append=-1))
        self.n_products += int((np.diff(ends, prepend=-1) ** 2).sum())
        self._pending.append({"latent": latent.astype(np.int32), "token": token.astype(np.int32), "value": value})
        self._n_pending += len(latent)
        if self._n_pending >= RUN_PAIRS:
            self._write_run()

    def _write_run(self) -> None:
        merged = {name: np.concatenate([part[name] for part in self._pending]) for name in self._pending[0]}
        self._pending, self._n_pending = [], 0
        order = _stable_order(merged["latent"], self._n_latents)
        self._files.append_rows({name: values[order] for name, values in merged.items()})
        self._runs.append(self._files.n_rows)

    def write_pending(self) -> None:
        """Write the pairs that are still in memory, after which all pairs can be read."""
        if self._n_pending:
            self._write_run()

    def iterate_ranges(self) -> Iterator[PairRange]:
        """Yield all pairs in ranges of latents, in the order of the latents."""
        ends, first = np.cumsum(self.counts), 0
        while first < self._n_latents:
            before = int(ends[first - 1]) if first else 0
            stop = int(np.searchsorted(ends, before + RANGE_PAIRS, side="right"))
            stop = min(max(stop, first + 1), first + RANGE_LATENTS, self._n_latents)
            yield self.read_range(first, stop)
            first = stop

    def read_range(self, first: int, stop: int) -> PairRange:
        """Read the pairs of the latents from ``first`` to ``stop``."""
        columns = {name: self._files.read_column(name) for name in ("latent", "token", "value")}
        parts = []
        for start, end in zip(self._runs, self._runs[1:], strict=False):
            low, high = start + np.searchsorted(columns["latent"][start:end], [first, stop])
            parts.append(slice(int(low), int(high)))
        read = {
            name: np.concatenate([column[:0], *(column[part] for part in parts)]) for name, column in columns.items()
        }
        latent = (read["latent"] - first).astype(np.uint16)
        order = _stable_order(latent, stop - first)
        starts = np.concatenate([[0], np.cumsum(self.counts[first:stop])])
        return PairRange(first, stop, latent[order], read["token"][order], read["value"][order], starts)

    def sample_tokens(self, stride: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (latent, token) of the pairs of every ``stride``-th row of the stream."""
        latent, token = self._files.read_column("latent"), self._files.read_column("token")
        parts = []
        for start, end in zip(self._runs, self._runs[1:], strict=False):
            chosen = np.flatnonzero(token[start:end] % stride == 0)
            parts.append((latent[start:end][chosen], token[start:end][chosen]))
        empty = np.zeros(0, dtype=np.int32)
        return np.concatenate([empty, *(a for a, _ in parts)]), np.concatenate([empty, *(b for _, b in parts)])


def _stable_order(latents: np.ndarray, n_latents: int) -> np.ndarray:
    """Return the order that sorts ``latents``, stable, so that tokens stay in order."""
    return np.argsort(latents.astype(np.uint16) if n_latents <= 1 << 16 else latents, kind="stable")
