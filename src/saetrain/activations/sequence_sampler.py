"""Whole sequences in the sample order: sequence i of the run is the next one of virtual shard i mod V."""

from __future__ import annotations

from dataclasses import dataclass

from saetrain.activations.prefetch import Prefetcher, SequenceSource
from saetrain.types import Cursor, TokenSequence


@dataclass(frozen=True)
class IndexedSequence:
    """A sequence and its number in the run, from 0."""

    index: int
    sequence: TokenSequence


class SequenceSampler:
    """Deals sequences that hold a token that counts; ``owned`` are the shards that this rank serves.

    Which sequence has which number is a function of the source alone, so a checkpoint holds the shards' cursors.
    """

    def __init__(self, source: SequenceSource, owned_shards: list[int], n_shards: int) -> None:
        self._source, self._prefetcher, self._n_shards = source, Prefetcher(source), n_shards
        self._cursors: dict[int, Cursor] = dict.fromkeys(owned_shards, source.start_cursor)
        source.hint_cursors(self._cursors)

    def state_dict(self) -> dict[str, list[int]]:
        """What :meth:`restore` needs: {shard: cursor}."""
        return {str(shard): list(cursor) for shard, cursor in self._cursors.items()}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        """Stand where :meth:`state` was taken."""
        self._cursors = {shard: tuple(state[str(shard)]) for shard in self._cursors}
        self._prefetcher.cancel_prefetches()
        self._source.hint_cursors(self._cursors)

    def close(self) -> None:
        """Read no further ahead."""
        self._prefetcher.close()

    def take_sequences(self, first: int, count: int, n_run_sequences: int) -> list[IndexedSequence]:
        """This rank's share of sequences ``first`` to ``first + count``, of ``last`` that the whole run needs."""
        out = []
        numbers = [number for number in range(first, first + count) if number % self._n_shards in self._cursors]
        for number in numbers:
            shard = number % self._n_shards
            # Whatever lies before the first kept token's sequence has nothing to train on.
            sequences, self._cursors[shard] = self._prefetcher.read(shard, self._cursors[shard], 1)
            out.append(IndexedSequence(number, sequences[-1]))
        # Only now, for what is needed at once must not wait for what is needed later.
        for number in range(first + count, min(first + count + self._n_shards, n_run_sequences)):
            shard = number % self._n_shards
            if shard in self._cursors:
                self._prefetcher.start_prefetch(shard, self._cursors[shard], 1)
        return out
