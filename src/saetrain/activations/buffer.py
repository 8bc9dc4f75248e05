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

from saetrain.activations.extract import ActivationExtractor, Activations, Extraction
from saetrain.activations.prefetch import Prefetcher, SequenceSource
from saetrain.async_copy import copy_to_device_async
from saetrain.errors import SaetrainError
from saetrain.types import Cursor

MAX_EARLY_POOLS = 2
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
class _EarlyPool:
    """A pool that is being filled before it is needed."""

    request: tuple[Cursor, int]
    extraction: Extraction
    next_cursor: Cursor


@dataclass
class _Pool:
    activations: Activations
    order: Tensor
    next_cursor: Cursor


class ShuffleBuffer:
    """Deals the shards' shuffled activations; ``owned`` are the shards that this rank serves."""

    def __init__(
        self,
        extractor: ActivationExtractor,
        source: SequenceSource,
        owned_shards: list[int],
        n_shards: int,
        pool_tokens: int,
        seed: int,
    ) -> None:
        assert pool_tokens >= 1, pool_tokens
        self._extractor, self._source, self._prefetcher = extractor, source, Prefetcher(source)
        self._owned_shards, self._n_shards = owned_shards, n_shards
        self._pool_tokens, self._seed = pool_tokens, seed
        self._pools: dict[int, _Pool] = {}
        self._to_prefetch: dict[int, tuple[Cursor, int]] = {}
        self._upcoming: dict[int, tuple[Cursor, int]] = {}
        self._early_pools: dict[int, _EarlyPool] = {}
        self._token_budget = 0
        self._shard_states = {shard: ShardState(0, 0, 0, source.start_cursor) for shard in owned_shards}
        self.n_outliers = 0
        self.n_tokens_read = 0
        self._hint_cursors()

    def _hint_cursors(self) -> None:
        self._source.hint_cursors({shard: state.cursor for shard, state in self._shard_states.items()})

    def state_dict(self) -> dict[str, list[int]]:
        """What :meth:`restore` needs: {shard: [pool, tokens, taken, cursor…]}."""
        return {str(shard): [s.pool, s.tokens, s.taken, *s.cursor] for shard, s in self._shard_states.items()}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        """Stand where :meth:`state` was taken; the pools are computed again when they are next needed."""
        rows = {shard: state[str(shard)] for shard in self._owned_shards}
        self._shard_states = {shard: ShardState(row[0], row[1], row[2], tuple(row[3:])) for shard, row in rows.items()}
        self._pools.clear()
        self._prefetcher.cancel_prefetches()
        for waiting in (self._to_prefetch, self._upcoming, self._early_pools):
            waiting.clear()
        self._hint_cursors()

    def close(self) -> None:
        """Read no further ahead."""
        self._prefetcher.close()

    def take_activations(self, first: int, count: int, n_run_samples: int) -> dict[str, Tensor]:
        """{hookpoint: (n, D)}: this rank's share of samples ``first`` to ``first + count`` of the whole run.

        ``last``: samples that the whole run needs, so that no pool is filled beyond its use.
        """
        pieces = [
            piece
            for shard in self._owned_shards
            for piece in self._take_from_shard(
                shard, *self._shard_range(shard, first, first + count), self._shard_range(shard, 0, n_run_samples)[1]
            )
        ]
        # Only now, for a pool that is needed at once must not wait for one that is needed later.
        for shard, (cursor, tokens) in self._to_prefetch.items():
            self._prefetcher.start_prefetch(shard, cursor, tokens)
        self._upcoming.update(self._to_prefetch)
        self._to_prefetch.clear()
        taken = {name: torch.cat([piece[name] for piece in pieces]) for name in self._extractor.capture.hookpoints}
        self._token_budget += len(next(iter(taken.values())))
        return taken

    def prefetch_pools(self) -> None:
        """Run the model for pools that run out next, over about as many tokens as were handed out since.

        Changes nothing but time: it spreads the refills evenly over the steps.
        """
        left = {
            shard: len(self._pools[shard].activations) - self._shard_states[shard].taken for shard in self._upcoming
        }
        for shard in sorted(left, key=left.__getitem__)[:MAX_EARLY_POOLS]:
            self._prefetch_pool(shard)
        self._token_budget = min(self._token_budget, 0)

    def _prefetch_pool(self, shard: int) -> None:
        """As much of the shard's next pool as there is credit for, unless its text is not there yet."""
        request = self._upcoming[shard]
        if self._token_budget <= 0 or not (shard in self._early_pools or self._prefetcher.is_ready(shard, *request)):
            return
        if shard not in self._early_pools:
            sequences, next_cursor = self._prefetcher.read(shard, *request)
            self._early_pools[shard] = _EarlyPool(request, Extraction(self._extractor, sequences), next_cursor)
        try:
            while self._token_budget > 0:
                tokens = self._early_pools[shard].extraction.run_next_batch()
                if tokens is None:
                    return
                self._token_budget -= tokens
        except SaetrainError:
            # It is raised where the pool is needed, for the steps before it are good.
            del self._early_pools[shard], self._upcoming[shard]
        except BaseException:
            # What was broken off half-way can't be gone on with.
            del self._early_pools[shard]
            raise

    def _shard_range(self, shard: int, first: int, stop: int) -> tuple[int, int]:
        """The shard's own sample numbers among samples ``first`` to ``stop`` of the run, as a range."""

        def count_before(position: int) -> int:
            return (position - shard + self._n_shards - 1) // self._n_shards

        return count_before(first), count_before(stop)

    def _take_from_shard(self, shard: int, start: int, stop: int, shard_end: int) -> list[dict[str, Tensor]]:
        pieces = []
        while start < stop:
            pool = self._current_pool(shard, shard_end - start)
            state = self._shard_states[shard]
            taken = min(stop - start, len(pool.activations) - state.taken)
            rows = pool.order[state.taken : state.taken + taken]
            pieces.append({name: value.index_select(0, rows) for name, value in pool.activations.values.items()})
            self._shard_states[shard] = replace(state, taken=state.taken + taken)
            start += taken
        return pieces

    def _current_pool(self, shard: int, needed: int) -> _Pool:
        """The shard's pool with something left in it, read anew where it is missing or used up."""
        state = self._shard_states[shard]
        if state.tokens and shard not in self._pools:
            self._pools[shard] = self._fill_pool(shard, state, needed + state.taken)
        while not state.tokens or state.taken >= len(self._pools[shard].activations):
            cursor = self._pools.pop(shard).next_cursor if state.tokens else self._source.start_cursor
            state = ShardState(state.pool + bool(state.tokens), self._next_pool_size(shard, state, needed), 0, cursor)
            self._shard_states[shard] = state
            self._pools[shard] = self._fill_pool(shard, state, needed)
        return self._pools[shard]

    def _next_pool_size(self, shard: int, state: ShardState, needed: int) -> int:
        """Tokens of the shard's next pool; first pools differ, so that the refills spread over the steps."""
        full = self._pool_tokens
        if not state.tokens:
            full = max(1, full * (shard + 1) // self._n_shards)
        return min(full, needed)

    def _fill_pool(self, shard: int, state: ShardState, needed: int) -> _Pool:
        """Pool ``state.pool`` of the shard; from its start to the run's end ``needed`` activations are used."""
        early, request = self._early_pools.pop(shard, None), (state.cursor, state.tokens)
        self._upcoming.pop(shard, None)
        if early is not None and early.request == request:
            extraction, cursor = early.extraction, early.next_cursor
        else:
            sequences, cursor = self._prefetcher.read(shard, *request)
            extraction = Extraction(self._extractor, sequences)
        activations = extraction.run_remaining()
        rest = needed - len(activations)
        if rest > 0:
            self._to_prefetch[shard] = cursor, self._next_pool_size(shard, state, rest)
        self.n_outliers += activations.n_outliers
        self.n_tokens_read += len(activations) + activations.n_outliers
        order = np.random.default_rng([self._seed, shard, state.pool]).permutation(len(activations))
        device = next(iter(activations.values.values())).device
        return _Pool(activations, copy_to_device_async(order, device), cursor)
