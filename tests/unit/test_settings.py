"""Every number of every command has a range, and every text is free of what a file system or terminal can't take."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any

import pytest

from saetrain.cli import COMMANDS
from saetrain.config import config_class, settings_sections
from saetrain.errors import SaetrainError
from saetrain.settings import Range, Settings, find_range

CONFIGS = (config_class("topk"), *(config for config, _ in COMMANDS.values()))
SECTIONS = sorted({*CONFIGS, *(cls for config in CONFIGS for cls in settings_sections(config).values())}, key=str)


def fields_of(kinds: tuple[type, ...]) -> list[tuple[type[Settings], str, Any]]:
    """(settings class, field, type) of all fields that hold one of ``kinds``, alone, optional or in a list."""
    found = []
    for cls in SECTIONS:
        plain, full = typing.get_type_hints(cls), typing.get_type_hints(cls, include_extras=True)
        for item in dataclasses.fields(cls):
            options = {plain[item.name], *typing.get_args(plain[item.name])}
            options |= {inner for option in options for inner in typing.get_args(option)}
            if options & set(kinds):
                found.append((cls, item.name, full[item.name]))
    return found


def build(cls: type[Settings], name: str, value: Any) -> Settings:
    required = {
        item.name: ("x",) if item.name in ("dataset", "runs") else "x"
        for item in dataclasses.fields(cls)
        if item.default is item.default_factory is dataclasses.MISSING
    }
    hint = typing.get_type_hints(cls)[name]
    options = [hint, *typing.get_args(hint)]
    is_list = any(typing.get_origin(option) is tuple for option in options)
    return cls(**{**required, name: (value,) if is_list else value})


NUMBERS = fields_of((int, float))
BAD_NUMBERS = [math.nan, math.inf, -math.inf, 10**40, -(10**40), 16**20_000]


def test_every_number_has_a_range() -> None:
    assert len(NUMBERS) > 40
    assert not [name for _, name, hint in NUMBERS if not isinstance(find_range(hint), Range)]


@pytest.mark.parametrize(("cls", "name"), [(cls, name) for cls, name, _ in NUMBERS])
def test_numbers_out_of_range_are_refused_by_flag(cls: type[Settings], name: str) -> None:
    for value in BAD_NUMBERS:
        with pytest.raises(SaetrainError, match=rf"^--{name} .*: must be ") as caught:
            build(cls, name, value)
        assert len(str(caught.value)) < 200


TEXTS = [(cls, name) for cls, name, _ in fields_of((str,))]
BAD_TEXTS = {
    "nul": ("a\0b", "a control character"),
    "escape": ("a\x1b[31m", "a control character"),
    "new line": ("a\nsaetrain: error: forged", "a control character"),
    "lone surrogate": ("a\udcff", "not UTF-8"),
    "right to left": ("a\u202eb", "changes the direction"),
    "line separator": ("a\u2028b", "a line separator"),
    "long name": ("a" * 256, "too long"),
    "long path": ("a/" * 2500, "too long"),
}


@pytest.mark.parametrize(("cls", "name"), TEXTS)
def test_texts_that_no_path_can_have_are_refused_by_flag(cls: type[Settings], name: str) -> None:
    for text, problem in BAD_TEXTS.values():
        with pytest.raises(SaetrainError, match=rf"^--{name} .*{problem}") as caught:
            build(cls, name, text)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "/", "a\\b", "x" * 256, "a\0"])
def test_names_of_runs_that_are_no_folder_names_are_refused(name: str) -> None:
    (settings,) = (cls for cls, field in TEXTS if field == "run_name")
    with pytest.raises(SaetrainError, match="--run_name "):
        build(settings, "run_name", name)
