"""Stored tokens come back as they were, in windows that lose and double nothing."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import datasets
import numpy as np
import pytest

from saetrain.data.packing import DocumentSequences, PackedSequences, Sequences, TokenTable, build_sequences
from saetrain.data.text_column import TextColumn
from saetrain.data.tokenize import Framing, tokenize_rows
from saetrain.types import TokenKind

TEXT = TextColumn("text", ("text",), "")
SPECIAL, FIRST = int(TokenKind.SPECIAL), int(TokenKind.FIRST)


def tokens(texts: list[str], tokenizer: Any, framing: Framing) -> datasets.Dataset:
    return tokenize_rows(datasets.Dataset.from_dict({"text": texts}), TEXT, tokenizer, framing, 1)


def same(a: Sequences, b: Sequences) -> None:
    assert (len(a), a.text_tokens) == (len(b), b.text_tokens)
    for number in range(len(a)):
        one, other = a[number], b[number]
        for field in ("ids", "kind", "doc"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


@pytest.mark.parametrize("ctx_len", [4, 7, 64, 100_000])
def test_packed_windows_laid_end_to_end_are_the_documents(bpe: Any, topics: list[str], ctx_len: int) -> None:
    texts = ["one", "", topics[0], "a few words", topics[1], "x"]
    framing = Framing.from_tokenizer(bpe, True, ctx_len)
    packed = PackedSequences(TokenTable(tokens(texts, bpe, framing)), np.arange(5), framing, True)
    windows = [packed[number] for number in range(len(packed))]
    expected = [(i, doc) for doc, text in enumerate(texts) if text for i in [*bpe(text)["input_ids"], framing.eos]]
    assert [pair for w in windows for pair in zip(w.ids.tolist(), w.doc.tolist(), strict=True)] == expected
    assert all(len(window) == ctx_len for window in windows[:-1])
    for window in windows:
        # EOS is special and position 0 is first, each once for every such token.
        assert ((window.kind & SPECIAL) > 0).tolist() == (window.ids == framing.eos).tolist()
        assert ((window.kind & FIRST) > 0).tolist() == [True] + [False] * (len(window) - 1)
    kept = sum(int((window.kind == 0).sum()) for window in windows)
    # Known before any window is made; a window that begins with EOS is counted twice.
    assert 0 <= kept - packed.text_tokens <= 5


def test_every_packed_window_begins_with_bos_where_the_tokenizer_sets_it(bos_bpe: Any, topics: list[str]) -> None:
    framing = Framing.from_tokenizer(bos_bpe, True, 16)
    texts = [topics[0], "two words", topics[1]]
    table = TokenTable(tokens(texts, bos_bpe, framing))
    packed = PackedSequences(table, np.arange(len(table)), framing, True)
    windows = [packed[number] for number in range(len(packed))]
    stream: list[int] = []
    for window in windows:
        assert len(window) <= 16
        assert (window.ids[0], window.kind[0]) == (framing.bos, SPECIAL | FIRST)
        # A document's own BOS serves the window that begins with it; two in a row are never seen in training.
        assert window.ids[1] != framing.bos
        starts_document = len(stream) == 0 or stream[-1] == framing.eos
        stream.extend(window.ids[0 if starts_document else 1 :].tolist())
    assert stream == [i for text in texts for i in [*bos_bpe(text)["input_ids"], framing.eos]]
    assert packed.text_tokens == sum(int((window.kind == 0).sum()) for window in windows)


def test_packing_takes_the_rows_that_it_is_given(bpe: Any) -> None:
    framing = Framing.from_tokenizer(bpe, True, 8)
    table = TokenTable(tokens(["first text", "second text", "third text"], bpe, framing))
    packed = PackedSequences(table, np.array([2, 0]), framing, False)
    docs = np.concatenate([packed[number].doc for number in range(len(packed))])
    assert list(dict.fromkeys(docs.tolist())) == [2, 0]
    assert packed.text_tokens == table.lengths[[2, 0]].sum() - len(packed)


def test_an_encoder_s_sequences_are_its_stored_rows(wordpiece: Any, topics: list[str]) -> None:
    framing = Framing.from_tokenizer(wordpiece, False, 32)
    rows = tokens([*topics[:3], "short"], wordpiece, framing)
    table = TokenTable(rows)
    chosen = np.arange(0, len(rows), 2)
    sequences = DocumentSequences(table, chosen, True)
    assert len(sequences) == len(chosen)
    for number, row in enumerate(chosen):
        sequence, stored = sequences[number], rows[int(row)]
        assert sequence.ids.tolist() == stored["ids"]
        assert sequence.kind.tolist() == [SPECIAL * flag for flag in stored["special"]]
        assert sequence.doc.tolist() == [stored["doc"]] * len(sequence)
        assert (sequence.ids.dtype, sequence.kind.dtype, sequence.doc.dtype) == (np.int32, np.uint8, np.int64)
    text = sum(int((sequences[number].kind == 0).sum()) for number in range(len(sequences)))
    assert sequences.text_tokens == text
    assert DocumentSequences(table, chosen, False).text_tokens == text + 2 * len(chosen)


@pytest.mark.parametrize("causal", [True, False])
def test_how_the_table_is_chunked_changes_nothing(wordpiece: Any, bpe: Any, topics: list[str], causal: bool) -> None:
    tokenizer = bpe if causal else wordpiece
    framing = Framing.from_tokenizer(tokenizer, causal, 32)
    whole = tokens([*topics[:4], "short", "x"], tokenizer, framing)
    size = len(whole)
    # Slices of one array keep its offset, which is where reading the buffers directly goes wrong.
    cuts = [0, 1, size // 2, size - 1, size]
    parts = [whole.select(range(start, stop)) for start, stop in pairwise(cuts)]
    chunked = datasets.concatenate_datasets(parts)
    table, other = TokenTable(whole), TokenTable(chunked)
    assert chunked.data.column("ids").num_chunks == 4
    for name in ("lengths", "special_counts", "doc", "text_hash"):
        np.testing.assert_array_equal(getattr(table, name), getattr(other, name))
    rows = np.arange(size)
    assert table.digest(rows) == other.digest(rows)
    same(build_sequences(table, rows, framing, True), build_sequences(other, rows, framing, True))


def test_no_rows_make_no_sequences(bpe: Any, wordpiece: Any) -> None:
    for tokenizer, causal in ((bpe, True), (wordpiece, False)):
        framing = Framing.from_tokenizer(tokenizer, causal, 16)
        table = TokenTable(tokens(["some text"], tokenizer, framing))
        none = build_sequences(table, np.zeros(0, dtype=np.int64), framing, True)
        assert (len(none), none.text_tokens) == (0, 0)


def test_the_digest_is_of_ids_and_rows(bpe: Any) -> None:
    framing = Framing.from_tokenizer(bpe, True, 16)
    texts = [["some text", "more"], ["Some text", "more"], ["some  text", "more"], ["some text more"]]
    tables = [TokenTable(tokens(each, bpe, framing)) for each in texts]
    digests = {table.digest(np.arange(len(table))) for table in tables} | {tables[0].digest(np.arange(1))}
    assert len(digests) == 5
