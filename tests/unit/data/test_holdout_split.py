"""Held-out documents: the same ones for the same texts, copies on one side, enough of them and not too many."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pytest

from saetrain.data.holdout_split import (
    HASH_SPACE,
    MAX_HELD_OUT_SHARE,
    MIN_HELD_OUT_TOKENS,
    STREAM_HELD_OUT_SHARE,
    HeldOutTexts,
    deduplicate_rows,
    hash_rows,
    hold_out_by_hash,
    hold_out_from_stream,
    split_held_out_rows,
)
from saetrain.data.packing import TokenTable, build_token_table
from saetrain.data.text_column import TextColumn
from saetrain.data.tokenize import Framing, tokenize_rows
from saetrain.errors import SaetrainError


class Table:
    """The columns of a token table that the split reads."""

    def __init__(self, hashes: list[int], lengths: list[int], docs: list[int] | None = None) -> None:
        self.text_hash = np.array(hashes, dtype=np.int64)
        self.lengths = np.array(lengths, dtype=np.int64)
        self.special_counts = np.zeros_like(self.lengths)
        self.doc = np.arange(len(hashes)) if docs is None else np.array(docs, dtype=np.int64)


def documents(count: int, length: int, seed: int = 0, copies: int = 1) -> Table:
    """``count`` texts of about ``length`` tokens, each ``copies`` times, in a mixed order."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 1 << 63, count)
    lengths = rng.integers(length // 2, length * 3 // 2, count)
    order = rng.permutation(np.repeat(np.arange(count), copies))
    return Table(hashes[order].tolist(), lengths[order].tolist())


def split(table: Table, tokens: int = 0) -> tuple[np.ndarray, np.ndarray, str]:
    return split_held_out_rows(table, np.arange(len(table.doc)), tokens)[:3]  # type: ignore[arg-type]


def test_copies_fall_on_one_side() -> None:
    table = documents(400, 300, copies=3)
    train, held, _ = split(table)
    assert len(held) > 0
    assert not set(table.text_hash[train]) & set(table.text_hash[held])
    assert sorted([*train, *held]) == list(range(1200))


@pytest.mark.parametrize(
    ("count", "length", "asked"), [(2000, 300, 0), (2000, 300, 50_000), (700, 300, 100_000), (60, 4000, 0)]
)
def test_at_least_20k_tokens_where_the_data_have_them_and_at_most_a_tenth(count: int, length: int, asked: int) -> None:
    table = documents(count, length)
    _, held, _ = split(table, asked)
    total, out = table.lengths.sum(), table.lengths[held].sum()
    assert total * MAX_HELD_OUT_SHARE >= MIN_HELD_OUT_TOKENS
    assert MIN_HELD_OUT_TOKENS <= out <= total * MAX_HELD_OUT_SHARE
    assert out >= 0.9 * min(asked, total * MAX_HELD_OUT_SHARE)


def test_real_documents_of_an_encoder_go_to_one_side_whole(wordpiece: Any, topics: list[str]) -> None:
    # 465,000 characters, each document twice, once shouted: the same text to the hash.
    rows = datasets.Dataset.from_dict({"text": [*topics, *(text.upper() for text in topics)]})
    framing = Framing.from_tokenizer(wordpiece, False, 128)
    table = TokenTable(tokenize_rows(rows, TextColumn("text", ("text",), ""), wordpiece, framing, 1))
    train, held, how, _ = split_held_out_rows(table, np.arange(len(table)), 0)
    assert how.startswith("documents")
    assert not set(table.doc[train]) & set(table.doc[held])
    assert {int(doc) % len(topics) for doc in table.doc[held]}.isdisjoint(
        int(d) % len(topics) for d in table.doc[train]
    )
    assert table.lengths[held].sum() >= 0.8 * min(MIN_HELD_OUT_TOKENS, table.lengths.sum() * MAX_HELD_OUT_SHARE)


def test_small_data_hold_out_nearly_a_tenth() -> None:
    table = documents(100, 50)
    _, held, how = split(table)
    share = table.lengths[held].sum() / table.lengths.sum()
    assert 0.05 <= share <= MAX_HELD_OUT_SHARE
    assert how.startswith("documents")


def test_the_choice_is_a_function_of_the_texts_alone() -> None:
    table = documents(300, 300, copies=2)
    _, held, _ = split(table)
    assert np.array_equal(held, split(table)[1])
    order = np.random.default_rng(1).permutation(len(table.doc))
    mixed = Table(table.text_hash[order].tolist(), table.lengths[order].tolist())
    assert set(mixed.text_hash[split(mixed)[1]]) == set(table.text_hash[held])


def parts(hashes: list[int], count: int, length: int) -> Table:
    """Documents with these hashes, each stored in ``count`` rows of ``length`` tokens."""
    rows = [(text, doc) for doc, text in enumerate(hashes) for _ in range(count)]
    return Table([text for text, _ in rows], [length] * len(rows), [doc for _, doc in rows])


def test_parts_are_held_out_where_documents_are_too_long() -> None:
    table = parts([7, 8, 9], 500, 200)
    train, held, how = split(table)
    assert how.startswith("parts of documents")
    assert MIN_HELD_OUT_TOKENS <= table.lengths[held].sum() <= table.lengths.sum() * MAX_HELD_OUT_SHARE
    assert not set(train) & set(held)


def test_parts_of_copies_fall_on_one_side_in_any_order() -> None:
    def held_parts(table: Table) -> set[tuple[int, int]]:
        numbers = np.arange(len(table.doc)) % 500
        train, held, _ = split(table)
        out = {(int(table.text_hash[row]), int(numbers[row])) for row in held}
        assert not out & {(int(table.text_hash[row]), int(numbers[row])) for row in train}
        return out

    assert held_parts(parts([7, 8, 7], 500, 200)) == held_parts(parts([8, 7, 7], 500, 200))


def test_a_single_document_of_a_decoder_can_be_parted() -> None:
    table = parts([7], 60, 4096)
    train, held, _ = split(table)
    assert len(train) > len(held) > 0


def test_distinct_rows_are_all_rows_of_the_first_document_with_each_text() -> None:
    # Documents 0 and 5 are copies in two rows each; the rows of document 3 were empty and are not there.
    table = Table([11, 11, 12, 11, 11, 13], [4, 2, 4, 4, 2, 9], [0, 0, 2, 5, 5, 6])
    assert deduplicate_rows(table).tolist() == [0, 1, 2, 5]  # type: ignore[arg-type]
    assert deduplicate_rows(Table([], [], [])).tolist() == []  # type: ignore[arg-type]


def blocks(count: int, length: int, size: int = 32, seed: int = 0) -> list[dict[str, Any]]:
    """A stream of ``count`` documents of ``length`` tokens in blocks."""
    hashes = np.random.default_rng(seed).integers(0, HASH_SPACE, count).tolist()
    return [
        {
            "ids": [np.zeros(length)] * len(part),
            "special": [np.zeros(length, dtype=bool)] * len(part),
            "doc": list(range(start, start + len(part))),
            "text_hash": part,
        }
        for start in range(0, count, size)
        for part in [hashes[start : start + size]]
    ]


def test_a_stream_holds_out_a_share_of_hash_space() -> None:
    stream = blocks(9000, 100)
    held, texts = hold_out_by_hash(stream, 0)
    assert 20_000 <= sum(map(len, held["ids"])) < 20_000 + 32 * 100
    assert texts(build_token_table(held)).all()
    everything = np.concatenate([texts(build_token_table(block)) for block in stream])
    assert abs(everything.mean() - STREAM_HELD_OUT_SHARE) < 0.01
    # The first ones in the stream's order, and every later one is left out as well.
    assert held["doc"] == np.flatnonzero(everything)[: len(held["doc"])].tolist()


def test_a_short_stream_holds_out_the_text_with_the_smallest_hash() -> None:
    for seed in range(20):
        stream = blocks(3, 100, seed=seed)
        held, texts = hold_out_by_hash(stream, 0)
        mask = texts(build_token_table(stream[0]))
        assert mask.sum() >= 1
        assert not mask.all()
        assert int(np.argmin(stream[0]["text_hash"])) in held["doc"]


@pytest.mark.parametrize("count", [0, 1])
def test_a_stream_of_one_text_is_too_small(count: int) -> None:
    with pytest.raises(SaetrainError, match="too small to train on and hold text out"):
        hold_out_by_hash(blocks(count, 100), 0)


def test_a_split_that_is_set_apart_gives_its_first_documents() -> None:
    stream = blocks(1000, 100)
    held, texts, share = hold_out_from_stream(iter([]), stream, 0)
    assert share == 0
    assert held["doc"] == list(range(len(held["doc"])))
    assert 200 <= len(held["doc"]) < 232
    assert texts(build_token_table(held)).all()
    assert not texts(build_token_table(stream[-1])).any()


def test_a_split_that_is_too_small_is_not_scored_on_but_never_trained_on_either() -> None:
    stream, apart = blocks(9000, 100), blocks(20, 100, seed=1)
    held, texts, share = hold_out_from_stream(stream, apart, 0)
    assert share == pytest.approx(STREAM_HELD_OUT_SHARE)
    assert sum(map(len, held["ids"])) >= MIN_HELD_OUT_TOKENS
    assert texts(build_token_table(apart[0])).all()
    own, _, share = hold_out_from_stream(blocks(50, 10), apart, 0)
    assert (len(own["ids"]), share) == (20, 0), "the stream itself has less to hold out"
    own, _, share = hold_out_from_stream(blocks(1, 10), apart, 0)
    assert (len(own["ids"]), share) == (20, 0), "the stream itself has nothing to hold out"


def test_rows_are_told_by_text_and_place_in_the_document() -> None:
    first = hash_rows(Table([7, 7, 7, 9], [1] * 4, [0, 0, 0, 1]))  # type: ignore[arg-type]
    other = hash_rows(Table([9, 7, 7, 7], [1] * 4, [4, 5, 5, 5]))  # type: ignore[arg-type]
    assert len(set(first.tolist())) == 4
    assert first.tolist() == np.roll(other, -1).tolist()
    assert hash_rows(Table([], [], [])).tolist() == []  # type: ignore[arg-type]


def test_whole_documents_are_known_again_by_their_text_and_parts_by_their_place() -> None:
    held: Any = Table([7, 7, 9], [1] * 3, [0, 0, 1])
    near_copy: Any = Table([5, 7, 7, 7, 7], [1] * 5, [0, 1, 1, 1, 1])
    assert (
        HeldOutTexts.from_rows(held, np.array([0, 1]), whole_documents=True)(near_copy).tolist() == [False] + [True] * 4
    )
    assert (
        HeldOutTexts.from_rows(held, np.array([1]), whole_documents=False)(near_copy).tolist()
        == [False, False, True] + [False] * 2
    )
    both = HeldOutTexts.union([HeldOutTexts(hash_limit=6), HeldOutTexts.from_rows(held, np.array([2]), True)])
    assert both(near_copy).tolist() == [True] + [False] * 4
    assert not HeldOutTexts.union([])
    assert (
        len(
            {
                one.digest()
                for one in (
                    both,
                    HeldOutTexts(),
                    HeldOutTexts(hash_limit=6),
                    HeldOutTexts.from_rows(held, np.array([2]), True),
                )
            }
        )
        == 4
    )
