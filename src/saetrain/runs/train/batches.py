"""The micro-batches of a run: shuffled activations, or whole sequences for the end-to-end losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor

from saetrain import distributed
from saetrain.activations.buffer import ShuffleBuffer
from saetrain.activations.lm_batches import LMBatch, LMBatchBuilder
from saetrain.activations.normalize import Normalizer
from saetrain.activations.sequence_sampler import SequenceSampler
from saetrain.distributed import env
from saetrain.runs.train.end_to_end import SplicedBatchBuilder
from saetrain.runs.train.setup import RunContext
from saetrain.training.steps.base import MicroBatch
from saetrain.training.trainer import SiteBatches
from saetrain.types import Cursor, TokenGroups

BatchSourceState = dict[str, list[int]]

SEQUENCE_NUMBER_BITS = 40
"""Low bits of a mask's seed that hold the number of the sequence in the run."""


class BatchSource(ABC):
    """Micro-batches by their number in the run.

    They are requested in order, each by :meth:`fetch_local_part` and :meth:`exchange_parts`.
    """

    @abstractmethod
    def fetch_local_part(self, number: int) -> Any:
        """Return this rank's part of micro-batch ``number``; may raise what the interrupt check raises."""

    @abstractmethod
    def needs_exchange(self, number: int) -> bool:
        """Return whether :meth:`exchange_parts` communicates for ``number``, so that every rank must call it."""

    @abstractmethod
    def exchange_parts(self, number: int, part: Any) -> SiteBatches:
        """Return the micro-batches of this rank's SAEs, from the part that :meth:`fetch_local_part` returned."""

    def prefetch_pools(self) -> None:
        """Prepare later micro-batches; may raise what the interrupt check raises."""
        return

    def iterate_batches(self) -> Iterator[SiteBatches]:
        """Yield all micro-batches from the first, for callers that exchange no flags in between."""
        for number in count():
            yield self.exchange_parts(number, self.fetch_local_part(number))

    @abstractmethod
    def state_dict(self) -> BatchSourceState:
        """Return the position in the text: a few integers per shard."""

    @abstractmethod
    def load_state_dict(self, state: BatchSourceState) -> None:
        """Restore a position that :meth:`state_dict` returned."""

    @abstractmethod
    def read_cursors(self, state: BatchSourceState) -> dict[int, Cursor]:
        """Return {shard: cursor of the text near the position of ``state``}."""

    @abstractmethod
    def close(self) -> None:
        """Stop prefetching."""

    def report_fills(self, callback: Callable[[int, float], object]) -> int:
        """Call ``callback`` after each filling of a shuffle buffer; return the activations of the first filling."""
        return 0

    @abstractmethod
    def describe_state(self, state: BatchSourceState) -> dict[str, Any]:
        """Return ``state`` with its integers named, for `spike.json`."""


def build_batch_source(run: RunContext, normalizers: dict[str, Normalizer]) -> BatchSource:
    """Return the batch source that the run's loss needs, at its start; ``normalizers``: {hookpoint: normalizer}."""
    shards = run.train_source.n_shards
    owned = shards_for_rank(env.rank(), shards)
    if run.head is not None:
        return SequenceBatches(run, owned, normalizers)
    return ShuffledBatches(run, owned)


def shards_for_rank(rank: int, shards: int) -> list[int]:
    """Return the virtual shards that a rank reads."""
    return list(range(rank, shards, env.world_size()))


class ShuffledBatches(BatchSource):
    """Micro-batches of activations from the shuffle buffer."""

    def __init__(self, run: RunContext, owned: list[int]) -> None:
        self._run, shards = run, run.train_source.n_shards
        pool, seed = max(1, run.config.buffer.buffer_tokens // shards), run.config.loader.shuffle_seed
        self._buffer = ShuffleBuffer(run.extractor, run.train_source, owned, shards, pool, seed)
        self._micro_tokens = run.resolved.tokens_per_step // run.config.train.grad_acc_steps

    def fetch_local_part(self, number: int) -> dict[str, Tensor]:
        """Return the activations of this rank's shards, of a micro-batch of batch_size x ctx_len per rank."""
        return self._buffer.take_activations(
            number * self._micro_tokens, self._micro_tokens, self._run.resolved.n_tokens
        )

    def prefetch_pools(self) -> None:
        """Fill the next pools of the buffer, because activations do not depend on the SAEs."""
        self._buffer.prefetch_pools()

    def needs_exchange(self, number: int) -> bool:
        """Return whether each SAE belongs to one rank, or the ranks search groups of tokens together."""
        resolved = self._run.resolved
        return bool(resolved.placement.owners) or (resolved.is_data_parallel and resolved.group_tokens is not None)

    def exchange_parts(self, number: int, part: dict[str, Tensor]) -> SiteBatches:
        """Return the part itself, or all ranks' activations of the sites that this rank owns."""
        owners, sites, plans = self._run.resolved.placement.owners, self._run.sites, self._run.plans
        if not owners:
            groups = self._build_groups([self._positions_of_rank(number, env.rank())], part)
            return {name: MicroBatch(*site.select_xy(part), groups=groups) for name, site in sites.items()}
        positions = [self._positions_of_rank(number, rank) for rank in range(env.world_size())]
        rows, groups = [len(each) for each in positions], self._build_groups(positions, part)
        # A hookpoint is sent once to each rank with an SAE that needs it.
        needed = dict.fromkeys((rank, each) for name, rank in owners.items() for each in plans[name].site.hookpoints)
        parts = {f"{rank} {hookpoint}": part[hookpoint] for rank, hookpoint in needed}
        owner_of_part = {f"{rank} {hookpoint}": rank for rank, hookpoint in needed}
        received = distributed.all_to_all_by_owner(parts, owner_of_part, rows)
        own = {hookpoint: received[f"{rank} {hookpoint}"] for rank, hookpoint in needed if rank == env.rank()}
        own_sites = dict.fromkeys(plans[name].site.name for name, rank in owners.items() if rank == env.rank())
        return {name: MicroBatch(*sites[name].select_xy(own), groups=groups) for name in own_sites}

    def _positions_of_rank(self, number: int, rank: int) -> Tensor:
        """Return the positions in micro-batch ``number`` of the rows that a rank reads, in its order, int64."""
        first, shards = number * self._micro_tokens, self._run.train_source.n_shards
        positions = [
            range((shard - first) % shards, self._micro_tokens, shards) for shard in shards_for_rank(rank, shards)
        ]
        return torch.tensor([position for shard in positions for position in shard], dtype=torch.long)

    def _build_groups(self, positions: list[Tensor], part: dict[str, Tensor]) -> TokenGroups | None:
        """Return the groups of the rows at ``positions``, for coders that select in groups."""
        group_tokens = self._run.resolved.group_tokens
        if group_tokens is None:
            return None
        position_N = torch.cat(positions).to(next(iter(part.values())).device)
        return build_groups(self._run, position_N, group_tokens, self._micro_tokens // group_tokens)

    def read_cursors(self, state: BatchSourceState) -> dict[int, Cursor]:
        """Return the cursors at the start of the current pools."""
        return {int(shard): tuple(row[3:]) for shard, row in state.items()}

    def state_dict(self) -> BatchSourceState:
        """Return the position of the shuffle buffer."""
        return self._buffer.state_dict()

    def load_state_dict(self, state: BatchSourceState) -> None:
        """Restore the position of the shuffle buffer."""
        self._buffer.load_state_dict(state)

    def close(self) -> None:
        """Close the shuffle buffer."""
        self._buffer.close()

    def report_fills(self, callback: Callable[[int, float], object]) -> int:
        """Call ``callback`` after each filling of a pool; return the activations of this rank's first pools."""
        self._buffer.on_fill = callback
        return min(self._buffer.count_first_fill(), self._run.resolved.n_tokens // env.world_size())

    def describe_state(self, state: BatchSourceState) -> dict[str, Any]:
        """Return {shard: its pool and the position in it}."""
        names = ("pool", "pool_tokens", "taken", "cursor")
        return {shard: dict(zip(names, (*row[:3], row[3:]), strict=True)) for shard, row in state.items()}


def build_groups(run: RunContext, position_N: Tensor, group_tokens: int, n_groups: int) -> TokenGroups:
    """Return the groups of a micro-batch; data-parallel ranks search them together."""
    if not run.resolved.is_data_parallel:
        return TokenGroups(position_N, group_tokens, n_groups)
    search = partial(distributed.all_reduce_tensor_, phase_name="selecting latents")
    return TokenGroups(position_N, group_tokens, n_groups, search, env.rank() == 0, is_shared=env.world_size() > 1)


class SequenceBatches(BatchSource):
    """Micro-batches of batch_size whole sequences per rank, with the loss of the model that reads them."""

    def __init__(self, run: RunContext, owned: list[int], normalizers: dict[str, Normalizer]) -> None:
        assert run.head is not None
        self._run, self._settings = run, run.config.train
        self._sampler = SequenceSampler(run.train_source, owned, run.train_source.n_shards)
        self._lm_batches = LMBatchBuilder(run.head, run.extractor.keep, run.tokenizer.mask_token_id)
        (self._site,) = run.sites
        normalizer = normalizers[self._site]
        self._spliced_batches = SplicedBatchBuilder(run.head, run.extractor, normalizer, self._settings)
        self._step_lm_batches: list[LMBatch] = []
        self._step_counts = (0, 0)

    def fetch_local_part(self, number: int) -> LMBatch:
        """Return this rank's sequences; the first micro-batch reads the whole step, to count its tokens."""
        micro = number % self._settings.grad_acc_steps
        if micro == 0:
            self._step_lm_batches = [
                self._read_lm_batch(number + more) for more in range(self._settings.grad_acc_steps)
            ]
        self._run.extractor.check_interrupt()
        return self._step_lm_batches[micro]

    def needs_exchange(self, number: int) -> bool:
        """Return whether the ranks sum their token counts, in a step's first micro-batch, or search groups together."""
        return self._is_first(number) or self._run.resolved.group_tokens is not None

    def _is_first(self, number: int) -> bool:
        return number % self._settings.grad_acc_steps == 0

    def exchange_parts(self, number: int, part: LMBatch) -> SiteBatches:
        """Run the model on the part; losses are divided by the token counts of all ranks in the step."""
        if self._is_first(number):
            tokens = sum(int(lm_batch.keep_mask.sum()) for lm_batch in self._step_lm_batches)
            scored = sum(len(lm_batch.targets) for lm_batch in self._step_lm_batches)
            tokens, scored = distributed.all_reduce_sum([tokens, scored], "counting tokens")
            self._step_counts = tokens, scored
        build = partial(self._build_groups, number) if self._run.resolved.group_tokens else None
        return {self._site: self._spliced_batches.build_batch(part, *self._step_counts, build)}

    def _build_groups(self, number: int, rows_BS: Tensor) -> TokenGroups:
        """Return the groups of the rows at the marked positions of this rank's sequences, (B, S) bool."""
        ctx_len, group_tokens = self._run.framing.ctx_len, self._run.resolved.group_tokens
        assert group_tokens is not None
        share, shards = self._settings.batch_size * env.world_size(), self._run.train_source.n_shards
        own = shards_for_rank(env.rank(), shards)
        sequences = [each for each in range(share) if (number * share + each) % shards in own]
        row_N, column_N = rows_BS.nonzero().unbind(1)
        position_N = torch.tensor(sequences, device=row_N.device)[row_N] * ctx_len + column_N
        return build_groups(self._run, position_N, group_tokens, share * ctx_len // group_tokens)

    def _read_lm_batch(self, number: int) -> LMBatch:
        share = self._settings.batch_size * env.world_size()
        last = self._run.resolved.steps * self._settings.grad_acc_steps * share
        indexed = self._sampler.take_sequences(number * share, share, last)
        # The number of the sequence in the run gives each pass over the text other masks.
        first_seed = self._run.config.loader.shuffle_seed << SEQUENCE_NUMBER_BITS
        seeds = [(first_seed + each.index) % (1 << 64) for each in indexed]
        return self._lm_batches.build_batch([each.sequence for each in indexed], seeds)

    def state_dict(self) -> BatchSourceState:
        """Return the position of the sequence sampler."""
        return self._sampler.state_dict()

    def load_state_dict(self, state: BatchSourceState) -> None:
        """Restore the position of the sequence sampler."""
        self._sampler.load_state_dict(state)

    def read_cursors(self, state: BatchSourceState) -> dict[int, Cursor]:
        """Return the cursors after the last sequence."""
        return {int(shard): tuple(row) for shard, row in state.items()}

    def close(self) -> None:
        """Close the sequence sampler."""
        self._sampler.close()

    def describe_state(self, state: BatchSourceState) -> dict[str, Any]:
        """Return {shard: position in the text}."""
        return {shard: {"cursor": row} for shard, row in state.items()}
