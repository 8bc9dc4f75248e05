"""Sample order: a function of data, seed and position only, so it does not depend on the number of ranks.

The sequences are grouped into model batches, which depend on the data and on ``--model_batch_tokens`` alone. The
batches are permuted once per epoch. The permutations form an endless list, whose entry j belongs to virtual shard
j mod V, where V (``--data_shards``) is fixed. Each rank reads whole shards, so the order within a shard never changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import numpy as np

from saetrain.data.packing import Sequences
from saetrain.errors import SaetrainError
from saetrain.settings import Range, Seed, Settings
from saetrain.types import Cursor, ModelBatch, TokenKind, TokenSequence, group_by_length

GROUPING_SEED = 0
WINDOW_SEQUENCES = 1024
"""Sequences among which batches of similar length are formed."""
MAX_SHARDS = 4096
"""Largest number of virtual shards; the start of a run reads from each of them."""
NO_KEPT_TOKEN = "the data set contains no token that the token policy keeps"


@dataclass(frozen=True, kw_only=True)
class LoaderSettings(Settings):
    """Order of the data."""

    shuffle_seed: Seed = 42
    """Seed of the data order."""
    data_shards: Annotated[int, Range(1, MAX_SHARDS)] = 16
    """Number of virtual shards of the data, at least the number of ranks. It changes the data order."""


def build_token_policy(exclude_special: bool, exclude_first: bool) -> Callable[[TokenSequence], np.ndarray]:
    """Return the token policy: a function from a sequence to (S,) bool, the positions to use."""
    excluded = np.uint8(exclude_special * TokenKind.SPECIAL | exclude_first * TokenKind.FIRST)
    return lambda sequence: np.asarray((sequence.kind & excluded) == 0)


class ShardedSource(ABC):
    """Endless streams of model batches, one per virtual shard, which can be read from any cursor.

    The result of :meth:`read` depends only on its arguments, not on earlier reads.
    """

    start_cursor: Cursor
    """Cursor of the start of every shard."""

    def __init__(self, n_shards: int, exclude_special: bool, exclude_first: bool) -> None:
        self.n_shards = n_shards
        self.keep = build_token_policy(exclude_special, exclude_first)
        """Token policy: the positions of a sequence to train on, (S,) bool."""

    @abstractmethod
    def read(self, shard: int, cursor: Cursor, tokens: int) -> tuple[list[ModelBatch], Cursor]:
        """Read the shard's batches from ``cursor`` on until they have ``tokens`` kept tokens.

        Returns (batches, cursor after them). Raises SaetrainError when the data contain no kept token.
        """

    def read_first_batches(self, tokens: int) -> list[ModelBatch]:
        """Read the first batches of the shards, until they have about ``tokens`` kept tokens together."""
        return self.read_batches_at(dict.fromkeys(range(self.n_shards), self.start_cursor), tokens)

    def read_batches_at(self, cursors: Mapping[int, Cursor], tokens: int) -> list[ModelBatch]:
        """Read batches of each shard from its cursor on, until they have about ``tokens`` kept tokens together."""
        out: list[ModelBatch] = []
        for shard in range(self.n_shards):
            if sum(map(self.count_kept, out)) >= tokens:
                break
            out.extend(self.read(shard, cursors[shard], -(-tokens // self.n_shards))[0])
        return out

    def count_kept(self, batch: ModelBatch) -> int:
        """Return the number of tokens of ``batch`` that the token policy keeps."""
        return sum(int(self.keep(sequence).sum()) for sequence in batch)

    @abstractmethod
    def hint_cursors(self, cursors: Mapping[int, Cursor]) -> None:
        """Announce which shards will be read, and from which cursor. This affects only time and memory."""

    def set_interrupt_check(self, check: Callable[[], None]) -> None:
        """Call ``check``, which may raise, during long reads. Sources with fast reads ignore it."""
        del check


class ShardedSequences(ShardedSource):
    """Source over sequences with random access. The cursor is the number of batches read from the shard.

    ``batch_tokens``: padded tokens per model batch; 1 makes each sequence a batch.
    """

    start_cursor: Cursor = (0,)

    def __init__(
        self,
        sequences: Sequences,
        settings: LoaderSettings,
        exclude_special: bool,
        exclude_first: bool,
        batch_tokens: int,
    ) -> None:
        assert len(sequences), "no sequences"
        super().__init__(settings.data_shards, exclude_special, exclude_first)
        self._sequences, self._batches = sequences, group_sequences(sequences.lengths, batch_tokens)
        seed, count = settings.shuffle_seed, len(self._batches)

        @lru_cache(maxsize=2)
        def permute_epoch(epoch: int) -> np.ndarray:
            return np.random.default_rng([seed, epoch]).permutation(count)

        self._permute_epoch = permute_epoch

    def read(self, shard: int, cursor: Cursor, tokens: int) -> tuple[list[ModelBatch], Cursor]:
        """Read the shard's batches from ``cursor`` on, as :meth:`ShardedSource.read`."""
        out: list[ModelBatch] = []
        n_kept, n_empty = 0, 0
        (index,) = cursor
        while n_kept < tokens:
            epoch, position = divmod(index * self.n_shards + shard, len(self._batches))
            numbers = self._batches[int(self._permute_epoch(epoch)[position])]
            batch = [self._sequences[int(number)] for number in numbers]
            kept = self.count_kept(batch)
            n_empty = 0 if kept else n_empty + 1
            if n_empty > len(self._batches):
                self._require_kept_token()
                n_empty = 0
            out.append(batch)
            n_kept += kept
            index += 1
        return out, (index,)

    def hint_cursors(self, cursors: Mapping[int, Cursor]) -> None:
        """Do nothing, because sequences have random access."""

    def _require_kept_token(self) -> None:
        """Raise SaetrainError if no sequence has a kept token.

        A single shard can read many batches without one although the data set has some.
        """
        if not any(self.keep(self._sequences[number]).any() for number in range(len(self._sequences))):
            raise SaetrainError(NO_KEPT_TOKEN)


def group_sequences(lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Group sequences into model batches of at most ``batch_tokens`` padded tokens, or one sequence.

    ``lengths`` (count,) int64. Returns the numbers of the sequences of each batch. The sequences are permuted with a
    fixed seed, so that a batch mixes text from the whole data set; then groups of similar length are formed.
    """
    order = np.random.default_rng(GROUPING_SEED).permutation(len(lengths))
    windows = (order[start : start + WINDOW_SEQUENCES] for start in range(0, len(order), WINDOW_SEQUENCES))
    return [window[numbers] for window in windows for numbers in group_by_length(lengths[window], batch_tokens)]
