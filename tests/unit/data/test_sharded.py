"""The order of the data: every sequence once an epoch, whatever is read, by whom, and in which order."""

from __future__ import annotations

import numpy as np
import pytest

from saetrain.data.packing import Sequences
from saetrain.data.sharded import LoaderSettings, ShardedSequences, group_sequences
from saetrain.errors import SaetrainError
from saetrain.types import ModelBatch, TokenKind, TokenSequence

SPECIAL, FIRST = int(TokenKind.SPECIAL), int(TokenKind.FIRST)


class Numbered(Sequences):
    """Sequence i is 3 to 6 tokens of document i between two special ones; those in ``empty`` hold no text."""

    def __init__(self, count: int, empty: frozenset[int] = frozenset()) -> None:
        self._count, self._empty = count, empty
        self.lengths = 5 + np.arange(count) % 4
        self.text_tokens = sum(3 + i % 4 for i in range(count) if i not in empty)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> TokenSequence:
        kind = np.zeros(5 + index % 4, dtype=np.uint8)
        kind[[0, -1]] = SPECIAL
        kind[0] |= FIRST
        if index in self._empty:
            kind[:] = SPECIAL
        return TokenSequence(np.full(len(kind), index, dtype=np.int32), kind, np.full(len(kind), index))


def sharded(count: int, shards: int = 4, seed: int = 42, empty: frozenset[int] = frozenset()) -> ShardedSequences:
    """Each sequence is a batch."""
    settings = LoaderSettings(shuffle_seed=seed, data_shards=shards)
    return ShardedSequences(Numbered(count, empty), settings, True, True, 1)


def flatten_batches(batches: list[ModelBatch]) -> list[TokenSequence]:
    return [sequence for batch in batches for sequence in batch]


def numbers(batches: list[ModelBatch]) -> list[int]:
    return [int(sequence.ids[0]) for sequence in flatten_batches(batches)]


def stream(data: ShardedSequences, length: int) -> list[int]:
    """The first ``length`` sequence numbers of the run, in the order in which they are dealt."""
    shards = [[] for _ in range(data.n_shards)]  # type: ignore[var-annotated]
    for shard, out in enumerate(shards):
        cursor = data.start_cursor
        while len(out) * data.n_shards < length + data.n_shards:
            read, cursor = data.read(shard, cursor, 1)
            out.extend(numbers(read))
    return [shards[position % data.n_shards][position // data.n_shards] for position in range(length)]


@pytest.mark.parametrize(("count", "shards"), [(23, 4), (3, 16), (16, 16), (5, 1)])
def test_every_epoch_visits_each_sequence_once(count: int, shards: int) -> None:
    order = stream(sharded(count, shards), 3 * count)
    epochs = [order[start : start + count] for start in range(0, 3 * count, count)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(count))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_order_is_the_seed_s() -> None:
    assert stream(sharded(40), 40) == stream(sharded(40), 40)
    assert stream(sharded(40, seed=1), 40) != stream(sharded(40), 40)


def test_a_shard_does_not_depend_on_which_others_are_read_and_when() -> None:
    alone = {shard: numbers(sharded(23).read(shard, (0,), 60)[0]) for shard in range(4)}
    together = sharded(23)
    # Backwards, and interleaved with reads of other epochs, as ranks with other shards would.
    for shard in (3, 1, 0, 2):
        together.read((shard + 1) % 4, (30,), 5)
        assert numbers(together.read(shard, (0,), 60)[0]) == alone[shard]


def test_reading_goes_on_from_any_cursor() -> None:
    data = sharded(23)
    whole, end = data.read(2, (0,), 100)
    pieces: list[int] = []
    cursor = data.start_cursor
    while cursor < end:
        read, cursor = data.read(2, cursor, 1)
        pieces.extend(numbers(read))
    assert pieces == numbers(whole)
    assert numbers(sharded(23).read(2, (7,), 30)[0]) == numbers(whole)[7 : 7 + len(data.read(2, (7,), 30)[0])]


@pytest.mark.parametrize("tokens", [1, 3, 10, 57])
def test_as_many_sequences_as_hold_the_tokens_and_no_more(tokens: int) -> None:
    data = sharded(23)
    read, cursor = data.read(1, (0,), tokens)
    kept = [data.count_kept(batch) for batch in read]
    assert cursor == (len(read),)
    assert sum(kept) >= tokens > sum(kept[:-1])


@pytest.mark.parametrize(("special", "first"), [(True, True), (True, False), (False, True), (False, False)])
def test_token_policy(special: bool, first: bool) -> None:
    data = ShardedSequences(Numbered(1), LoaderSettings(), special, first, 1)
    kinds = np.array([0, SPECIAL, FIRST, SPECIAL | FIRST], dtype=np.uint8)
    keep = data.keep(TokenSequence(np.zeros(4, dtype=np.int32), kinds, np.zeros(4, dtype=np.int64)))
    assert keep.tolist() == [True, not special, not first, not (special or first)]


def test_a_shard_that_meets_only_empty_sequences_for_long_reads_on() -> None:
    # As many shards as sequences: each gets one a pass, and the one with text comes by after a while.
    data = sharded(16, 16, empty=frozenset(range(1, 16)))
    for shard in range(16):
        assert numbers(data.read(shard, (0,), 1)[0])[-1] == 0


def test_data_without_a_kept_token_are_an_error() -> None:
    with pytest.raises(SaetrainError, match="no token that the token policy keeps"):
        sharded(8, empty=frozenset(range(8))).read(0, (0,), 1)


def batches_of_one_epoch(seed: int, shards: int) -> set[tuple[int, ...]]:
    settings = LoaderSettings(shuffle_seed=seed, data_shards=shards)
    data = ShardedSequences(Numbered(50), settings, True, True, 24)
    positions = range(len(data._batches))
    return {tuple(numbers([data.read(p % shards, (p // shards,), 1)[0][0]])) for p in positions}


def test_batches_depend_on_neither_the_seed_nor_the_shards() -> None:
    """So that activations can be stored and used by other runs."""
    batches = batches_of_one_epoch(42, 4)
    assert batches == batches_of_one_epoch(1, 4) == batches_of_one_epoch(42, 16)
    assert sorted(number for batch in batches for number in batch) == list(range(50))


@pytest.mark.parametrize("tokens", [1, 5, 24, 1000])
def test_a_batch_has_sequences_of_similar_length_and_bounded_padding(tokens: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 20, 3000)
    groups = group_sequences(lengths, tokens)
    assert sorted(np.concatenate(groups).tolist()) == list(range(3000))
    padded = [int(lengths[group].max()) * len(group) for group in groups]
    assert all(count <= tokens or len(group) == 1 for count, group in zip(padded, groups, strict=True))
    if tokens == 1000:
        assert sum(padded) < 1.15 * lengths.sum(), "little padding"
        assert np.mean([np.ptp(group) for group in groups]) > 1500, "text from everywhere"


def test_the_first_batches_come_from_as_many_shards_as_needed() -> None:
    data = ShardedSequences(Numbered(200), LoaderSettings(data_shards=8), True, True, 24)
    few, many = data.read_first_batches(10), data.read_first_batches(600)
    assert sum(map(data.count_kept, few)) >= 10
    assert len(few) <= 2
    assert 600 <= sum(map(data.count_kept, many)) <= 600 + 8 * 24
    assert [numbers([batch]) for batch in many[: len(few)]] == [numbers([batch]) for batch in few]


@pytest.mark.parametrize(("field", "value"), [("data_shards", 0), ("shuffle_seed", -1)])
def test_settings_out_of_range(field: str, value: int) -> None:
    with pytest.raises(SaetrainError, match=f"--{field} {value}"):
        LoaderSettings(**{field: value})
