"""A stream gives the same sequences whatever is read, by whom, in which order, and however often it breaks."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from typing import Any
from urllib.request import Request, urlopen

import datasets
import numpy as np
import pytest

from saetrain.data import streaming
from saetrain.data.lenient_readers import BAD_ROW_COLUMN
from saetrain.data.packing import TokenTable
from saetrain.data.sharded import LoaderSettings
from saetrain.data.sources import SourceSettings, open_dataset
from saetrain.data.streaming import BLOCK_ROWS, BlockReader, StreamedRows, StreamedSequences, iterate_encoded_blocks
from saetrain.data.text_column import TextColumn
from saetrain.data.tokenize import Framing, build_row_encoder, hash_text
from saetrain.errors import SaetrainError
from saetrain.types import Cursor, ModelBatch
from tests.unit.data.test_sharded import flatten_batches

TEXT = TextColumn("text", ("text",), "")
IDS = TextColumn("ids", ("input_ids",), "")
SHARDS = 4


def none_held_out(table: TokenTable) -> np.ndarray:
    return np.zeros(len(table), dtype=bool)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "RETRY_DELAYS_S", (0.0,) * 3)


def documents(count: int) -> list[str]:
    """Texts that are all different, of 1 to 40 words."""
    rng = np.random.default_rng(0)
    return [f"document {i} " + "word " * int(n) for i, n in enumerate(rng.integers(0, 40, count))]


def rows_of(data: Any, said: list[str] | None = None) -> StreamedRows:
    return StreamedRows(data, "some", (said if said is not None else []).append, lambda: None)


def iterable(texts: list[str]) -> Any:
    return datasets.IterableDataset.from_generator(lambda: ({"text": text} for text in texts))


def streamed(
    data: Any,
    tokenizer: Any,
    *,
    causal: bool = False,
    shards: int = SHARDS,
    seed: int = 42,
    held_out: Callable[[TokenTable], np.ndarray] = none_held_out,
    column: TextColumn = TEXT,
    batch_tokens: int = 64,
) -> StreamedSequences:
    framing = Framing.from_tokenizer(tokenizer, causal, 16)
    return StreamedSequences(
        rows_of(data),
        "some",
        build_row_encoder(column, tokenizer, framing),
        held_out,
        framing,
        loader=LoaderSettings(shuffle_seed=seed, data_shards=shards),
        exclude_special=True,
        exclude_first=causal,
        batch_tokens=batch_tokens,
    )


def plain(batches: list[ModelBatch]) -> list[tuple[Any, ...]]:
    return [(s.ids.tolist(), s.kind.tolist(), s.doc.tolist()) for s in flatten_batches(batches)]


def read(data: StreamedSequences, shard: int, tokens: int, cursor: Cursor = (0, 0)) -> list[tuple[Any, ...]]:
    return plain(data.read(shard, cursor, tokens)[0])


@pytest.fixture
def tokenizer(request: pytest.FixtureRequest, causal: bool) -> Any:
    return request.getfixturevalue("bpe" if causal else "wordpiece")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("count", [5, 128, 300])
def test_a_shard_gives_the_same_alone_and_with_others_in_any_order(tokenizer: Any, causal: bool, count: int) -> None:
    texts = documents(count)
    alone = {shard: read(streamed(iterable(texts), tokenizer, causal=causal), shard, 4000) for shard in range(SHARDS)}
    together = streamed(iterable(texts), tokenizer, causal=causal)
    for shard in (3, 1, 0, 2, 1):
        assert read(together, shard, 4000) == alone[shard]
    # In small pieces, in turn, as the mixing buffer reads.
    pieces: dict[int, list[Any]] = {shard: [] for shard in range(SHARDS)}
    cursors: dict[int, Cursor] = dict.fromkeys(range(SHARDS), (0, 0))
    together.hint_cursors(dict(cursors))
    while any(len(pieces[shard]) < len(alone[shard]) for shard in range(SHARDS)):
        for shard in range(SHARDS):
            sequences, cursors[shard] = together.read(shard, cursors[shard], 30)
            pieces[shard].extend(plain(sequences))
    for shard in range(SHARDS):
        assert pieces[shard][: len(alone[shard])] == alone[shard]


@pytest.mark.parametrize("causal", [False, True])
def test_reading_goes_on_from_any_cursor_in_a_fresh_process(tokenizer: Any, causal: bool) -> None:
    texts = documents(150)
    whole, _ = streamed(iterable(texts), tokenizer, causal=causal).read(1, (0, 0), 6000)
    done, cursor = streamed(iterable(texts), tokenizer, causal=causal).read(1, (0, 0), 2500)
    fresh = streamed(iterable(texts), tokenizer, causal=causal)
    fresh.hint_cursors({1: json.loads(json.dumps(cursor))})
    rest, _ = fresh.read(1, tuple(json.loads(json.dumps(cursor))), 6000)
    assert (plain(done) + plain(rest))[: len(plain(whole))] == plain(whole)


@pytest.mark.parametrize(("count", "shards"), [(3, 4), (32, 4), (100, 4), (128, 4), (129, 4), (300, 1), (320, 5)])
def test_every_pass_gives_every_document_once(wordpiece: Any, count: int, shards: int) -> None:
    rows = rows_of(iterable(documents(count)))
    blocks = BlockReader(rows, "some", shards)
    order: list[str] = []
    number = 0
    while len(order) < 3 * count:
        order.extend(row["text"] for row in blocks.read_block(number, number, lambda _: False))
        blocks.waiting_blocks.clear()
        number += 1
    assert order == documents(count) * 3
    # Every shard meets every block in the end.
    assert blocks.blocks_per_pass is not None
    assert {blocks.index_in_pass(1 + shards * ordinal) for ordinal in range(blocks.blocks_per_pass)} == set(
        range(blocks.blocks_per_pass)
    )


def test_passes_are_mixed_anew_and_the_order_is_the_seed_s(wordpiece: Any) -> None:
    data = streamed(iterable(documents(20)), wordpiece, shards=1)
    passes = []
    for ordinal in range(3):
        sequences, _ = data.read(0, (ordinal, 0), 1)
        assert sequences
        passes.append([s.doc[0] for s in flatten_batches(data._current_blocks[0][1])])
    assert len({tuple(order) for order in passes}) == 3
    assert len({tuple(sorted(order)) for order in passes}) == 1
    other = streamed(iterable(documents(20)), wordpiece, shards=1, seed=1)
    other.read(0, (0, 0), 1)
    assert [s.doc[0] for s in flatten_batches(other._current_blocks[0][1])] != passes[0]


def test_the_stream_is_read_forwards_once_and_passed_blocks_are_dropped(wordpiece: Any) -> None:
    opened, served = [], [0]

    class Counting:
        def skip(self, count: int) -> Iterator[dict[str, str]]:
            opened.append(count)
            for text in documents(2000)[count:]:
                served[0] += 1
                yield {"text": text}

        def __iter__(self) -> Iterator[dict[str, str]]:
            return self.skip(0)

    data = streamed(Counting(), wordpiece)
    cursors: dict[int, Cursor] = dict.fromkeys(range(SHARDS), (0, 0))
    for _ in range(20):
        for shard in range(SHARDS):
            _, cursors[shard] = data.read(shard, cursors[shard], 300)
            assert len(data._blocks.waiting_blocks) <= 3 * SHARDS
    assert opened == [0]
    assert served[0] <= (max(cursor[0] for cursor in cursors.values()) + 1) * SHARDS * BLOCK_ROWS
    # After a restart it is opened once, at the first block that is needed.
    again = streamed(Counting(), wordpiece)
    again.hint_cursors(cursors)
    for shard in (2, 0, 3, 1):
        again.read(shard, cursors[shard], 300)
    first = min(cursor[0] * SHARDS + shard for shard, cursor in cursors.items())
    assert opened == [0, first * BLOCK_ROWS]
    # Blocks of shards that nobody expects do not wait.
    again.hint_cursors({1: cursors[1]})
    assert {number % SHARDS for number in again._blocks.waiting_blocks} <= {1}


def test_held_out_texts_are_left_out_wherever_they_occur(wordpiece: Any) -> None:
    texts = documents(90)
    copies = [*texts, *(text.upper() for text in texts[:10])]
    secret = {hash_text(text) for text in texts[:5]}
    data = streamed(
        iterable(copies), wordpiece, shards=1, held_out=lambda table: np.isin(table.text_hash, list(secret))
    )
    sequences, _ = data.read(0, (0, 0), 9000)
    seen = {int(doc) for sequence in flatten_batches(sequences) for doc in sequence.doc}
    assert seen == set(range(100)) - set(range(5)) - set(range(90, 95))


@pytest.mark.parametrize("texts", [[], ["", "  "], ["a"]])
def test_streams_without_a_kept_token_are_an_error(wordpiece: Any, texts: list[str]) -> None:
    everything = streamed(iterable(texts), wordpiece, held_out=lambda table: np.ones(len(table), dtype=bool))
    with pytest.raises(SaetrainError, match="has no rows" if not texts else "no token that the token policy keeps"):
        everything.read(2, (0, 0), 1)


def test_rows_of_ids(bpe: Any) -> None:
    ids = [list(range(10 + i, 30 + i)) for i in range(40)]
    data = streamed(
        datasets.Dataset.from_dict({"input_ids": ids}).to_iterable_dataset(), bpe, causal=True, shards=1, column=IDS
    )
    sequences, _ = data.read(0, (0, 0), 1)
    assert sequences
    first = sorted(flatten_batches(data._current_blocks[0][1]), key=lambda s: (s.doc[0], s.ids[0]))
    assert sum(map(len, first)) == 20 * BLOCK_ROWS


def test_a_value_of_another_type_names_its_row(wordpiece: Any) -> None:
    rows = [{"text": "fine"}] * 40 + [{"text": 7}]
    data = streamed(datasets.IterableDataset.from_generator(lambda: iter(rows)), wordpiece, shards=1)
    with pytest.raises(SaetrainError, match=r"column text, row 40 .*contains int 7"):
        data.read(0, (1, 0), 1)


class Flaky:
    """A generator's rows, which break off before row ``at`` as often as ``times`` says."""

    def __init__(self, count: int, at: int, times: int) -> None:
        self.count, self.at, self.left = count, at, times

    def __call__(self) -> Iterator[dict[str, str]]:
        for number, text in enumerate(documents(self.count)):
            if number == self.at and self.left:
                self.left -= 1
                raise ConnectionError("reset by peer")
            yield {"text": text}


def generated(flaky: Flaky) -> Any:
    class Rows:
        def skip(self, count: int) -> Any:
            return datasets.IterableDataset.from_generator(flaky.__call__).skip(count)

        def __iter__(self) -> Iterator[Any]:
            return iter(self.skip(0))

    return Rows()


@pytest.mark.parametrize("at", [0, 31, 32, 77])
def test_a_source_that_fails_for_a_while_changes_nothing(wordpiece: Any, at: int) -> None:
    whole = {shard: read(streamed(iterable(documents(100)), wordpiece), shard, 2000) for shard in range(SHARDS)}
    data = streamed(generated(Flaky(100, at, 3)), wordpiece)
    assert {shard: read(data, shard, 2000) for shard in range(SHARDS)} == whole


def test_a_source_that_fails_for_good_names_itself_the_row_and_the_error() -> None:
    said: list[str] = []
    rows = StreamedRows(generated(Flaky(100, 50, 99)), "some/where", said.append, lambda: None)
    with pytest.raises(
        SaetrainError, match=r"some/where: row 50 \(from 0\) .* in 4 tries; .* ConnectionError: reset by peer"
    ):
        list(rows(0))
    assert len(said) == 3


def test_a_wish_to_stop_is_heard_while_the_source_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, wordpiece: Any
) -> None:
    monkeypatch.setattr(streaming, "RETRY_DELAYS_S", (60.0,))
    calls = []

    def stop_soon() -> None:
        calls.append(1)
        if len(calls) > 8:
            raise KeyboardInterrupt

    data = streamed(generated(Flaky(100, 50, 99)), wordpiece)
    data.set_interrupt_check(stop_soon)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        data.read(0, (0, 0), 9000)
    assert time.monotonic() - started < 30
    again = streamed(iterable(documents(900)), wordpiece)
    again.set_interrupt_check(stop_soon)
    with pytest.raises(KeyboardInterrupt):  # between blocks too
        again.read(0, (0, 0), 9000)


def test_tries_are_counted_anew_where_rows_came_between() -> None:
    class Tired:
        """Gives ten rows, and then its connection ends."""

        def skip(self, count: int) -> Iterator[dict[str, str]]:
            yield from ({"text": text} for text in documents(200)[count : count + 10])
            if count + 10 < 200:
                raise TimeoutError

        def __iter__(self) -> Iterator[dict[str, str]]:
            return self.skip(0)

    assert [row["text"] for row in rows_of(Tired())(0)] == documents(200)


@pytest.fixture
def server() -> Iterator[tuple[str, list[int]]]:
    """An HTTP server with a jsonl file, which drops the connection in the middle of the first answers."""
    content = "".join(json.dumps({"text": text}) + "\n" for text in documents(3000)).encode()
    drops = [4]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(False)

        def do_GET(self) -> None:
            self.answer(True)

        def answer(self, body: bool) -> None:
            first, last = 0, len(content) - 1
            if wanted := self.headers.get("Range"):
                low, high = wanted.removeprefix("bytes=").split("-")
                first, last = int(low), min(int(high or last), last)
            self.send_response(206 if wanted else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(last + 1 - first))
            if wanted:
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            self.end_headers()
            if body and drops[0]:
                drops[0] -= 1
                self.wfile.write(content[first : (first + last) // 2])
                self.wfile.flush()
                self.connection.close()
                self.close_connection = True
            elif body:
                self.wfile.write(content[first : last + 1])

        def log_message(self, *words: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/rows.jsonl", drops
    running.shutdown()
    running.server_close()


def rows_over_http(address: str) -> Iterator[dict[str, str]]:
    """A data set's rows, fetched in ranges of 20 kB as a file system over HTTP does."""
    size, rest = int(urlopen(Request(address, method="HEAD")).headers["Content-Length"]), b""
    for first in range(0, size, 20_000):
        with urlopen(Request(address, headers={"Range": f"bytes={first}-{first + 19_999}"})) as answer:
            *lines, rest = (rest + answer.read()).split(b"\n")
        yield from map(json.loads, lines)


def test_a_server_that_drops_connections(server: tuple[str, list[int]]) -> None:
    address, drops = server
    data = datasets.IterableDataset.from_generator(rows_over_http, gen_kwargs={"address": address})
    drops[0] = 2
    said: list[str] = []
    rows = rows_of(data, said)(0)
    head = list(islice(rows, 1000))
    drops[0] = 3
    assert [row["text"] for row in [*head, *rows]] == documents(3000)
    assert len(said) == 5
    drops[0] = 1000
    with pytest.raises(SaetrainError, match=r"row 0 .* could not be read in 4 tries; .* IncompleteRead"):
        list(rows_of(data)(0))


def test_bad_rows_are_counted_once_over_all_passes() -> None:
    rows = [{"text": "a", BAD_ROW_COLUMN: ""}, {"text": None, BAD_ROW_COLUMN: "x.jsonl, line 2: is not valid JSON"}]
    said: list[str] = []
    reader = rows_of(datasets.Dataset.from_list(rows).to_iterable_dataset(), said)
    for _ in range(2):
        assert len(list(reader(0))) == 2
    assert said == ["data set some: 1 bad rows skipped so far, the last: x.jsonl, line 2: is not valid JSON"]


def test_encoded_blocks_number_the_rows(wordpiece: Any) -> None:
    encode = build_row_encoder(TEXT, wordpiece, Framing.from_tokenizer(wordpiece, False, 100))
    batches = list(islice(iterate_encoded_blocks(rows_of(iterable(documents(70))), encode), 9))
    assert [batch["doc"] for batch in batches] == [list(range(32)), list(range(32, 64)), list(range(64, 70))]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_local_sources_stream_the_rows_that_they_hold(tmp_path: Any, kind: str) -> None:
    data = datasets.Dataset.from_dict({"text": documents(50), "other": list(range(50))})
    path = tmp_path / f"rows.{kind}"
    {"jsonl": data.to_json, "parquet": data.to_parquet, "saved": data.save_to_disk}[kind](path)
    source = open_dataset(str(path), SourceSettings(streaming=True))
    assert isinstance(source.train, datasets.IterableDataset)
    assert [row["text"] for row in rows_of(source.train)(20)] == documents(50)[20:]


def test_a_part_of_a_split_is_refused(topics_jsonl: str) -> None:
    with pytest.raises(SaetrainError, match=r"--split train\[:5\]: .* combined with --streaming"):
        open_dataset(topics_jsonl, SourceSettings(streaming=True, split="train[:5]"))
