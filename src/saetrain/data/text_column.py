"""Text column: which column contains the text, and how its rows (plain, chat or instruction) become documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from saetrain.errors import SaetrainError, did_you_mean

if TYPE_CHECKING:
    import datasets

CHAT_COLUMNS = ("messages", "conversations", "conversation")
PROMPT_COLUMNS = ("instruction", "input", "output")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant"}
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
    """Return the ``TextColumn.kind`` of a column by its first value that is neither None nor an empty list."""
    value = next((v for v in values if v is not None and v != []), None)
    if isinstance(value, str):
        return "text"
    turn = value[0] if isinstance(value, list) else value
    if isinstance(turn, dict) and ({"role", "content"} <= turn.keys() or {"from", "value"} <= turn.keys()):
        return "chat"
    return "ids" if isinstance(value, list) and isinstance(turn, int) else None


def matches_kind(value: Any, kind: str) -> bool:
    """Return whether a column of this ``TextColumn.kind`` may contain ``value``; None and [] are allowed."""
    return value is None or value == [] or _column_kind([value]) == ("text" if kind == "prompt" else kind)


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
        from jinja2 import TemplateError

        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages[:4])
            raise SaetrainError(
                f"the tokenizer's chat template refuses a conversation (roles {roles}, …): {error}; "
                "choose another column with --text_column"
            ) from error
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _to_messages(value: Any) -> list[dict[str, str]]:
    """Convert messages of OpenAI (role, content) or ShareGPT (from, value) to role and content."""
    if isinstance(value, dict):
        keys = list(value)
        value = [dict(zip(keys, entry, strict=True)) for entry in zip(*value.values(), strict=True)]
    messages = []
    for turn in value or []:
        role = turn.get("role") or turn.get("from") or "user"
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        if isinstance(content, list):  # OpenAI's content parts; parts without text, such as images, are skipped
            content = "\n".join(part["text"] for part in content if part.get("text"))
        if content:
            messages.append({"role": SHAREGPT_ROLES.get(role, role), "content": str(content)})
    return messages
