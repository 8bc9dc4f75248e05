"""Documents become ids once, whole, with the special tokens where the tokenizer itself would set them."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from shutil import rmtree
from typing import Any

import datasets
import numpy as np
import pytest

from saetrain.data.sources import SourceSettings, open_dataset
from saetrain.data.text_column import TextColumn, find_text_column
from saetrain.data.tokenize import (
    ROW_TOKENS,
    Framing,
    TokenSettings,
    ensure_tokens_cached,
    hash_text,
    load_tokenizer,
    tokenize_rows,
)
from saetrain.errors import SaetrainError

TEXT = TextColumn("text", ("text",), "")
ENCODER = Framing(causal=False, ctx_len=32, bos=None, eos=None)


def tokenize(
    texts: list[str], tokenizer: Any, framing: Framing, num_proc: int = 1, column: TextColumn = TEXT
) -> datasets.Dataset:
    return tokenize_rows(datasets.Dataset.from_dict({"text": texts}), column, tokenizer, framing, num_proc)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def test_encoder_pieces_hold_every_token_of_every_document_once(wordpiece: Any, topics: list[str]) -> None:
    texts = [*topics[:12], "", "   \n", "short"]
    rows = tokenize(texts, wordpiece, ENCODER)
    assert max(map(len, rows["ids"])) == ENCODER.ctx_len
    inner: dict[int, list[int]] = {}
    for row in rows:
        ids, special = np.asarray(row["ids"]), np.asarray(row["special"])
        assert (ids[0], ids[-1]) == (wordpiece.cls_token_id, wordpiece.sep_token_id)
        assert special.tolist() == [True] + [False] * (len(ids) - 2) + [True]
        inner.setdefault(row["doc"], []).extend(ids[~special].tolist())
    assert inner == {i: ids_of(wordpiece, text) for i, text in enumerate(texts) if text.strip()}


def test_documents_without_a_token_leave_no_row(wordpiece: Any) -> None:
    # Control characters are dropped by the tokenizer, which would leave CLS and SEP around nothing.
    assert tokenize(["\x01\x02", "word"], wordpiece, ENCODER)["doc"][:] == [1]


def test_special_tokens_written_in_a_text_stay_text(wordpiece: Any, bpe: Any) -> None:
    row = tokenize(["end [SEP] of [CLS] it [PAD]"], wordpiece, ENCODER)[0]
    # The tokenizer spells the brackets out; only its own CLS and SEP are special.
    assert wordpiece.decode(row["ids"][1:-1]) == "end [ sep ] of [ cls ] it [ pad ]"
    assert sum(row["special"]) == 2
    assert not {wordpiece.sep_token_id, wordpiece.cls_token_id, wordpiece.pad_token_id} & set(row["ids"][1:-1])

    row = tokenize(["a <|endoftext|> b"], bpe, Framing.from_tokenizer(bpe, True, 16))[0]
    assert row["ids"].count(bpe.eos_token_id) == 1
    assert bpe.decode(row["ids"][:-1]) == "a <|endoftext|> b"
    assert row["special"] == [False] * (len(row["ids"]) - 1) + [True]


def test_unknown_words_are_text(wordpiece: Any) -> None:
    row = tokenize(["a \U0001f9ff b"], wordpiece, ENCODER)[0]
    at = row["ids"].index(wordpiece.unk_token_id)
    assert not row["special"][at]


def test_decoder_framing_follows_the_tokenizer(bpe: Any, bos_bpe: Any) -> None:
    plain, framed = Framing.from_tokenizer(bpe, True, 16), Framing.from_tokenizer(bos_bpe, True, 16)
    assert (plain.bos, plain.eos) == (None, bpe.eos_token_id)
    assert (framed.bos, framed.eos) == (bos_bpe.bos_token_id, bos_bpe.eos_token_id)
    text = ids_of(bpe, "hello there")
    assert tokenize(["hello there"], bpe, plain)[0]["ids"] == [*text, plain.eos]
    row = tokenize(["hello there"], bos_bpe, framed)[0]
    assert row["ids"] == [framed.bos, *text, framed.eos]
    assert row["special"] == [True, *[False] * len(text), True]
    assert "BOS '<s>' and EOS '<|endoftext|>'" in framed.describe_packing(bos_bpe)
    assert "separated by EOS '<|endoftext|>'" in plain.describe_packing(bpe)


def test_encoder_framing_sets_nothing_of_its_own(wordpiece: Any) -> None:
    framing = Framing.from_tokenizer(wordpiece, False, 64)
    assert framing == Framing(False, 64, None, None)
    assert "up to 64 tokens" in framing.describe_packing(wordpiece)


def test_long_documents_of_a_decoder_are_stored_in_parts(bpe: Any, topics: list[str]) -> None:
    text = " ".join(topics[:8])
    rows = tokenize([text, "short"], bpe, Framing.from_tokenizer(bpe, True, 16))
    lengths = [len(ids) for ids in rows["ids"]]
    assert len(lengths) > 2
    assert max(lengths) == ROW_TOKENS
    assert rows["doc"][:] == [0] * (len(lengths) - 1) + [1]
    assert [i for ids in rows["ids"][:-1] for i in ids] == [*ids_of(bpe, text), bpe.eos_token_id]
    assert sum(sum(special) for special in rows["special"]) == 2


def test_chat_templates_marks_are_special_and_not_doubled(chat_bpe: Any) -> None:
    rows = datasets.Dataset.from_dict({"messages": [[{"role": "user", "content": "hi [SEP]"}]]})
    tokens = tokenize_rows(rows, find_text_column(rows, None), chat_bpe, Framing.from_tokenizer(chat_bpe, True, 16), 1)
    ids, special = np.asarray(tokens[0]["ids"]), np.asarray(tokens[0]["special"])
    user = chat_bpe.convert_tokens_to_ids("<|user|>")
    assert ids[special].tolist() == [chat_bpe.bos_token_id, user, chat_bpe.eos_token_id]
    assert ids[~special].tolist() == ids_of(chat_bpe, "hi [SEP]")


def test_ids_take_two_bytes_where_they_fit(wordpiece: Any, bpe: Any) -> None:
    assert tokenize(["a b"], wordpiece, ENCODER).features["ids"].feature.dtype == "uint16"
    bpe.add_tokens([f"extra{i}" for i in range(1 << 16)])
    rows = tokenize(["a extra65535"], bpe, Framing.from_tokenizer(bpe, True, 16))
    assert rows.features["ids"].feature.dtype == "uint32"
    assert max(rows[0]["ids"]) == len(bpe) - 1 > 1 << 16


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each batch that is really tokenized from now on, in this process."""
    import saetrain.data.tokenize as module

    calls: list[int] = []
    original = module._tokenize_pieces

    def counted(texts: list[str], *args: Any, **options: Any) -> Any:
        calls.append(len(texts))
        return original(texts, *args, **options)

    monkeypatch.setattr(module, "_tokenize_pieces", counted)
    return calls


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_second_run_tokenizes_only_what_changed(
    tmp_path: Path, wordpiece: Any, bpe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.jsonl"
    write_rows(file, [{"text": f"row {i}", "other": f"other {i}"} for i in range(9)])
    calls = count_calls(monkeypatch)

    def run(tokenizer: Any, framing: Framing, column: str = "text") -> list[list[int]]:
        calls.clear()
        rows = open_dataset(str(file), SourceSettings()).train
        tokens = tokenize_rows(rows, TextColumn("text", (column,), ""), tokenizer, framing, 1)
        return list(tokens["ids"])

    first = run(wordpiece, ENCODER)
    assert calls == [9]
    assert run(wordpiece, ENCODER) == first
    assert calls == []
    # Other calls leave truncation set in the tokenizer, which is no change of it.
    wordpiece("something else", truncation=True, max_length=7)
    run(wordpiece, ENCODER)
    assert calls == []
    run(wordpiece, Framing(causal=False, ctx_len=16, bos=None, eos=None))
    assert calls == [9]
    run(wordpiece, ENCODER, column="other")
    assert calls == [9]
    run(bpe, Framing.from_tokenizer(bpe, True, 32))
    assert calls == [9]
    # Packing happens after storing, so that another window length needs no new tokens.
    run(bpe, Framing.from_tokenizer(bpe, True, 16))
    assert calls == []
    wordpiece.add_tokens(["row"])
    run(wordpiece, ENCODER)
    assert calls == [9]
    write_rows(file, [{"text": f"new {i}", "other": ""} for i in range(9)])
    os.utime(file, ns=(1, 1))
    changed = run(wordpiece, ENCODER)
    assert calls == [9]
    assert changed != first


def test_saved_folder_is_left_as_it_was(tmp_path: Path, wordpiece: Any) -> None:
    folder = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(folder)
    before = sorted(folder.iterdir())
    tokenize_rows(open_dataset(str(folder), SourceSettings()).train, TEXT, wordpiece, ENCODER, 1)
    assert sorted(folder.iterdir()) == before


def test_processes_change_nothing(wordpiece: Any, topics: list[str]) -> None:
    texts = [*topics[:6], "", "x", *topics[6:9]]
    one, two = (tokenize(texts, wordpiece, ENCODER, num_proc) for num_proc in (1, 2))
    assert one.to_dict() == two.to_dict()
    assert one.features == two.features


def test_data_set_without_text_is_an_error(wordpiece: Any) -> None:
    with pytest.raises(SaetrainError, match="contains no text: 2 rows, all empty in column text"):
        tokenize(["", " \n"], wordpiece, ENCODER)


IDS = TextColumn("ids", ("input_ids",), "")


@pytest.mark.parametrize("bad", [-1, 30522, 50256])
def test_ids_outside_the_vocabulary_name_the_row(wordpiece: Any, bad: int) -> None:
    rows = datasets.Dataset.from_dict({"input_ids": [[101, 7, 102], [101, bad]]})
    assert len(wordpiece) == 30522
    with pytest.raises(SaetrainError, match=f"column input_ids, row 1: token id {bad} is not in .* of 30522"):
        tokenize_rows(rows, IDS, wordpiece, ENCODER, 1)


def test_rows_of_ids_are_cut_and_their_padding_dropped(wordpiece: Any, bpe: Any) -> None:
    text = list(range(1000, 1040))
    rows = datasets.Dataset.from_dict({"input_ids": [[101, *text, 102, 0, 0], [101, 2000, 102] + [0] * 41]})
    tokens = tokenize_rows(rows, IDS, wordpiece, ENCODER, 1)
    assert tokens["ids"][:] == [[101, *text[:31]], [*text[31:], 102], [101, 2000, 102]]
    assert tokens["special"][:][2] == [True, False, True]
    assert tokens["doc"][:] == [0, 0, 1]

    # GPT-2's way: padded with EOS, which only the mask tells from the EOS that ends the document.
    bpe.pad_token = bpe.eos_token
    end = bpe.eos_token_id
    masked = datasets.Dataset.from_dict({"input_ids": [[300, 301, end, end, end]], "attention_mask": [[1, 1, 1, 0, 0]]})
    tokens = tokenize_rows(masked, IDS, bpe, Framing.from_tokenizer(bpe, True, 16), 1)
    assert tokens["ids"][:] == [[300, 301, end]]
    assert tokens["special"][:] == [[False, False, True]]


def test_text_hash_forgets_case_width_and_white_space() -> None:
    same = ["Hello  World", "hello world", " HELLO\n\tworld ", "hello\u00a0world", "\uff28ello World"]
    assert len({hash_text(text) for text in same}) == 1
    assert hash_text("hello worlds") != hash_text("hello world")
    assert 0 <= hash_text("\ud800") < 1 << 63


@pytest.mark.parametrize(("field", "value"), [("ctx_len", 3), ("data_preprocessing_num_proc", 0)])
def test_settings_out_of_range(field: str, value: int) -> None:
    with pytest.raises(SaetrainError, match=f"--{field} {value}"):
        TokenSettings(**{field: value})


def test_tokenizer_of_a_cached_model_needs_no_network(cached_model: str, small_wordpiece: Any) -> None:
    tokenizer = load_tokenizer(cached_model, None, False)
    assert tokenizer("some text")["input_ids"] == small_wordpiece("some text")["input_ids"]
    start = time.monotonic()
    with pytest.raises(SaetrainError, match=r"model 'someone/else' .*no network"):
        load_tokenizer("someone/else", None, False)
    assert time.monotonic() - start < 15


@pytest.mark.parametrize("architecture", ["BertConfig", "GPT2Config", "LlamaConfig"])
def test_model_without_a_tokenizer_is_a_user_error(tmp_path: Path, architecture: str) -> None:
    import transformers

    # For BERT and GPT-2 the library would make up an empty vocabulary, in which every word is unknown.
    getattr(transformers, architecture)().save_pretrained(tmp_path)
    with pytest.raises(SaetrainError, match="tokenizer"):
        load_tokenizer(str(tmp_path), None, False)


@pytest.mark.parametrize("causal", [False, True])
def test_texts_cut_into_parts_give_the_same_tokens(
    wordpiece: Any, bpe: Any, topics: list[str], causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import saetrain.data.tokenize as module

    tokenizer = bpe if causal else wordpiece
    framing = Framing.from_tokenizer(tokenizer, causal, 512)
    text = "  \n\n".join(topics[:40])
    whole = tokenize([text, "x"], tokenizer, framing)
    monkeypatch.setattr(module, "PART_CHARS", 777)
    monkeypatch.setattr(module, "CALL_CHARS", 5000)
    parts = tokenize([text, "x "], tokenizer, framing)
    found, expected = (
        [
            np.concatenate([np.array(r["ids"])[~np.array(r["special"])] for r in rows if r["doc"] == doc]).tolist()
            for doc in (0, 1)
        ]
        for rows in (parts, whole)
    )
    assert found[0] == expected[0]
    if causal:
        assert parts["ids"][:][:-1] == whole["ids"][:][:-1], "BOS and EOS around the whole alone"
    assert set(parts["text_hash"]) == set(whole["text_hash"])


@pytest.mark.parametrize("text", ["a" * 300, "ab cd " * 60, " " * 300, "\n" * 90 + "x" * 210, ""])
def test_parts_are_the_text(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import saetrain.data.tokenize as module

    monkeypatch.setattr(module, "PART_CHARS", 50)
    parts = list(module.split_text(text))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 50


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_text_of_one_endless_line_takes_little_time_and_memory(wordpiece: Any, bpe: Any, causal: bool) -> None:
    tokenizer = bpe if causal else wordpiece
    framing = Framing.from_tokenizer(tokenizer, causal, 512)
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = tokenize(["xy" * 5_000_000 + "z", "short"], tokenizer, framing)
    assert time.monotonic() - start < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 << 20, "2 GiB, in KiB"
    assert rows["doc"][-1] == 1


def test_a_value_that_is_no_text_names_its_row(wordpiece: Any) -> None:
    column = TextColumn("text", ("label",), "")
    rows = datasets.Dataset.from_dict({"label": [None, 3]})
    with pytest.raises(SaetrainError, match=r"column label, row 1 \(from 0\): it contains int 3 instead of text"):
        tokenize_rows(rows, column, wordpiece, ENCODER, 1)


def cut_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 5])


def zero_middle(path: Path) -> None:
    content = path.read_bytes()
    quarter = len(content) // 4
    path.write_bytes(content[:quarter] + bytes(2 * quarter) + content[3 * quarter :])


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize(
    "harm", [cut_file, zero_middle, lambda path: path.write_bytes(b""), Path.unlink, lambda path: rmtree(path.parent)]
)
def test_damaged_cached_tokens_are_made_again(
    harm: Callable[[Path], object], num_proc: int, wordpiece: Any, topics: list[str], tmp_path: Path
) -> None:
    rows = datasets.Dataset.from_dict({"text": [*topics[:4], str(tmp_path)]})
    lines: list[str] = []

    def tokenize_again() -> dict[str, Any]:
        return dict(tokenize_rows(rows, TEXT, wordpiece, ENCODER, num_proc, lines.append).to_dict())

    cache = Path(datasets.config.HF_DATASETS_CACHE, "saetrain")
    before = {*cache.glob("tokens-*")}
    whole = tokenize_again()
    (entry,) = {*cache.glob("tokens-*")} - before
    harm(sorted(entry.glob("*.arrow"))[-1])
    n_lines = int(entry.exists())
    assert tokenize_again() == whole
    assert tokenize_again() == whole
    assert len(lines) == n_lines, "damage is logged once"
    assert all(f"{entry} is built again, because" in line for line in lines)


def kill_process(rows: dict[str, Any]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_named_with_its_flag(tmp_path: Path) -> None:
    def write_tokens(folder: Path) -> None:
        datasets.Dataset.from_dict({"text": ["a", "b"]}).map(kill_process, num_proc=2)

    with pytest.raises(SaetrainError, match="--data_preprocessing_num_proc: a process that tokenizes was killed"):
        ensure_tokens_cached(tmp_path / "tokens", write_tokens, print)
    assert not (tmp_path / "tokens").exists()
