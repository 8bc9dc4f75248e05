"""Text column: which column contains the text, and how its rows (plain, chat or instruction) become documents."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from saetrain.errors import SaetrainError, did_you_mean
from saetrain.untrusted import show_text, show_value

if TYPE_CHECKING:
    import datasets

CHAT_COLUMNS = ("messages", "conversations", "conversation")
PROMPT_COLUMNS = ("instruction", "input", "output")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant"}
KIND_NAMES = {"text": "text", "prompt": "text", "chat": "chat messages", "ids": "a list of token ids"}
MAX_TEMPLATE_S = 10
"""Seconds that a chat template may take for a conversation; a template can contain endless loops."""
SAMPLE_ROWS = 64
"""Number of rows from which the text column is chosen."""

Rows = dict[str, list[Any]]


@dataclass(frozen=True)
class TextColumn:
    """The columns that contain the text, and how their values become documents."""

    kind: str
    """`text`, `chat`, `prompt` or `ids` (rows that already contain token ids)."""
    columns: tuple[str, ...]
    reason: str

    def describe_choice(self) -> str:
        """Return the line for the log: the column, the reason, and how to choose another."""
        return f"text column: {' + '.join(self.columns)} ({self.reason}); choose another with --text_column"


def find_text_column(rows: datasets.Dataset, wanted: str | None) -> TextColumn:
    """Choose the column of ``rows`` that contains the text: ``wanted``, or the most likely one.

    Raises SaetrainError when ``wanted`` is missing or contains no text, or when no column contains text.
    """
    return choose_text_column(list(rows.column_names), rows[: min(SAMPLE_ROWS, len(rows))], wanted)


def choose_text_column(names: list[str], sample: Rows, wanted: str | None) -> TextColumn:
    """Choose the text column as :func:`find_text_column`, from the first rows only ({name: values})."""
    if wanted is not None:
        if wanted not in names:
            raise SaetrainError(
                f"--text_column {wanted}: no such column.{did_you_mean(wanted, names)} "
                f"The data set has {', '.join(names)}"
            )
        kind = _column_kind(sample[wanted])
        if kind is None:
            raise SaetrainError(
                f"--text_column {wanted}: it contains neither strings, chat messages nor token ids; "
                f"the data set has {', '.join(names)}"
            )
        return TextColumn(kind, (wanted,), "--text_column")
    return _guess_text_column(names, sample)


def _guess_text_column(names: list[str], sample: Rows) -> TextColumn:
    if "text" in names and _column_kind(sample["text"]) == "text":
        return TextColumn("text", ("text",), "the column named text")
    for name in CHAT_COLUMNS:
        if name in names and _column_kind(sample[name]) == "chat":
            return TextColumn("chat", (name,), "chat messages")
    if "input_ids" in names and _column_kind(sample["input_ids"]) == "ids":
        return TextColumn("ids", ("input_ids",), "already tokenized")
    prompts = tuple(name for name in PROMPT_COLUMNS if name in names and _column_kind(sample[name]) == "text")
    if "instruction" in prompts and len(prompts) > 1:
        return TextColumn("prompt", prompts, "instruction rows")
    lengths = {
        name: sum(len(v) for v in sample[name] if isinstance(v, str))
        for name in names
        if _column_kind(sample[name]) == "text"
    }
    if not lengths or not max(lengths.values()):
        raise SaetrainError(
            f"no text column was found: the data set has {', '.join(names) or 'no columns'}; "
            "name the text column with --text_column"
        )
    return TextColumn("text", (max(lengths, key=lambda name: lengths[name]),), "longest strings")


def _column_kind(values: list[Any]) -> str | None:
    """Return the most common ``TextColumn.kind`` of the values; None, empty lists and other types do not count."""
    kinds = Counter(kind for value in values if (kind := _value_kind(value)) is not None)
    return kinds.most_common(1)[0][0] if kinds else None


def _value_kind(value: Any) -> str | None:
    if value is None or value == []:
        return None
    if isinstance(value, str):
        return "text"
    turn = value[0] if isinstance(value, list) else value
    if isinstance(turn, dict) and ({"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys()):
        return "chat"
    return "ids" if isinstance(value, list) and isinstance(turn, int) else None


def matches_kind(value: Any, kind: str) -> bool:
    """Return whether a column of this ``TextColumn.kind`` may contain ``value``; None and [] are allowed."""
    if value is None or value == []:
        return True
    if kind == "chat":
        return _to_messages(value) is not None
    if kind == "ids":
        return isinstance(value, list) and all(type(item) is int for item in value)
    return isinstance(value, str)


def require_kind(batch: Rows, column: TextColumn, indices: list[int]) -> None:
    """Raise SaetrainError for the first value that a column of this kind can't contain."""
    for name in column.columns:
        for index, value in zip(indices, batch[name], strict=True):
            if not matches_kind(value, column.kind):
                raise SaetrainError(
                    f"column {show_text(name)}, row {index} (from 0): it contains {type(value).__name__} "
                    f"{show_value(value)} instead of {KIND_NAMES[column.kind]}; --skip_bad_rows skips such rows"
                )


def build_renderer(column: TextColumn, tokenizer: Any) -> Callable[[Rows], list[str]]:
    """Return the function that turns a batch of rows into one string per row, ``""`` for rows without text."""
    first = column.columns[0]
    if column.kind == "text":
        return lambda batch: [value or "" for value in batch[first]]
    if column.kind == "prompt":
        return lambda batch: [
            "\n\n".join(part for part in parts if part)
            for parts in zip(*(batch[c] for c in column.columns), strict=True)
        ]
    assert column.kind == "chat", column
    return lambda batch: [_render_chat(value, tokenizer) for value in batch[first]]


def _render_chat(value: Any, tokenizer: Any) -> str:
    messages = _to_messages(value)
    if not messages:
        return ""
    if tokenizer.chat_template:
        try:
            with limit_time(MAX_TEMPLATE_S):
                return str(tokenizer.apply_chat_template(messages, tokenize=False))
        except Exception as error:  # a template can raise any type
            roles = ", ".join(message["role"] for message in messages[:4])
            reason = f"it takes more than {MAX_TEMPLATE_S} s" if isinstance(error, TimeoutError) else show_text(error)
            raise SaetrainError(
                f"the tokenizer's chat template refuses a conversation (roles {show_text(roles)}, …): {reason}; "
                "choose another column with --text_column"
            ) from error
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


@contextlib.contextmanager
def limit_time(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after ``seconds``; only the main thread of a process can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def raise_timeout(signum: int, frame: Any) -> None:
        raise TimeoutError

    previous = signal.signal(signal.SIGALRM, raise_timeout)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _to_messages(value: Any) -> list[dict[str, str]] | None:
    """Convert messages of OpenAI (role, content) or ShareGPT (from, value) to role and content; None: no messages."""
    if isinstance(value, dict):
        columns = list(value.values())
        if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
            return None
        value = [dict(zip(value, entry, strict=True)) for entry in zip(*columns, strict=True)]
    messages = []
    for turn in value or [] if value is None or isinstance(value, list) else [value]:
        role, content = _split_turn(turn) if isinstance(turn, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        if content:
            messages.append({"role": SHAREGPT_ROLES.get(role, role), "content": content})
    return messages


def _split_turn(turn: dict[str, Any]) -> tuple[Any, Any]:
    """Return the role and the content of a turn; without a value, they are `user` and empty."""
    role = turn.get("role") or turn.get("from") or "user"
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    if isinstance(content, list):  # OpenAI's content parts; parts without text, such as images, are skipped
        parts = [part.get("text") or "" if isinstance(part, dict) else part for part in content]
        content = "\n".join(filter(None, parts)) if all(isinstance(part, str) for part in parts) else parts
    return role, "" if content is None else content
