"""What the trainer is fed: mixed activations, or whole sequences where the loss is the model's own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from saetrain import distributed, launch
from saetrain.activations.deal import SequenceSampler
from saetrain.activations.normalize import Normalizer
from saetrain.activations.shuffle import ShuffleBuffer
from saetrain.runs.end_to_end import Asker, EndToEnd, Question
from saetrain.runs.prepare import Prepared
from saetrain.training.trainer import MicroBatch

State = dict[str, list[int]]


class Feed(ABC):
    """Micro-batches by their number in the run; asked for in order, each by :meth:`fetch` and :meth:`join`."""

    @abstractmethod
    def fetch(self, number: int) -> Any:
        """This rank's part of micro-batch ``number``; may raise what the reader's `between_batches` raises."""

    @abstractmethod
    def exchanges(self, number: int) -> bool:
        """Whether :meth:`join` of micro-batch ``number`` exchanges something, so that every rank must come to it."""

    @abstractmethod
    def join(self, number: int, part: Any) -> MicroBatch:
        """What the SAEs of this rank are trained on, from what :meth:`fetch` gave."""

    def work_ahead(self) -> None:
        """Do some of what later micro-batches need; may raise what the reader's `between_batches` raises."""
        return

    def micro_batch(self, number: int) -> MicroBatch:
        """Micro-batch ``number``, where nobody has to agree in between."""
        return self.join(number, self.fetch(number))

    @abstractmethod
    def state(self) -> State:
        """Where it stands: a few integers a shard."""

    @abstractmethod
    def restore(self, state: State) -> None:
        """Stand where :meth:`state` was taken."""

    @abstractmethod
    def close(self) -> None:
        """Read no further ahead."""

    @abstractmethod
    def opening(self) -> str | None:
        """What it has to do before the first batch, where that takes long."""

    @abstractmethod
    def shown(self, state: State) -> dict[str, Any]:
        """A state with names, for a reader."""


def make_feed(run: Prepared, normalizers: dict[str, Normalizer]) -> Feed:
    """The feed that the loss needs, at its start; ``normalizers`` {hookpoint: constants of its inputs}."""
    shards = run.train.n_shards
    owned = shards_of(launch.rank(), shards)
    if run.head is not None:
        return SequenceFeed(run, owned, normalizers)
    return MixedFeed(run, owned)


def shards_of(rank: int, shards: int) -> list[int]:
    """The virtual shards that a rank reads."""
    return list(range(rank, shards, launch.world_size()))


class MixedFeed(Feed):
    """Activations out of the mixing buffer."""

    def __init__(self, run: Prepared, owned: list[int]) -> None:
        self._run, shards = run, run.train.n_shards
        pool, seed = max(1, run.config.buffer.buffer_tokens // shards), run.config.loader.shuffle_seed
        self._buffer = ShuffleBuffer(run.reader, run.train, owned, shards, pool, seed)
        self._share = run.plan.tokens_per_step // run.config.train.grad_acc_steps

    def fetch(self, number: int) -> dict[str, Tensor]:
        """This rank's shards' part of the ranks' batch_size x ctx_len activations."""
        return self._buffer.take_activations(number * self._share, self._share, self._run.plan.tokens)

    def work_ahead(self) -> None:
        """The next pools, for activations don't depend on the SAEs."""
        self._buffer.prefetch_pools()

    def exchanges(self, number: int) -> bool:
        """Where SAEs are dealt to the ranks."""
        return bool(self._run.division.owners)

    def join(self, number: int, part: dict[str, Tensor]) -> MicroBatch:
        """The same, or all ranks' activations of the hookpoints that are this rank's."""
        owners = self._run.division.owners
        if not owners:
            return part
        first, shards = number * self._share, self._run.train.n_shards
        rows = [
            sum(
                len(range(first + (shard - first) % shards, first + self._share, shards))
                for shard in shards_of(r, shards)
            )
            for r in range(launch.world_size())
        ]
        return distributed.all_to_all_by_owner(part, owners, rows)

    def state(self) -> State:
        """The buffer's."""
        return self._buffer.state_dict()

    def restore(self, state: State) -> None:
        """Into the buffer."""
        self._buffer.load_state_dict(state)

    def close(self) -> None:
        """Close the buffer."""
        self._buffer.close()

    def opening(self) -> str | None:
        """It fills its pools first."""
        fill = min(self._run.config.buffer.buffer_tokens, self._run.plan.tokens)
        return f"filling the mixing buffer (up to {fill:,} activations)"

    def shown(self, state: State) -> dict[str, Any]:
        """Each shard's pool and place in it."""
        names = ("pool", "pool_tokens", "taken", "cursor")
        return {shard: dict(zip(names, (*row[:3], row[3:]), strict=True)) for shard, row in state.items()}


class SequenceFeed(Feed):
    """Whole sequences, batch_size a micro-step, with the loss of the model that reads them."""

    def __init__(self, run: Prepared, owned: list[int], normalizers: dict[str, Normalizer]) -> None:
        assert run.head is not None
        self._run, self._settings = run, run.config.train
        self._dealer = SequenceSampler(run.train, owned, run.train.n_shards)
        seed = run.config.loader.shuffle_seed
        self._ask = Asker(run.head, run.reader.keep, run.tokenizer.mask_token_id, seed)
        (normalizer,) = normalizers.values()
        self._model = EndToEnd(run.head, run.reader, normalizer, self._settings)
        self._step: list[Question] = []
        self._counts = (0, 0)

    def fetch(self, number: int) -> Question:
        """All sequences of an optimizer step are read with its first micro-batch, for they say what to divide by."""
        micro = number % self._settings.grad_acc_steps
        if micro == 0:
            self._step = [self._question(number + more) for more in range(self._settings.grad_acc_steps)]
        if self._run.reader.before_batch is not None:
            self._run.reader.before_batch()
        return self._step[micro]

    def exchanges(self, number: int) -> bool:
        """The counts to divide by, with a step's first micro-batch."""
        return number % self._settings.grad_acc_steps == 0

    def join(self, number: int, part: Question) -> MicroBatch:
        """Through the model, with sums divided by what all ranks have in the step."""
        if self.exchanges(number):
            tokens = sum(int(question.keep.sum()) for question in self._step)
            scored = sum(len(question.targets) for question in self._step)
            tokens, scored = distributed.all_reduce_sum([tokens, scored], "counting tokens")
            self._counts = tokens, scored
        return {self._run.hookpoints[0]: self._model.batch(part, *self._counts)}

    def _question(self, number: int) -> Question:
        share = self._settings.batch_size * launch.world_size()
        last = self._run.plan.steps * self._settings.grad_acc_steps * share
        return self._ask(self._dealer.take_sequences(number * share, share, last))

    def state(self) -> State:
        """The dealer's."""
        return self._dealer.state_dict()

    def restore(self, state: State) -> None:
        """Into the dealer."""
        self._dealer.load_state_dict(state)

    def close(self) -> None:
        """Close the dealer."""
        self._dealer.close()

    def opening(self) -> str | None:
        """Nothing: the first batch is like all others."""
        return None

    def shown(self, state: State) -> dict[str, Any]:
        """Each shard's place in the text."""
        return {shard: {"cursor": row} for shard, row in state.items()}
