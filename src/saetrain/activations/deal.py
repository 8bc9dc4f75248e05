"""Whole sequences in the sample order: sequence i of the run is the next one of virtual shard i mod V."""

from __future__ import annotations

from dataclasses import dataclass

from saetrain.activations.ahead import ReadAhead, SequenceSource
from saetrain.types import Cursor, TokenSequence


@dataclass(frozen=True)
class Dealt:
    """A sequence and its number in the run, from 0."""

    number: int
    sequence: TokenSequence


class SequenceDealer:
    """Deals sequences that hold a token that counts; ``owned`` are the shards that this rank serves.

    Which sequence has which number is a function of the source alone, so a checkpoint holds the shards' cursors.
    """

    def __init__(self, source: SequenceSource, owned: list[int], n_shards: int) -> None:
        self._source, self._ahead, self._n_shards = source, ReadAhead(source), n_shards
        self._cursors: dict[int, Cursor] = dict.fromkeys(owned, source.start)
        source.expect(self._cursors)

    def state(self) -> dict[str, list[int]]:
        """What :meth:`restore` needs: {shard: cursor}."""
        return {str(shard): list(cursor) for shard, cursor in self._cursors.items()}

    def restore(self, state: dict[str, list[int]]) -> None:
        """Stand where :meth:`state` was taken."""
        self._cursors = {shard: tuple(state[str(shard)]) for shard in self._cursors}
        self._ahead.forget()
        self._source.expect(self._cursors)

    def close(self) -> None:
        """Read no further ahead."""
        self._ahead.close()

    def take(self, first: int, count: int, last: int) -> list[Dealt]:
        """This rank's share of sequences ``first`` to ``first + count``, of ``last`` that the whole run needs."""
        out = []
        numbers = [number for number in range(first, first + count) if number % self._n_shards in self._cursors]
        for number in numbers:
            shard = number % self._n_shards
            # Whatever lies before the first kept token's sequence has nothing to train on.
            sequences, self._cursors[shard] = self._ahead.read(shard, self._cursors[shard], 1)
            out.append(Dealt(number, sequences[-1]))
        # Only now, for what is needed at once must not wait for what is needed later.
        for number in range(first + count, min(first + count + self._n_shards, last)):
            shard = number % self._n_shards
            if shard in self._cursors:
                self._ahead.expect(shard, self._cursors[shard], 1)
        return out
