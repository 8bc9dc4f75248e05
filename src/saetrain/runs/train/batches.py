"""The micro-batches of a run: shuffled activations, or whole sequences for the end-to-end losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from saetrain import distributed
from saetrain.activations.buffer import ShuffleBuffer
from saetrain.activations.lm_batches import LMBatch, LMBatchBuilder
from saetrain.activations.normalize import Normalizer
from saetrain.activations.sequence_sampler import SequenceSampler
from saetrain.distributed import env
from saetrain.runs.train.end_to_end import SplicedBatchBuilder
from saetrain.runs.train.setup import RunContext
from saetrain.training.trainer import MicroBatch

BatchSourceState = dict[str, list[int]]

SEQUENCE_NUMBER_BITS = 40
"""Low bits of a mask's seed that hold the number of the sequence in the run."""


class BatchSource(ABC):
    """Micro-batches by their number in the run.

    They are requested in order, each by :meth:`fetch_local_part` and :meth:`exchange_parts`.
    """

    @abstractmethod
    def fetch_local_part(self, number: int) -> Any:
        """Return this rank's part of micro-batch ``number``; may raise what the extractor's `before_batch` raises."""

    @abstractmethod
    def needs_exchange(self, number: int) -> bool:
        """Return whether :meth:`exchange_parts` communicates for ``number``, so that every rank must call it."""

    @abstractmethod
    def exchange_parts(self, number: int, part: Any) -> MicroBatch:
        """Return the micro-batch of this rank's SAEs, from the part that :meth:`fetch_local_part` returned."""

    def prefetch_pools(self) -> None:
        """Prepare later micro-batches; may raise what the extractor's `before_batch` raises."""
        return

    def get_micro_batch(self, number: int) -> MicroBatch:
        """Return micro-batch ``number``, for callers that exchange no flags in between."""
        return self.exchange_parts(number, self.fetch_local_part(number))

    @abstractmethod
    def state_dict(self) -> BatchSourceState:
        """Return the position in the text: a few integers per shard."""

    @abstractmethod
    def load_state_dict(self, state: BatchSourceState) -> None:
        """Restore a position that :meth:`state_dict` returned."""

    @abstractmethod
    def close(self) -> None:
        """Stop prefetching."""

    @abstractmethod
    def startup_message(self) -> str | None:
        """Return a message about slow work before the first batch, or None."""

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
        self._micro_tokens = run.plan.tokens_per_step // run.config.train.grad_acc_steps

    def fetch_local_part(self, number: int) -> dict[str, Tensor]:
        """Return the activations of this rank's shards, of a micro-batch of batch_size x ctx_len per rank."""
        return self._buffer.take_activations(number * self._micro_tokens, self._micro_tokens, self._run.plan.n_tokens)

    def prefetch_pools(self) -> None:
        """Fill the next pools of the buffer, because activations do not depend on the SAEs."""
        self._buffer.prefetch_pools()

    def needs_exchange(self, number: int) -> bool:
        """Return whether each SAE belongs to one rank."""
        return bool(self._run.placement.owners)

    def exchange_parts(self, number: int, part: dict[str, Tensor]) -> MicroBatch:
        """Return the part itself, or all ranks' activations of the hookpoints that this rank owns."""
        owners = self._run.placement.owners
        if not owners:
            return part
        first, shards = number * self._micro_tokens, self._run.train_source.n_shards
        rows = [
            sum(
                len(range(first + (shard - first) % shards, first + self._micro_tokens, shards))
                for shard in shards_for_rank(r, shards)
            )
            for r in range(env.world_size())
        ]
        return distributed.all_to_all_by_owner(part, owners, rows)

    def state_dict(self) -> BatchSourceState:
        """Return the position of the shuffle buffer."""
        return self._buffer.state_dict()

    def load_state_dict(self, state: BatchSourceState) -> None:
        """Restore the position of the shuffle buffer."""
        self._buffer.load_state_dict(state)

    def close(self) -> None:
        """Close the shuffle buffer."""
        self._buffer.close()

    def startup_message(self) -> str | None:
        """Return a message about the shuffle buffer, which is filled first."""
        fill = min(self._run.config.buffer.buffer_tokens, self._run.plan.n_tokens)
        return f"filling the shuffle buffer (up to {fill:,} activations)"

    def describe_state(self, state: BatchSourceState) -> dict[str, Any]:
        """Return {shard: its pool and the position in it}."""
        names = ("pool", "pool_tokens", "taken", "cursor")
        return {shard: dict(zip(names, (*row[:3], row[3:]), strict=True)) for shard, row in state.items()}


class SequenceBatches(BatchSource):
    """Micro-batches of batch_size whole sequences per rank, with the loss of the model that reads them."""

    def __init__(self, run: RunContext, owned: list[int], normalizers: dict[str, Normalizer]) -> None:
        assert run.head is not None
        self._run, self._settings = run, run.config.train
        self._sampler = SequenceSampler(run.train_source, owned, run.train_source.n_shards)
        self._lm_batches = LMBatchBuilder(run.head, run.extractor.keep, run.tokenizer.mask_token_id)
        (normalizer,) = normalizers.values()
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
        if self._run.extractor.before_batch is not None:
            self._run.extractor.before_batch()
        return self._step_lm_batches[micro]

    def needs_exchange(self, number: int) -> bool:
        """Return whether this is a step's first micro-batch, which sums the token counts over the ranks."""
        return number % self._settings.grad_acc_steps == 0

    def exchange_parts(self, number: int, part: LMBatch) -> MicroBatch:
        """Run the model on the part; losses are divided by the token counts of all ranks in the step."""
        if self.needs_exchange(number):
            tokens = sum(int(lm_batch.keep_mask.sum()) for lm_batch in self._step_lm_batches)
            scored = sum(len(lm_batch.targets) for lm_batch in self._step_lm_batches)
            tokens, scored = distributed.all_reduce_sum([tokens, scored], "counting tokens")
            self._step_counts = tokens, scored
        return {self._run.hookpoints[0]: self._spliced_batches.build_batch(part, *self._step_counts)}

    def _read_lm_batch(self, number: int) -> LMBatch:
        share = self._settings.batch_size * env.world_size()
        last = self._run.plan.steps * self._settings.grad_acc_steps * share
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

    def close(self) -> None:
        """Close the sequence sampler."""
        self._sampler.close()

    def startup_message(self) -> str | None:
        """Return None, because the first batch takes no longer than the others."""
        return None

    def describe_state(self, state: BatchSourceState) -> dict[str, Any]:
        """Return {shard: position in the text}."""
        return {shard: {"cursor": row} for shard, row in state.items()}
