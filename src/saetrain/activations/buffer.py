"""Shuffle buffer: exact numbers of shuffled activations, which can be recomputed from a few integers.

Each virtual shard fills a pool by running its next batches through the model, and shuffles the pool with a seed per
pool. Sample i of the run comes from shard i mod V. A pool is a function of (shard, pool number, cursor, tokens), so a
checkpoint stores a few integers per shard, and resume computes the pools again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from saetrain.activations.extract import ActivationExtractor, Activations, Extraction
from saetrain.activations.prefetch import Prefetcher, SequenceSource
from saetrain.async_copy import copy_to_device_async
from saetrain.errors import SaetrainError
from saetrain.settings import Settings, Total
from saetrain.types import Cursor

MAX_EARLY_POOLS = 2
"""Maximum number of pools that are filled before they are needed; each takes additional memory."""


@dataclass(frozen=True, kw_only=True)
class BufferSettings(Settings):
    """Shuffle buffer between the model and the SAEs."""

    buffer_tokens: Total = 131_072
    """Least size of the shuffle buffer in activations, over all ranks. It changes the data order."""
    exclude_sinks: bool = True
    """Exclude position 0 of causal models and tokens whose norm is above 10 times the median."""


@dataclass(frozen=True)
class ShardState:
    """Progress of a shard: its current pool and how many of its activations were taken."""

    pool: int
    """Number of the current pool, from 0."""
    tokens: int
    """Number of kept tokens that were requested for the pool; 0 before the first pool."""
    taken: int
    """Number of activations taken from the pool."""
    cursor: Cursor
    """The shard's cursor at the start of the pool."""


@dataclass
class _EarlyPool:
    """A pool that is filled before it is needed."""

    request: tuple[Cursor, int]
    extraction: Extraction
    next_cursor: Cursor


@dataclass
class _Pool:
    activations: Activations
    order: Tensor
    next_cursor: Cursor


class ShuffleBuffer:
    """Draws shuffled activations from the shards in ``owned_shards``, the shards of this rank.

    ``pool_tokens``: activations per pool. ``on_fill``: called with the activations and seconds of each pool that was
    filled. ``n_outliers`` and ``n_tokens_read`` count tokens that the model has read.
    """

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
        self.on_fill: Callable[[int, float], object] = lambda tokens, seconds: None
        self._hint_cursors()

    def _hint_cursors(self) -> None:
        self._source.hint_cursors({shard: state.cursor for shard, state in self._shard_states.items()})

    def state_dict(self) -> dict[str, list[int]]:
        """Return {shard: [pool, tokens, taken, cursor…]} for :meth:`load_state_dict`."""
        return {str(shard): [s.pool, s.tokens, s.taken, *s.cursor] for shard, s in self._shard_states.items()}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        """Continue from a :meth:`state_dict`; pools are computed again when they are needed."""
        rows = {shard: state[str(shard)] for shard in self._owned_shards}
        self._shard_states = {shard: ShardState(row[0], row[1], row[2], tuple(row[3:])) for shard, row in rows.items()}
        self._pools.clear()
        self._prefetcher.cancel_prefetches()
        for waiting in (self._to_prefetch, self._upcoming, self._early_pools):
            waiting.clear()
        self._hint_cursors()

    def count_first_fill(self) -> int:
        """Return the number of activations that the first pools of this rank hold, or those of the checkpoint."""
        states = self._shard_states.items()
        return sum(state.tokens or self._next_pool_size(shard, state, self._pool_tokens) for shard, state in states)

    def close(self) -> None:
        """Stop prefetching."""
        self._prefetcher.close()

    def take_activations(self, first: int, count: int, n_run_samples: int) -> dict[str, Tensor]:
        """Return {hookpoint: (N, D)}: this rank's share of samples ``first`` to ``first + count`` of the run.

        ``n_run_samples``: number of samples of the whole run, so that no pool is larger than needed.
        """
        pieces = [
            piece
            for shard in self._owned_shards
            for piece in self._take_from_shard(
                shard, *self._shard_range(shard, first, first + count), self._shard_range(shard, 0, n_run_samples)[1]
            )
        ]
        # Prefetching starts last, so that no pool that is needed now waits for one that is needed later.
        for shard, (cursor, tokens) in self._to_prefetch.items():
            self._prefetcher.start_prefetch(shard, cursor, tokens)
        self._upcoming.update(self._to_prefetch)
        self._to_prefetch.clear()
        self._prefetch_stored_pools()
        taken = {name: torch.cat([piece[name] for piece in pieces]) for name in self._extractor.capture.hookpoints}
        self._token_budget += len(next(iter(taken.values())))
        return taken

    def prefetch_pools(self) -> None:
        """Run the model for the pools that are needed next, on about as many tokens as were taken since the last call.

        This affects only time: the refills are spread evenly over the steps.
        """
        for shard in self._find_next_shards():
            self._prefetch_pool(shard)
        self._token_budget = min(self._token_budget, 0)

    def _find_next_shards(self) -> list[int]:
        """Return the MAX_EARLY_POOLS shards that need their next pool first."""
        left = {
            shard: len(self._pools[shard].activations) - self._shard_states[shard].taken for shard in self._upcoming
        }
        return sorted(left, key=left.__getitem__)[:MAX_EARLY_POOLS]

    def _prefetch_stored_pools(self) -> None:
        """Let the cache read the activations of the pools that are needed next, if their text has been read."""
        cache = self._extractor.cache
        for shard in self._find_next_shards() if cache is not None else ():
            batches = self._prefetcher.peek_batches(shard, *self._upcoming[shard])
            if cache is not None and batches is not None:
                cache.prefetch_batches(batches)

    def _prefetch_pool(self, shard: int) -> None:
        """Fill the shard's next pool as far as the token budget allows, if its text has been read."""
        request = self._upcoming[shard]
        if self._token_budget <= 0 or not (shard in self._early_pools or self._prefetcher.is_ready(shard, *request)):
            return
        if shard not in self._early_pools:
            batches, next_cursor = self._prefetcher.read(shard, *request)
            self._early_pools[shard] = _EarlyPool(request, Extraction(self._extractor, batches), next_cursor)
        try:
            while self._token_budget > 0:
                tokens = self._early_pools[shard].extraction.run_next_batch()
                if tokens is None:
                    return
                self._token_budget -= tokens
        except SaetrainError:
            # The error is raised again when the pool is needed, because the steps before it are valid.
            del self._early_pools[shard], self._upcoming[shard]
        except BaseException:
            # An interrupted extraction can't be continued.
            del self._early_pools[shard]
            raise

    def _shard_range(self, shard: int, first: int, stop: int) -> tuple[int, int]:
        """Convert samples ``first`` to ``stop`` of the run to a range of the shard's sample numbers."""

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
        """Return the shard's pool, which is computed if it is missing and replaced by the next if it is used up."""
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
        """Return the size of the shard's next pool; the first pools differ in size, so that refills are staggered."""
        full = self._pool_tokens
        if not state.tokens:
            full = max(1, full * (shard + 1) // self._n_shards)
        return min(full, needed)

    def _fill_pool(self, shard: int, state: ShardState, needed: int) -> _Pool:
        """Compute pool ``state.pool`` of the shard; the run uses ``needed`` activations from its start to the end."""
        start_s = time.monotonic()
        early, request = self._early_pools.pop(shard, None), (state.cursor, state.tokens)
        self._upcoming.pop(shard, None)
        if early is not None and early.request == request:
            extraction, cursor = early.extraction, early.next_cursor
        else:
            batches, cursor = self._prefetcher.read(shard, *request)
            extraction = Extraction(self._extractor, batches)
        activations = extraction.run_remaining()
        rest = needed - len(activations)
        if rest > 0:
            self._to_prefetch[shard] = cursor, self._next_pool_size(shard, state, rest)
        self.n_outliers += activations.n_outliers
        self.n_tokens_read += len(activations) + activations.n_outliers
        order = np.random.default_rng([self._seed, shard, state.pool]).permutation(len(activations))
        device = next(iter(activations.values.values())).device
        self.on_fill(len(activations), time.monotonic() - start_s)
        return _Pool(activations, copy_to_device_async(order, device), cursor)
