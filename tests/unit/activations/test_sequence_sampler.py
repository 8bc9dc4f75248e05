"""Whole sequences in the sample order: the shards in turn, whatever the ranks, and from any point on."""

from __future__ import annotations

import numpy as np
import pytest

from saetrain.activations.sequence_sampler import SequenceSampler
from saetrain.data.packing import Sequences
from saetrain.data.sharded import LoaderSettings, ShardedSequences
from saetrain.types import TokenKind, TokenSequence

SHARDS = 4
LAST = 90


class Rows(Sequences):
    """23 sequences of 3 to 9 tokens between two special ones; every fifth has nothing but those."""

    text_tokens = 0
    lengths = np.array([2 if index % 5 == 0 else 5 + index % 7 for index in range(23)])

    def __len__(self) -> int:
        return 23

    def __getitem__(self, index: int) -> TokenSequence:
        length = 2 if index % 5 == 0 else 5 + index % 7
        kind = np.zeros(length, dtype=np.uint8)
        kind[[0, -1]] = TokenKind.SPECIAL
        return TokenSequence(np.full(length, index, dtype=np.int32), kind, np.full(length, index, dtype=np.int64))


def source() -> ShardedSequences:
    return ShardedSequences(Rows(), LoaderSettings(data_shards=SHARDS), True, True, 1)


def dealt(dealer: SequenceSampler, first: int, count: int) -> dict[int, int]:
    """{number in the run: row}."""
    return {each.index: int(each.sequence.doc[0]) for each in dealer.take_sequences(first, count, LAST)}


def make(owned: list[int] | None = None) -> SequenceSampler:
    return SequenceSampler(source(), list(range(SHARDS)) if owned is None else owned, SHARDS)


def test_sequence_i_is_the_next_of_shard_i_mod_v_that_has_a_token() -> None:
    text = source()
    expected = {}
    for shard in range(SHARDS):
        rows = [int(s.doc[0]) for (s,) in text.read(shard, text.start_cursor, 200)[0] if text.keep(s).any()]
        expected.update({place * SHARDS + shard: row for place, row in enumerate(rows)})
    found = dealt(make(), 0, LAST)
    assert found == {number: expected[number] for number in range(LAST)}
    assert not {row for row in found.values() if row % 5 == 0}


@pytest.mark.parametrize("count", [1, 3, 10])
def test_neither_pieces_nor_ranks_change_the_order(count: int) -> None:
    whole = dealt(make(), 0, LAST)
    ranks = [make([0, 2]), make([1, 3])]
    found: dict[int, int] = {}
    for first in range(0, LAST, count):
        for dealer in ranks:
            found.update(dealt(dealer, first, min(count, LAST - first)))
    assert found == whole


@pytest.mark.parametrize("stop", [0, 1, 7, 60])
def test_restored_it_goes_on(stop: int) -> None:
    whole = dealt(make(), 0, LAST)
    before, after = make(), make()
    dealt(before, 0, stop)
    dealt(after, 0, 3)
    after.load_state_dict(before.state_dict())
    assert dealt(after, stop, LAST - stop) == {number: whole[number] for number in range(stop, LAST)}
