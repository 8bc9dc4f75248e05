"""Sample order: a function of data, seed and position only, so it does not depend on the number of ranks.

The data are permuted once per epoch. The permutations form an endless list, whose entry j belongs to virtual shard
j mod V, where V (``--data_shards``) is fixed. Each rank reads whole shards, so the order within a shard never changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from saetrain.data.packing import Sequences
from saetrain.errors import SaetrainError
from saetrain.types import Cursor, TokenKind, TokenSequence

NO_KEPT_TOKEN = "the data set contains no token that the token policy keeps"


@dataclass(frozen=True, kw_only=True)
class LoaderSettings:
    """Order of the data."""

    shuffle_seed: int = 42
    """Seed of the data order."""
    data_shards: int = 16
    """Number of virtual shards of the data, at least the number of ranks. It changes the data order."""

    def __post_init__(self) -> None:
        if self.data_shards < 1:
            raise SaetrainError(f"--data_shards {self.data_shards}: must be at least 1")
        if self.shuffle_seed < 0:
            raise SaetrainError(f"--shuffle_seed {self.shuffle_seed}: must not be negative")


def build_token_policy(exclude_special: bool, exclude_first: bool) -> Callable[[TokenSequence], np.ndarray]:
    """Return the token policy: a function from a sequence to (S,) bool, the positions to use."""
    excluded = np.uint8(exclude_special * TokenKind.SPECIAL | exclude_first * TokenKind.FIRST)
    return lambda sequence: np.asarray((sequence.kind & excluded) == 0)


class ShardedSource(ABC):
    """Endless streams of sequences, one per virtual shard, which can be read from any cursor.

    The result of :meth:`read` depends only on its arguments, not on earlier reads.
    """

    start_cursor: Cursor
    """Cursor of the start of every shard."""

    def __init__(self, n_shards: int, exclude_special: bool, exclude_first: bool) -> None:
        self.n_shards = n_shards
        self.keep = build_token_policy(exclude_special, exclude_first)
        """Token policy: the positions of a sequence to train on, (S,) bool."""

    @abstractmethod
    def read(self, shard: int, cursor: Cursor, tokens: int) -> tuple[list[TokenSequence], Cursor]:
        """Read the shard's sequences from ``cursor`` on until they have ``tokens`` kept tokens.

        Returns (sequences, cursor after them). Raises SaetrainError when the data contain no kept token.
        """

    @abstractmethod
    def hint_cursors(self, cursors: Mapping[int, Cursor]) -> None:
        """Announce which shards will be read, and from which cursor. This affects only time and memory."""

    def set_interrupt_check(self, check: Callable[[], None]) -> None:
        """Call ``check``, which may raise, during long reads. Sources with fast reads ignore it."""
        del check


class ShardedSequences(ShardedSource):
    """Source over sequences with random access. The cursor is the number of sequences read from the shard."""

    start_cursor: Cursor = (0,)

    def __init__(
        self, sequences: Sequences, settings: LoaderSettings, exclude_special: bool, exclude_first: bool
    ) -> None:
        assert len(sequences), "no sequences"
        super().__init__(settings.data_shards, exclude_special, exclude_first)
        self._sequences = sequences
        seed = settings.shuffle_seed
        count = len(sequences)

        @lru_cache(maxsize=2)
        def permute_epoch(epoch: int) -> np.ndarray:
            return np.random.default_rng([seed, epoch]).permutation(count)

        self._permute_epoch = permute_epoch

    def read(self, shard: int, cursor: Cursor, tokens: int) -> tuple[list[TokenSequence], Cursor]:
        """Read the shard's sequences from ``cursor`` on, as :meth:`ShardedSource.read`."""
        out: list[TokenSequence] = []
        n_kept, n_empty = 0, 0
        (index,) = cursor
        while n_kept < tokens:
            epoch, position = divmod(index * self.n_shards + shard, len(self._sequences))
            sequence = self._sequences[int(self._permute_epoch(epoch)[position])]
            kept = int(self.keep(sequence).sum())
            n_empty = 0 if kept else n_empty + 1
            if n_empty > len(self._sequences):
                self._require_kept_token()
                n_empty = 0
            out.append(sequence)
            n_kept += kept
            index += 1
        return out, (index,)

    def hint_cursors(self, cursors: Mapping[int, Cursor]) -> None:
        """Do nothing, because sequences have random access."""

    def _require_kept_token(self) -> None:
        """Raise SaetrainError if no sequence has a kept token.

        A single shard can read many sequences without one although the data set has some.
        """
        if not any(self.keep(self._sequences[number]).any() for number in range(len(self._sequences))):
            raise SaetrainError(NO_KEPT_TOKEN)
