"""The text column is found as people lay data sets out, and rows of every layout become one document each."""

from __future__ import annotations

from typing import Any

import datasets
import pytest

from saetrain.data.text_column import (
    TextColumn,
    _to_messages,
    build_renderer,
    choose_text_column,
    find_text_column,
    matches_kind,
)
from saetrain.errors import SaetrainError

OPENAI = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
SHAREGPT = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]


def find(columns: dict[str, list[Any]], wanted: str | None = None) -> TextColumn:
    return find_text_column(datasets.Dataset.from_dict(columns), wanted)


def render(columns: dict[str, list[Any]], tokenizer: Any, wanted: str | None = None) -> list[str]:
    rows = datasets.Dataset.from_dict(columns)
    return build_renderer(find_text_column(rows, wanted), tokenizer)(rows[:])


@pytest.mark.parametrize(
    ("columns", "kind", "chosen"),
    [
        ({"title": ["a long title indeed"], "text": ["short"]}, "text", ("text",)),
        ({"messages": [OPENAI], "prompt": ["a very long prompt to be ignored"]}, "chat", ("messages",)),
        ({"id": ["abcdefghijklmnopqrstuvwxyz"], "conversations": [SHAREGPT]}, "chat", ("conversations",)),
        ({"instruction": ["a"], "input": [""], "output": ["b"], "id": ["0000000000"]}, "prompt", None),
        ({"instruction": ["a"], "output": ["b"]}, "prompt", ("instruction", "output")),
        ({"title": ["short"], "body": ["a much longer text"], "votes": [3]}, "text", ("body",)),
        ({"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}, "ids", ("input_ids",)),
        # The first rows may be empty, as wikitext's are.
        ({"text": ["", None, "filled"], "other": ["longer than that", "x", "y"]}, "text", ("text",)),
        ({"messages": [[], OPENAI]}, "chat", ("messages",)),
        # A column called text that holds none is not taken for one.
        ({"text": [1, 2], "body": ["a", "b"]}, "text", ("body",)),
        # Bad rows do not count, the first row included.
        ({"messages": [[], SHAREGPT], "id": ["0", "1"]}, "chat", ("messages",)),
    ],
)
def test_column_is_found(columns: dict[str, list[Any]], kind: str, chosen: tuple[str, ...] | None) -> None:
    column = find(columns)
    assert (column.kind, column.columns) == (kind, chosen or ("instruction", "input", "output"))
    assert "--text_column" in column.describe_choice()
    assert " + ".join(column.columns) in column.describe_choice()


def test_rows_of_other_types_do_not_hide_the_text() -> None:
    sample = {"body": [5, "some text", None, {"a": 1}, "more text"], "number": [1, 2, 3, 4, 5]}
    for wanted in (None, "body"):
        assert choose_text_column(list(sample), sample, wanted).columns == ("body",)
    mixed = {"messages": [["x"], "a", OPENAI, SHAREGPT]}
    assert choose_text_column(["messages"], mixed, None).kind == "chat"


def test_column_can_be_named() -> None:
    columns = {"text": ["a"], "other": ["b"], "number": [1], "messages": [OPENAI]}
    assert find(columns, "other") == TextColumn("text", ("other",), "--text_column")
    assert find(columns, "messages").kind == "chat"
    with pytest.raises(SaetrainError, match=r"--text_column othr: no such column\. Did you mean other\?.* number"):
        find(columns, "othr")
    with pytest.raises(SaetrainError, match="--text_column number: it contains neither strings"):
        find(columns, "number")


@pytest.mark.parametrize("columns", [{"number": [1]}, {"title": ["", None]}])
def test_no_text_is_an_error_that_names_the_columns(columns: dict[str, list[Any]]) -> None:
    with pytest.raises(SaetrainError, match=f"no text column was found: the data set has {next(iter(columns))}"):
        find(columns)


def test_rows_without_text_become_empty(wordpiece: Any) -> None:
    assert render({"text": ["a", None, ""]}, wordpiece) == ["a", "", ""]
    assert render({"messages": [OPENAI, [], None]}, wordpiece)[1:] == ["", ""]


def test_instruction_rows_are_joined_without_their_empty_parts(wordpiece: Any) -> None:
    columns = {"instruction": ["add", "greet"], "input": ["1 2", None], "output": ["3", "hello"]}
    assert render(columns, wordpiece) == ["add\n\n1 2\n\n3", "greet\n\nhello"]


@pytest.mark.parametrize("messages", [OPENAI, SHAREGPT])
def test_chat_without_a_template(wordpiece: Any, messages: list[dict[str, str]]) -> None:
    assert wordpiece.chat_template is None
    assert render({"messages": [messages]}, wordpiece) == ["user: Why?\n\nassistant: Because."]


@pytest.mark.parametrize("messages", [OPENAI, SHAREGPT])
def test_chat_with_the_tokenizer_s_template(chat_bpe: Any, messages: list[dict[str, str]]) -> None:
    expected = "<s><|user|>Why?<|endoftext|><|assistant|>Because.<|endoftext|>"
    assert render({"messages": [messages]}, chat_bpe) == [expected]


def test_chat_columns_of_lists_and_of_content_parts(wordpiece: Any) -> None:
    expected = ["user: Why?\n\nassistant: Because."]
    # Older data sets hold a dictionary of lists for a list of dictionaries.
    lists = {key: [turn[key] for turn in SHAREGPT] for key in ("from", "value")}
    assert render({"conversations": [lists]}, wordpiece) == expected
    parts = [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in OPENAI]
    assert render({"messages": [parts]}, wordpiece) == expected


def test_chat_template_s_refusal_is_a_user_error(chat_bpe: Any) -> None:
    chat_bpe.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(SaetrainError, match=r"refuses a conversation \(roles user, assistant.*roles must alternate"):
        render({"messages": [OPENAI]}, chat_bpe)


TURN = {"role": "user", "content": "hi"}
CHATS: list[tuple[Any, list[dict[str, str]] | None]] = [
    ([TURN], [TURN]),
    ({"role": ["user"], "content": ["hi"]}, [TURN]),
    ([{"from": "human", "value": "hi"}], [TURN]),
    ([{"content": ["a", {"text": "b"}, {"image": 3}]}], [{"role": "user", "content": "a\nb"}]),
    ([{"role": "user", "content": None}], []),
    (["hi"], None),
    ([[TURN]], None),
    ("hi", None),
    (3, None),
    ([{"role": 3, "content": "hi"}], None),
    ([{"role": "user", "content": 3}], None),
    ([{"role": "user", "content": [{"text": 3}]}], None),
    ([{"role": "user", "content": {"text": "hi"}}], None),
    ({"role": ["user"], "content": ["hi", "you"]}, None),
    ({"role": "user", "content": "hi"}, None),
    ([TURN, None], None),
]


@pytest.mark.parametrize(("value", "messages"), CHATS)
def test_chats_of_any_shape_are_read_or_bad_rows(value: Any, messages: list[dict[str, str]] | None) -> None:
    assert _to_messages(value) == messages
    assert matches_kind(value, "chat") == (messages is not None)


@pytest.mark.parametrize(
    ("value", "expected"),
    [([1, 2], True), ([], True), (None, True), ([1, None], False), ([[1]], False), (["1"], False), ([1.5], False)],
)
def test_token_ids_are_whole_numbers(value: Any, expected: bool) -> None:
    assert matches_kind(value, "ids") is expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes more than 0.2 s"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages + 1 }}", "can only concatenate"),
        ("{{ raise_exception('no \x1b[31m') }}", r"no \\x1b\[31m"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    ],
)
def test_chat_templates_that_fail_or_never_end_are_refused(
    template: str, message: str, wordpiece: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saetrain.data.text_column.MAX_TEMPLATE_S", 0.2)
    monkeypatch.setattr(wordpiece, "chat_template", template)
    render = build_renderer(TextColumn("chat", ("messages",), ""), wordpiece)
    with pytest.raises(SaetrainError, match=f"chat template refuses a conversation .*: .*{message}"):
        render({"messages": [[TURN]]})
