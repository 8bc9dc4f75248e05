"""Mixed data sets keep to their shares, in an order that can be taken up anywhere."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pytest

from saetrain.data.mixture import MixedHeldOutSequences, MixedSequences, MixSettings
from saetrain.data.sharded import LoaderSettings, ShardedSequences, ShardedSource
from saetrain.errors import SaetrainError
from saetrain.types import DATASET_ROW_BITS, Cursor, ModelBatch, TokenSequence
from tests.unit.data.test_sharded import Numbered, flatten_batches
from tests.unit.data.test_streaming import documents, iterable, streamed

SHARES = (0.6, 0.3, 0.1)


def mixed(shares: tuple[float, ...], *extra: ShardedSource) -> MixedSequences:
    settings = LoaderSettings(data_shards=4)
    parts = [ShardedSequences(Numbered(count), settings, True, True, 1) for count in (40, 23, 300)]
    return MixedSequences([*parts, *extra][: len(shares)], shares, True, True)


def part_of(sequence: TokenSequence) -> int:
    parts = set((sequence.doc >> DATASET_ROW_BITS).tolist())
    assert len(parts) == 1
    return parts.pop()


def tokens_of_parts(data: MixedSequences, batches: list[ModelBatch], count: int) -> np.ndarray:
    held = np.zeros(count)
    for sequence in flatten_batches(batches):
        held[part_of(sequence)] += data.keep(sequence).sum()
    return held


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.75, 0.25), SHARES, (0.99, 0.01)])
def test_shares_are_met_within_one_percent(shares: tuple[float, ...]) -> None:
    data = mixed(shares)
    for shard in range(4):
        held = tokens_of_parts(data, data.read(shard, data.start_cursor, 4000)[0], len(shares))
        np.testing.assert_allclose(held / held.sum(), shares, atol=0.01)


@pytest.mark.parametrize("with_stream", [False, True])
def test_any_reader_gets_the_same_and_goes_on_from_any_cursor(wordpiece: Any, with_stream: bool) -> None:
    def make() -> MixedSequences:
        extra = [streamed(iterable(documents(100)), wordpiece)] if with_stream else []
        parts = [ShardedSequences(Numbered(40), LoaderSettings(data_shards=4), True, False, 1), *extra]
        return mixed(SHARES) if not extra else MixedSequences(parts, (0.4, 0.6), True, False)

    whole = {shard: make().read(shard, make().start_cursor, 1500)[0] for shard in range(4)}
    together = make()
    for shard in (3, 0, 2, 1):
        done, cursor = together.read(shard, together.start_cursor, 700)
        fresh = make()
        fresh.hint_cursors({shard: cursor})
        rest, _ = fresh.read(shard, cursor, 1500)
        expected = [(s.ids.tolist(), s.doc.tolist()) for s in flatten_batches(whole[shard])]
        found = [(s.ids.tolist(), s.doc.tolist()) for s in flatten_batches([*done, *rest])]
        assert found[: len(expected)] == expected


def test_a_cursor_is_plain_integers_of_all_parts() -> None:
    data = mixed(SHARES)
    assert data.start_cursor == (0, 0) * 3
    cursor: Cursor = data.read(1, data.start_cursor, 200)[1]
    assert all(type(number) is int for number in cursor)
    assert sum(cursor[1::2]) >= 200


def test_document_numbers_say_the_data_set_and_the_row() -> None:
    data = mixed(SHARES)
    for sequence in flatten_batches(data.read(0, data.start_cursor, 500)[0]):
        assert set((sequence.doc % (1 << DATASET_ROW_BITS)).tolist()) == {int(sequence.ids[0])}


def test_weights_become_shares() -> None:
    assert MixSettings(mix=(3.0, 1.0)).normalized_shares(2) == (0.75, 0.25)
    assert MixSettings().normalized_shares(4) == (0.25,) * 4
    with pytest.raises(SaetrainError, match=r"--mix 3 1: 2 weights for 3 data sets"):
        MixSettings(mix=(3.0, 1.0)).normalized_shares(3)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(SaetrainError, match=r"--mix .*must be (above 0|a finite number|at least 0)"):
            MixSettings(mix=(1.0, bad))


def test_held_out_sequences_are_mixed_in_the_same_shares() -> None:
    held = MixedHeldOutSequences([Numbered(60), Numbered(300)], (0.25, 0.75))
    order = held.shuffled_order(1)
    assert len(set(order.tolist())) == len(order)
    sequences = [held[int(number)] for number in order]
    for stop in (60, len(order)):
        tokens = np.bincount(
            [part_of(s) for s in sequences[:stop]], [int((s.kind == 0).sum()) for s in sequences[:stop]]
        )
        np.testing.assert_allclose(tokens / tokens.sum(), (0.25, 0.75), atol=0.03)
    assert held.shuffled_order(1).tolist() == order.tolist() != held.shuffled_order(2).tolist()


def test_parts_of_ids_and_of_text(wordpiece: Any) -> None:
    from tests.unit.data.test_streaming import IDS

    ids = datasets.Dataset.from_dict({"input_ids": [[101, *range(2000, 2020), 102]] * 40}).to_iterable_dataset()
    parts: list[ShardedSource] = [
        streamed(ids, wordpiece, column=IDS),
        streamed(iterable(documents(40)), wordpiece),
    ]
    data = MixedSequences(parts, (0.5, 0.5), True, False)
    held = tokens_of_parts(data, data.read(0, data.start_cursor, 3000)[0], 2)
    np.testing.assert_allclose(held / held.sum(), (0.5, 0.5), atol=0.01)
