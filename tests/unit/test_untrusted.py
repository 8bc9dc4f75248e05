"""Untrusted text in messages: escaped, short, in one line."""

from __future__ import annotations

import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.text import Text

from saetrain.cli import main
from saetrain.errors import SaetrainError
from saetrain.runs.sae_table import EscapingConsole
from saetrain.untrusted import MAX_SHOWN_CHARS, escape_text, require_plain_text, show_text, show_value

FORGED = "a\nsaetrain: error: forged\x1b[31m\u202e\udcff"


@given(st.text(st.characters()))
def test_shown_text_is_one_printable_short_line(text: str) -> None:
    assert escape_text(text).isprintable()
    assert show_text(text * 20).isprintable()
    assert len(show_text(text * 20)) <= MAX_SHOWN_CHARS
    if text.isprintable() and len(text) <= MAX_SHOWN_CHARS:
        assert show_text(text) == text


@given(
    st.recursive(
        st.integers() | st.floats(allow_subnormal=False) | st.text(st.characters()),
        lambda inner: st.lists(inner, max_size=9),
    )
)
def test_shown_values_are_short(value: object) -> None:
    assert len(show_value(value)) <= MAX_SHOWN_CHARS
    assert show_value(value).isprintable()


def test_values_without_a_short_notation_are_shown() -> None:
    nested: list[object] = ["x" * 1000]
    for _ in range(60):
        nested = [nested, nested, nested]
    assert len(show_value(nested)) <= MAX_SHOWN_CHARS
    assert show_value(16**9999) == "a number of 39997 bits"


@given(st.text(st.characters()))
def test_plain_text_is_accepted_or_refused_in_one_line(text: str) -> None:
    try:
        assert require_plain_text(text, "name") == text
    except SaetrainError as error:
        message = str(error)
    else:
        message = text.encode().decode()
    assert message.isprintable() or unicodedata.category(next(c for c in message if not c.isprintable())) != "Cc"


@pytest.mark.parametrize("words", [[f"--{FORGED}"], ["--k", FORGED], [f"--k={FORGED}"], ["--run_name", FORGED]])
def test_flags_and_values_can_not_forge_a_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["model", "data", *words])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("saetrain: error: --")
    assert line.isprintable()


def test_tables_escape_what_they_show_and_keep_their_own_lines() -> None:
    file = io.StringIO()
    EscapingConsole(file=file, width=300).print(Text(f"{FORGED[12:]}\x07"), "[bold]second[/bold]", sep="\n")
    lines = file.getvalue().rstrip("\n").split("\n")
    assert len(lines) == 2
    assert all(line.isprintable() for line in lines)
