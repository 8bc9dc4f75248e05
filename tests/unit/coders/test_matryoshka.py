"""Prefixes of Matryoshka."""

from __future__ import annotations

from saetrain.coders.matryoshka import MatryoshkaSettings


def test_prefixes_are_not_rounded_up_because_of_a_rounding_error() -> None:
    settings = MatryoshkaSettings(prefixes=(0.07, 0.14, 0.55, 1.0))
    assert settings.resolve_prefixes(100) == (7, 14, 55, 100)
    assert settings.resolve_prefixes(10) == (1, 2, 6, 10)
