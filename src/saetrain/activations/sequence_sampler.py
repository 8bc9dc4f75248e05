"""Sequence sampler: whole sequences in the sample order; sequence i of the run comes from virtual shard i mod V."""

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
    """Draws sequences with at least one kept token from ``owned_shards``, the shards of this rank.

    Each batch of ``source`` must be a single sequence.

    The numbers of the sequences depend only on the source, so a checkpoint stores only the shards' cursors.
    """

    def __init__(self, source: SequenceSource, owned_shards: list[int], n_shards: int) -> None:
        self._source, self._prefetcher, self._n_shards = source, Prefetcher(source), n_shards
        self._cursors: dict[int, Cursor] = dict.fromkeys(owned_shards, source.start_cursor)
        source.hint_cursors(self._cursors)

    def state_dict(self) -> dict[str, list[int]]:
        """Return {shard: cursor} for :meth:`load_state_dict`."""
        return {str(shard): list(cursor) for shard, cursor in self._cursors.items()}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        """Continue from a :meth:`state_dict`."""
        self._cursors = {shard: tuple(state[str(shard)]) for shard in self._cursors}
        self._prefetcher.cancel_prefetches()
        self._source.hint_cursors(self._cursors)

    def close(self) -> None:
        """Stop prefetching."""
        self._prefetcher.close()

    def take_sequences(self, first: int, count: int, n_run_sequences: int) -> list[IndexedSequence]:
        """Return this rank's share of sequences ``first`` to ``first + count`` of the run.

        ``n_run_sequences``: number of sequences of the whole run; nothing is prefetched after the last one.
        """
        out = []
        numbers = [number for number in range(first, first + count) if number % self._n_shards in self._cursors]
        for number in numbers:
            shard = number % self._n_shards
            # Only the last batch of a read for one token has a kept token.
            batches, self._cursors[shard] = self._prefetcher.read(shard, self._cursors[shard], 1)
            (sequence,) = batches[-1]
            out.append(IndexedSequence(number, sequence))
        # Prefetching starts last, so that no sequence that is needed now waits for one that is needed later.
        for number in range(first + count, min(first + count + self._n_shards, n_run_sequences)):
            shard = number % self._n_shards
            if shard in self._cursors:
                self._prefetcher.start_prefetch(shard, self._cursors[shard], 1)
        return out
