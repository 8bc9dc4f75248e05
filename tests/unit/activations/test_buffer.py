"""The mixing buffer: exact counts in an order that depends on data and seed alone, and that any rank can take up."""

from __future__ import annotations

import contextlib
import threading
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from saetrain.activations.buffer import BufferSettings, ShuffleBuffer
from saetrain.activations.capture import ActivationCapture
from saetrain.activations.extract import ActivationExtractor
from saetrain.activations.model import BaseModel
from saetrain.data.packing import Sequences
from saetrain.data.sharded import LoaderSettings, ShardedSequences
from saetrain.errors import SaetrainError
from saetrain.types import TokenKind, TokenSequence

SHARDS = 4
NAMES = ["embeddings", "encoder.layer.0"]
BATCH = 30
"""Tokens per model batch."""


class Documents(Sequences):
    """61 documents of 4 to 14 tokens, whose token ids are all different, between two special ones."""

    def __init__(self) -> None:
        lengths = 4 + np.random.default_rng(0).permutation(61) % 11
        starts = 1000 + np.concatenate([[0], np.cumsum(lengths)])
        self._rows = [np.arange(a, b, dtype=np.int32) for a, b in pairwise(starts)]
        self.text_tokens, self.lengths = int((lengths - 2).sum()), lengths

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> TokenSequence:
        ids = self._rows[index]
        kind = np.zeros(len(ids), dtype=np.uint8)
        kind[[0, -1]] = TokenKind.SPECIAL
        return TokenSequence(ids, kind, np.full(len(ids), index, dtype=np.int64))


DOCUMENTS = Documents()


@pytest.fixture(scope="module")
def capture(bert: BaseModel) -> ActivationCapture:
    return ActivationCapture(bert, NAMES)


def make(capture: ActivationCapture, owned: list[int] | None = None, pool: int = 20, seed: int = 1) -> ShuffleBuffer:
    data = ShardedSequences(DOCUMENTS, LoaderSettings(data_shards=SHARDS), True, True, BATCH)
    reader = ActivationExtractor(capture, data.keep, 64)
    return ShuffleBuffer(reader, data, list(range(SHARDS)) if owned is None else owned, SHARDS, pool, seed)


def steps(buffer: ShuffleBuffer, count: int, size: int, first: int = 0, last: int | None = None) -> list[torch.Tensor]:
    """Micro-steps ``first`` to ``first + count`` of ``size`` samples each, the hookpoints side by side."""
    out = []
    for step in range(first, first + count):
        taken = buffer.take_activations(step * size, size, count * size if last is None else last)
        assert list(taken) == NAMES
        out.append(torch.cat(list(taken.values()), dim=1))
    return out


def rows_sorted(rows: torch.Tensor) -> torch.Tensor:
    return rows[np.lexsort(rows[:, :4].T.flip(0).numpy())]


@pytest.mark.parametrize("size", [1, 4, 10, 33])
@pytest.mark.parametrize("pool", [1, 20, 10_000])
def test_a_micro_step_takes_exactly_what_it_asks_for(capture: ActivationCapture, size: int, pool: int) -> None:
    for taken in steps(make(capture, pool=pool), 7, size):
        assert taken.shape == (size, 64)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("size", [8, 13])
def test_ranks_together_give_what_one_rank_gives(capture: ActivationCapture, ranks: int, size: int) -> None:
    one = steps(make(capture), 12, size)
    parts = [steps(make(capture, list(range(rank, SHARDS, ranks))), 12, size) for rank in range(ranks)]
    for step, whole in enumerate(one):
        together = torch.cat([part[step] for part in parts])
        torch.testing.assert_close(rows_sorted(together), rows_sorted(whole), rtol=0, atol=0)


def test_ranks_take_equal_shares_of_a_micro_step(capture: ActivationCapture) -> None:
    assert [len(rows) for rows in steps(make(capture, [1, 3]), 5, 8)] == [4] * 5


def test_cutting_the_samples_into_other_micro_steps_changes_none(capture: ActivationCapture) -> None:
    a = torch.cat(steps(make(capture, [2]), 6, 40, last=240))
    b = torch.cat(steps(make(capture, [2]), 24, 10, last=240))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("pool", [7, 20, 10_000])
@pytest.mark.parametrize("stop", [0, 1, 5, 11])
def test_restored_buffer_goes_on_bit_for_bit(capture: ActivationCapture, stop: int, pool: int) -> None:
    total = 12 * 30
    whole = make(capture, pool=pool)
    expected = steps(whole, 12, 30, last=total)
    before, after = make(capture, pool=pool), make(capture, pool=pool)
    steps(before, stop, 30, last=total)
    after.load_state_dict(before.state_dict())
    assert after.state_dict() == before.state_dict()
    for found, want in zip(steps(after, 12 - stop, 30, first=stop, last=total), expected[stop:], strict=True):
        assert torch.equal(found, want)
    assert after.state_dict() == whole.state_dict()


def test_state_is_integers_that_json_keeps(capture: ActivationCapture) -> None:
    import json

    buffer = make(capture)
    steps(buffer, 3, 30)
    assert json.loads(json.dumps(buffer.state_dict())) == buffer.state_dict()


@pytest.mark.parametrize("needed", [40, 200, 1000])
def test_no_more_is_read_than_the_run_needs(capture: ActivationCapture, needed: int) -> None:
    buffer = make(capture, pool=10_000)
    steps(buffer, 1, needed)
    assert needed <= buffer.n_tokens_read <= needed + SHARDS * BATCH


def test_an_epoch_loses_and_doubles_nothing(capture: ActivationCapture) -> None:
    # One shard, so that an epoch's end is a sample number; the embeddings of all tokens differ.
    data = ShardedSequences(DOCUMENTS, LoaderSettings(data_shards=1), True, True, BATCH)
    reader = ActivationExtractor(capture, data.keep, 64)
    total = DOCUMENTS.text_tokens
    everything = reader.extract_all([[DOCUMENTS[number]] for number in range(len(DOCUMENTS))]).values[NAMES[0]]
    assert len(torch.unique(everything, dim=0)) == total
    for pool in (1, 50, total):
        buffer = ShuffleBuffer(reader, data, [0], 1, pool, 1)
        taken = buffer.take_activations(0, 2 * total, 2 * total)[NAMES[0]]
        # Pools are cut between sequences, so that the last of the first epoch may hold some of the second.
        counts = torch.unique(taken.round(decimals=4), dim=0, return_counts=True)[1]
        assert counts.tolist() == [2] * total
    torch.testing.assert_close(
        rows_sorted(buffer_of_one_epoch(reader, data, total)), rows_sorted(everything), rtol=0, atol=1e-5
    )


def buffer_of_one_epoch(reader: ActivationExtractor, data: ShardedSequences, total: int) -> torch.Tensor:
    return ShuffleBuffer(reader, data, [0], 1, total, 1).take_activations(0, total, total)[NAMES[0]]


def test_samples_are_mixed_and_the_order_is_the_seed_s(capture: ActivationCapture) -> None:
    orders = [torch.cat(steps(make(capture, pool=10_000, seed=seed), 1, 300)) for seed in (1, 1, 2)]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    read = ActivationExtractor(capture, lambda sequence: sequence.kind == 0, 64)
    unmixed = read.extract_all([[DOCUMENTS[number]] for number in range(len(DOCUMENTS))])
    docs = unmixed.doc[torch.cdist(orders[0][:, :32], unmixed.values[NAMES[0]]).argmin(1).numpy()]
    # In the order of the text nearly all neighbours would be of one document, of which there are 61.
    assert np.mean(docs[1:] == docs[:-1]) < 0.3


def test_hookpoints_of_a_sample_belong_to_one_token(capture: ActivationCapture) -> None:
    taken = make(capture).take_activations(0, 100, 100)
    reader = ActivationExtractor(capture, lambda sequence: sequence.kind == 0, 64)
    everything = reader.extract_all([[DOCUMENTS[number]] for number in range(len(DOCUMENTS))])
    nearest = {name: torch.cdist(taken[name], everything.values[name]).argmin(1) for name in NAMES}
    assert torch.equal(nearest[NAMES[0]], nearest[NAMES[1]])


def test_outliers_are_counted_and_made_up_for(capture: ActivationCapture) -> None:
    buffer = make(capture)
    norms = make(capture).take_activations(0, 400, 400)[NAMES[1]].norm(dim=1)
    buffer._extractor.set_norm_limits({NAMES[1]: float(norms.median())})
    taken = buffer.take_activations(0, 200, 200)[NAMES[1]]
    assert len(taken) == 200
    assert float(taken.norm(dim=1).max()) <= float(norms.median())
    assert 0 < buffer.n_outliers < buffer.n_tokens_read


def test_settings_out_of_range() -> None:
    with pytest.raises(SaetrainError, match="--buffer_tokens 0"):
        BufferSettings(buffer_tokens=0)


@pytest.mark.parametrize("pool", [1, 7, 20, 10_000])
def test_working_ahead_changes_no_sample(capture: ActivationCapture, pool: int) -> None:
    total = 12 * 30
    expected, buffer = steps(make(capture, pool=pool), 12, 30), make(capture, pool=pool)
    for step, want in enumerate(expected):
        (found,) = steps(buffer, 1, 30, first=step, last=total)
        assert torch.equal(found, want)
        before = buffer.state_dict()
        _wait_for_text(buffer)
        buffer.prefetch_pools()
        assert buffer.state_dict() == before


def test_working_ahead_spreads_the_models_work_over_the_steps(capture: ActivationCapture) -> None:
    buffer, calls = make(capture, pool=80), []
    reader = buffer._extractor
    reader.set_interrupt_check(lambda: calls.append(len(calls)))
    in_steps, ahead = [], []
    for step in range(20):
        before = len(calls)
        steps(buffer, 1, 20, first=step, last=4000)
        taken = len(calls)
        _wait_for_text(buffer)
        buffer.prefetch_pools()
        in_steps.append(taken - before)
        ahead.append(len(calls) - taken)
    assert sum(in_steps[1:]) <= 1
    assert sum(ahead) > 8
    assert max(ahead) <= 2, "a batch may have fewer tokens than a step"


def test_nobody_waits_for_text_that_is_needed_later(
    capture: ActivationCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = steps(make(capture, pool=40), 3, 20, last=400)
    buffer, there, slow = make(capture, pool=40), threading.Event(), threading.Event()
    read = ShardedSequences.read

    def waiting(self: ShardedSequences, *asked: Any) -> Any:
        assert not slow.is_set() or there.wait(60)
        return read(self, *asked)

    monkeypatch.setattr(ShardedSequences, "read", waiting)
    expect = buffer._prefetcher.start_prefetch
    monkeypatch.setattr(buffer._prefetcher, "start_prefetch", lambda *asked: (slow.set(), expect(*asked)))
    found = steps(buffer, 1, 20, last=400)
    buffer.prefetch_pools()
    assert not buffer._early_pools
    there.set()
    found += steps(buffer, 2, 20, first=1, last=400)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_error_of_a_later_pool_is_raised_where_the_pool_is_needed(
    capture: ActivationCapture, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = make(capture, pool=40)
    steps(buffer, 1, 20, last=4000)

    def broken(*_: Any) -> Any:
        raise SaetrainError("row 7 is broken")

    monkeypatch.setattr(ActivationExtractor, "_check_norms", broken)
    _wait_for_text(buffer)
    buffer._token_budget = 1000
    buffer.prefetch_pools()
    with pytest.raises(SaetrainError, match="row 7"):
        steps(buffer, 20, 20, first=1, last=4000)


def _wait_for_text(buffer: ShuffleBuffer) -> None:
    for _, future in buffer._prefetcher._prefetches.values():
        future.result()


def test_a_pool_that_was_broken_off_half_way_is_read_again(capture: ActivationCapture) -> None:
    total = 12 * 30
    expected, buffer = steps(make(capture, pool=100), 12, 30), make(capture, pool=100)
    reader = buffer._extractor

    def give_up() -> None:
        raise KeyboardInterrupt

    for step, want in enumerate(expected):
        (found,) = steps(buffer, 1, 30, first=step, last=total)
        assert torch.equal(found, want)
        _wait_for_text(buffer)
        buffer.prefetch_pools()
        buffer._token_budget = 1000
        reader.set_interrupt_check(give_up)
        with contextlib.suppress(KeyboardInterrupt):
            buffer.prefetch_pools()
        reader.set_interrupt_check(lambda: None)
