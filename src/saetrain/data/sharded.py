"""The sample order: a function of data, seed and position alone, whatever the number of ranks.

The endless sequence of permutations of the data (one per epoch) is dealt to a fixed number of virtual shards like
cards: number j goes to shard j mod V. A rank serves whole shards, so the order within each is never disturbed.
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

NO_KEPT_TOKEN = "the data set holds no token that the token policy keeps"


@dataclass(frozen=True, kw_only=True)
class LoaderSettings:
    """Order of the data."""

    shuffle_seed: int = 42
    """Seed of the order."""
    data_shards: int = 16
    """Virtual shards that the data are dealt to, at least as many as ranks; part of the order."""

    def __post_init__(self) -> None:
        if self.data_shards < 1:
            raise SaetrainError(f"--data_shards {self.data_shards}: must be at least 1")
        if self.shuffle_seed < 0:
            raise SaetrainError(f"--shuffle_seed {self.shuffle_seed}: must not be negative")


def build_token_policy(exclude_special: bool, exclude_first: bool) -> Callable[[TokenSequence], np.ndarray]:
    """Which positions of a sequence count: a function to (S,) bool."""
    excluded = np.uint8(exclude_special * TokenKind.SPECIAL | exclude_first * TokenKind.FIRST)
    return lambda sequence: np.asarray((sequence.kind & excluded) == 0)


class ShardedSource(ABC):
    """Endless streams of sequences, one per virtual shard, each recomputable from any cursor.

    What :meth:`read` gives is a function of its arguments alone, whatever was read before and by whom.
    """

    start_cursor: Cursor
    """The cursor at the beginning of every shard."""

    def __init__(self, n_shards: int, exclude_special: bool, exclude_first: bool) -> None:
        self.n_shards = n_shards
        self.keep = build_token_policy(exclude_special, exclude_first)
        """The positions that the token policy trains on, (S,) bool of a sequence."""

    @abstractmethod
    def read(self, shard: int, cursor: Cursor, tokens: int) -> tuple[list[TokenSequence], Cursor]:
        """The shard's sequences from ``cursor`` on until they hold ``tokens`` kept tokens, and the next cursor."""

    @abstractmethod
    def hint_cursors(self, cursors: Mapping[int, Cursor]) -> None:
        """Say which shards will be read from where, which changes nothing but time and memory."""

    def set_interrupt_check(self, check: Callable[[], None]) -> None:
        """Call ``check``, which may raise, wherever a read may take long; here nothing does."""
        del check


class ShardedSequences(ShardedSource):
    """Sequences that can be had in any order: the endless permutations, dealt. Its cursor counts the shard's cards."""

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
        """The shard's sequences from ``cursor`` on until they hold ``tokens`` kept tokens, and the next cursor."""
        out: list[TokenSequence] = []
        held, empty = 0, 0
        (index,) = cursor
        while held < tokens:
            epoch, position = divmod(index * self.n_shards + shard, len(self._sequences))
            sequence = self._sequences[int(self._permute_epoch(epoch)[position])]
            kept = int(self.keep(sequence).sum())
            empty = 0 if kept else empty + 1
            if empty > len(self._sequences):
                self._require_kept_token()
                empty = 0
            out.append(sequence)
            held += kept
            index += 1
        return out, (index,)

    def hint_cursors(self, cursors: Mapping[int, Cursor]) -> None:
        """Nothing to do: any sequence can be had at any time."""

    def _require_kept_token(self) -> None:
        """SaetrainError when no sequence has a kept token; one shard may meet none for long all the same."""
        if not any(self.keep(self._sequences[number]).any() for number in range(len(self._sequences))):
            raise SaetrainError(NO_KEPT_TOKEN)
