"""What the trainer is fed: mixed activations, or whole sequences where the loss is the model's own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from saetrain import distributed
from saetrain.activations.buffer import ShuffleBuffer
from saetrain.activations.normalize import Normalizer
from saetrain.activations.sequence_sampler import SequenceSampler
from saetrain.distributed import env
from saetrain.runs.train.end_to_end import LMBatch, LMBatchBuilder, SplicedBatchBuilder
from saetrain.runs.train.setup import RunContext
from saetrain.training.trainer import MicroBatch

BatchSourceState = dict[str, list[int]]


class BatchSource(ABC):
    """Micro-batches by their number in the run; asked for in order, each by :meth:`fetch` and :meth:`join`."""

    @abstractmethod
    def fetch_local_part(self, number: int) -> Any:
        """This rank's part of micro-batch ``number``; may raise what the reader's `between_batches` raises."""

    @abstractmethod
    def needs_exchange(self, number: int) -> bool:
        """Whether :meth:`join` of micro-batch ``number`` exchanges something, so that every rank must come to it."""

    @abstractmethod
    def exchange_parts(self, number: int, part: Any) -> MicroBatch:
        """What the SAEs of this rank are trained on, from what :meth:`fetch` gave."""

    def prefetch_pools(self) -> None:
        """Do some of what later micro-batches need; may raise what the reader's `between_batches` raises."""
        return

    def get_micro_batch(self, number: int) -> MicroBatch:
        """Micro-batch ``number``, where nobody has to agree in between."""
        return self.exchange_parts(number, self.fetch_local_part(number))

    @abstractmethod
    def state_dict(self) -> BatchSourceState:
        """Where it stands: a few integers a shard."""

    @abstractmethod
    def load_state_dict(self, state: BatchSourceState) -> None:
        """Stand where :meth:`state` was taken."""

    @abstractmethod
    def close(self) -> None:
        """Read no further ahead."""

    @abstractmethod
    def startup_message(self) -> str | None:
        """What it has to do before the first batch, where that takes long."""

    @abstractmethod
    def describe_state(self, state: BatchSourceState) -> dict[str, Any]:
        """A state with names, for a reader."""


def build_batch_source(run: RunContext, normalizers: dict[str, Normalizer]) -> BatchSource:
    """The feed that the loss needs, at its start; ``normalizers`` {hookpoint: constants of its inputs}."""
    shards = run.train_source.n_shards
    owned = shards_for_rank(env.rank(), shards)
    if run.head is not None:
        return SequenceBatches(run, owned, normalizers)
    return ShuffledBatches(run, owned)


def shards_for_rank(rank: int, shards: int) -> list[int]:
    """The virtual shards that a rank reads."""
    return list(range(rank, shards, env.world_size()))


class ShuffledBatches(BatchSource):
    """Activations out of the mixing buffer."""

    def __init__(self, run: RunContext, owned: list[int]) -> None:
        self._run, shards = run, run.train_source.n_shards
        pool, seed = max(1, run.config.buffer.buffer_tokens // shards), run.config.loader.shuffle_seed
        self._buffer = ShuffleBuffer(run.extractor, run.train_source, owned, shards, pool, seed)
        self._micro_tokens = run.plan.tokens_per_step // run.config.train.grad_acc_steps

    def fetch_local_part(self, number: int) -> dict[str, Tensor]:
        """This rank's shards' part of the ranks' batch_size x ctx_len activations."""
        return self._buffer.take_activations(number * self._micro_tokens, self._micro_tokens, self._run.plan.n_tokens)

    def prefetch_pools(self) -> None:
        """The next pools, for activations don't depend on the SAEs."""
        self._buffer.prefetch_pools()

    def needs_exchange(self, number: int) -> bool:
        """Where SAEs are dealt to the ranks."""
        return bool(self._run.placement.owners)

    def exchange_parts(self, number: int, part: dict[str, Tensor]) -> MicroBatch:
        """The same, or all ranks' activations of the hookpoints that are this rank's."""
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
        """The buffer's."""
        return self._buffer.state_dict()

    def load_state_dict(self, state: BatchSourceState) -> None:
        """Into the buffer."""
        self._buffer.load_state_dict(state)

    def close(self) -> None:
        """Close the buffer."""
        self._buffer.close()

    def startup_message(self) -> str | None:
        """It fills its pools first."""
        fill = min(self._run.config.buffer.buffer_tokens, self._run.plan.n_tokens)
        return f"filling the mixing buffer (up to {fill:,} activations)"

    def describe_state(self, state: BatchSourceState) -> dict[str, Any]:
        """Each shard's pool and place in it."""
        names = ("pool", "pool_tokens", "taken", "cursor")
        return {shard: dict(zip(names, (*row[:3], row[3:]), strict=True)) for shard, row in state.items()}


class SequenceBatches(BatchSource):
    """Whole sequences, batch_size a micro-step, with the loss of the model that reads them."""

    def __init__(self, run: RunContext, owned: list[int], normalizers: dict[str, Normalizer]) -> None:
        assert run.head is not None
        self._run, self._settings = run, run.config.train
        self._sampler = SequenceSampler(run.train_source, owned, run.train_source.n_shards)
        seed = run.config.loader.shuffle_seed
        self._build_lm_batch = LMBatchBuilder(run.head, run.extractor.keep, run.tokenizer.mask_token_id, seed)
        (normalizer,) = normalizers.values()
        self._spliced_batches = SplicedBatchBuilder(run.head, run.extractor, normalizer, self._settings)
        self._step_lm_batches: list[LMBatch] = []
        self._step_counts = (0, 0)

    def fetch_local_part(self, number: int) -> LMBatch:
        """All sequences of an optimizer step are read with its first micro-batch, for they say what to divide by."""
        micro = number % self._settings.grad_acc_steps
        if micro == 0:
            self._step_lm_batches = [
                self._read_lm_batch(number + more) for more in range(self._settings.grad_acc_steps)
            ]
        if self._run.extractor.before_batch is not None:
            self._run.extractor.before_batch()
        return self._step_lm_batches[micro]

    def needs_exchange(self, number: int) -> bool:
        """The counts to divide by, with a step's first micro-batch."""
        return number % self._settings.grad_acc_steps == 0

    def exchange_parts(self, number: int, part: LMBatch) -> MicroBatch:
        """Through the model, with sums divided by what all ranks have in the step."""
        if self.needs_exchange(number):
            tokens = sum(int(question.keep_mask.sum()) for question in self._step_lm_batches)
            scored = sum(len(question.targets) for question in self._step_lm_batches)
            tokens, scored = distributed.all_reduce_sum([tokens, scored], "counting tokens")
            self._step_counts = tokens, scored
        return {self._run.hookpoints[0]: self._spliced_batches.build_batch(part, *self._step_counts)}

    def _read_lm_batch(self, number: int) -> LMBatch:
        share = self._settings.batch_size * env.world_size()
        last = self._run.plan.steps * self._settings.grad_acc_steps * share
        return self._build_lm_batch(self._sampler.take_sequences(number * share, share, last))

    def state_dict(self) -> BatchSourceState:
        """The dealer's."""
        return self._sampler.state_dict()

    def load_state_dict(self, state: BatchSourceState) -> None:
        """Into the dealer."""
        self._sampler.load_state_dict(state)

    def close(self) -> None:
        """Close the dealer."""
        self._sampler.close()

    def startup_message(self) -> str | None:
        """Nothing: the first batch is like all others."""
        return None

    def describe_state(self, state: BatchSourceState) -> dict[str, Any]:
        """Each shard's place in the text."""
        return {shard: {"cursor": row} for shard, row in state.items()}
