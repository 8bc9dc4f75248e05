"""The mixing buffer: exact numbers of shuffled activations, recomputable from a few integers.

Every virtual shard fills a pool by running its next sequences through the model, shuffles it by a seed of its own,
and hands it out piece by piece. Sample i of the run comes from shard i mod V. A pool is a function of (shard, number,
cursor, tokens), so a checkpoint holds a few integers a shard, and resuming computes the pool again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from saetrain.activations.ahead import ReadAhead, SequenceSource
from saetrain.activations.read import ActivationReader, Activations, Reading
from saetrain.errors import SaetrainError
from saetrain.transfer import copy_to_device_async
from saetrain.types import Cursor

EARLY_POOLS = 2
"""Pools that may be filled before they are needed: what more memory is taken for them."""


@dataclass(frozen=True, kw_only=True)
class BufferSettings:
    """Mixing: the buffer between the model and the SAEs."""

    buffer_tokens: int = 131_072
    """Activations that are mixed with one another, over all ranks; part of the sample order."""
    exclude_sinks: bool = True
    """Leave out position 0 of causal models and tokens of more than 10 times the median norm."""

    def __post_init__(self) -> None:
        if self.buffer_tokens < 1:
            raise SaetrainError(f"--buffer_tokens {self.buffer_tokens}: must be at least 1")


@dataclass(frozen=True)
class ShardState:
    """Where a shard stands: its current pool and how much of it has been handed out."""

    pool: int
    """Number of the current pool, from 0."""
    tokens: int
    """Kept tokens that were asked for when the pool was read; 0 before the first."""
    taken: int
    """Activations of the pool that have been handed out."""
    cursor: Cursor
    """The shard's cursor at the pool's start."""


@dataclass
class _Early:
    """A pool that is being filled before it is needed."""

    asked: tuple[Cursor, int]
    reading: Reading
    next_cursor: Cursor


@dataclass
class _Pool:
    activations: Activations
    order: Tensor
    next_cursor: Cursor


class MixingBuffer:
    """Deals the shards' shuffled activations; ``owned`` are the shards that this rank serves."""

    def __init__(
        self,
        reader: ActivationReader,
        source: SequenceSource,
        owned: list[int],
        n_shards: int,
        pool_tokens: int,
        seed: int,
    ) -> None:
        assert pool_tokens >= 1, pool_tokens
        self._reader, self._source, self._ahead = reader, source, ReadAhead(source)
        self._owned, self._n_shards = owned, n_shards
        self._pool_tokens, self._seed = pool_tokens, seed
        self._pools: dict[int, _Pool] = {}
        self._next: dict[int, tuple[Cursor, int]] = {}
        self._coming: dict[int, tuple[Cursor, int]] = {}
        self._early: dict[int, _Early] = {}
        self._credit = 0
        self._states = {shard: ShardState(0, 0, 0, source.start) for shard in owned}
        self.outliers_left_out = 0
        self.tokens_read = 0
        self._expect()

    def _expect(self) -> None:
        self._source.expect({shard: state.cursor for shard, state in self._states.items()})

    def state(self) -> dict[str, list[int]]:
        """What :meth:`restore` needs: {shard: [pool, tokens, taken, cursor…]}."""
        return {str(shard): [s.pool, s.tokens, s.taken, *s.cursor] for shard, s in self._states.items()}

    def restore(self, state: dict[str, list[int]]) -> None:
        """Stand where :meth:`state` was taken; the pools are computed again when they are next needed."""
        rows = {shard: state[str(shard)] for shard in self._owned}
        self._states = {shard: ShardState(row[0], row[1], row[2], tuple(row[3:])) for shard, row in rows.items()}
        self._pools.clear()
        self._ahead.forget()
        for waiting in (self._next, self._coming, self._early):
            waiting.clear()
        self._expect()

    def close(self) -> None:
        """Read no further ahead."""
        self._ahead.close()

    def take(self, first: int, count: int, last: int) -> dict[str, Tensor]:
        """{hookpoint: (n, D)}: this rank's share of samples ``first`` to ``first + count`` of the whole run.

        ``last``: samples that the whole run needs, so that no pool is filled beyond its use.
        """
        pieces = [
            piece
            for shard in self._owned
            for piece in self._take(shard, *self._share(shard, first, first + count), self._share(shard, 0, last)[1])
        ]
        # Only now, for a pool that is needed at once must not wait for one that is needed later.
        for shard, (cursor, tokens) in self._next.items():
            self._ahead.expect(shard, cursor, tokens)
        self._coming.update(self._next)
        self._next.clear()
        taken = {name: torch.cat([piece[name] for piece in pieces]) for name in self._reader.capture.hookpoints}
        self._credit += len(next(iter(taken.values())))
        return taken

    def work_ahead(self) -> None:
        """Run the model for pools that run out next, over about as many tokens as were handed out since.

        Changes nothing but time: it spreads the refills evenly over the steps.
        """
        left = {shard: len(self._pools[shard].activations) - self._states[shard].taken for shard in self._coming}
        for shard in sorted(left, key=left.__getitem__)[:EARLY_POOLS]:
            self._fill_early(shard)
        self._credit = min(self._credit, 0)

    def _fill_early(self, shard: int) -> None:
        """As much of the shard's next pool as there is credit for, unless its text is not there yet."""
        asked = self._coming[shard]
        if self._credit <= 0 or not (shard in self._early or self._ahead.ready(shard, *asked)):
            return
        if shard not in self._early:
            sequences, behind = self._ahead.read(shard, *asked)
            self._early[shard] = _Early(asked, Reading(self._reader, sequences), behind)
        try:
            while self._credit > 0:
                tokens = self._early[shard].reading.advance()
                if tokens is None:
                    return
                self._credit -= tokens
        except SaetrainError:
            # It is raised where the pool is needed, for the steps before it are good.
            del self._early[shard], self._coming[shard]
        except BaseException:
            # What was broken off half-way can't be gone on with.
            del self._early[shard]
            raise

    def _share(self, shard: int, first: int, stop: int) -> tuple[int, int]:
        """The shard's own sample numbers among samples ``first`` to ``stop`` of the run, as a range."""

        def before(position: int) -> int:
            return (position - shard + self._n_shards - 1) // self._n_shards

        return before(first), before(stop)

    def _take(self, shard: int, start: int, stop: int, last: int) -> list[dict[str, Tensor]]:
        pieces = []
        while start < stop:
            pool = self._pool(shard, last - start)
            state = self._states[shard]
            taken = min(stop - start, len(pool.activations) - state.taken)
            rows = pool.order[state.taken : state.taken + taken]
            pieces.append({name: value.index_select(0, rows) for name, value in pool.activations.values.items()})
            self._states[shard] = replace(state, taken=state.taken + taken)
            start += taken
        return pieces

    def _pool(self, shard: int, needed: int) -> _Pool:
        """The shard's pool with something left in it, read anew where it is missing or used up."""
        state = self._states[shard]
        if state.tokens and shard not in self._pools:
            self._pools[shard] = self._fill(shard, state, needed + state.taken)
        while not state.tokens or state.taken >= len(self._pools[shard].activations):
            cursor = self._pools.pop(shard).next_cursor if state.tokens else self._source.start
            state = ShardState(state.pool + bool(state.tokens), self._size(shard, state, needed), 0, cursor)
            self._states[shard] = state
            self._pools[shard] = self._fill(shard, state, needed)
        return self._pools[shard]

    def _size(self, shard: int, state: ShardState, needed: int) -> int:
        """Tokens of the shard's next pool; first pools differ, so that the refills spread over the steps."""
        full = self._pool_tokens
        if not state.tokens:
            full = max(1, full * (shard + 1) // self._n_shards)
        return min(full, needed)

    def _fill(self, shard: int, state: ShardState, needed: int) -> _Pool:
        """Pool ``state.pool`` of the shard; from its start to the run's end ``needed`` activations are used."""
        early, asked = self._early.pop(shard, None), (state.cursor, state.tokens)
        self._coming.pop(shard, None)
        if early is not None and early.asked == asked:
            reading, cursor = early.reading, early.next_cursor
        else:
            sequences, cursor = self._ahead.read(shard, *asked)
            reading = Reading(self._reader, sequences)
        activations = reading.finish()
        rest = needed - len(activations)
        if rest > 0:
            self._next[shard] = cursor, self._size(shard, state, rest)
        self.outliers_left_out += activations.n_outliers
        self.tokens_read += len(activations) + activations.n_outliers
        order = np.random.default_rng([self._seed, shard, state.pool]).permutation(len(activations))
        device = next(iter(activations.values.values())).device
        return _Pool(activations, copy_to_device_async(order, device), cursor)
