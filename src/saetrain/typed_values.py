"""Values from flags and files as values of a declared type, and types in words for messages."""

from __future__ import annotations

import functools
import math
import typing
from typing import Annotated, Any

from saetrain.errors import SaetrainError
from saetrain.settings import Range, find_range
from saetrain.untrusted import show_value

TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "true or false",
    type(None): "null",
    dict: "an object",
    list: "a list",
    tuple: "a list",
}


def require_type(value: Any, hint: Any, label: str) -> Any:
    """Return ``value`` of a JSON file as type ``hint``; raise SaetrainError that names ``label`` for another type."""
    return _validate_first([tuple(value) if isinstance(value, list) and takes_list(hint) else value], hint, label, True)


def convert_value(value: Any, hint: Any, label: str) -> Any:
    """Return a value that a person wrote as type ``hint``; raise SaetrainError that names ``label`` if that fails.

    Strings become numbers or booleans where ``hint`` has no strings. A list becomes a tuple, also if only its one
    member is given.
    """
    # YAML 1.1 reads numbers such as 1e-3 as strings. A value of another wrong type is a mistake.
    candidates = [tuple(value) if isinstance(value, list) else value, (value,)]
    return _validate_first(candidates, hint, label, not isinstance(value, str))


def _validate_first(candidates: list[Any], hint: Any, label: str, strict: bool) -> Any:
    # The import takes 0.2 s, and most commands read no file.
    import pydantic

    adapter, value = _build_adapter(hint), candidates[0]
    allowed = find_range(hint)
    problem = _find_range_problem(value, allowed, float)
    for candidate in () if problem else candidates:
        try:
            found = adapter.validate_python(candidate, strict=strict)
        except pydantic.ValidationError:
            continue
        problem = _find_range_problem(found, allowed, int, float)
        if problem is None:
            return found
    if problem:
        raise SaetrainError(f"{label}: found {show_value(value)}, {problem}")
    shown = list(value) if isinstance(value, tuple) else value
    raise SaetrainError(f"{label}: found {show_value(shown)}, must be {describe_type(hint)}")


def _find_range_problem(value: Any, allowed: Range | None, *types: type) -> str | None:
    """Return what is wrong with a number, or with the first such number in a list or object; None if all fit."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
    if allowed is None:
        # Only a number itself must be finite; other values have members of any kind.
        allowed, items = Range(-math.inf, math.inf), (value,)
    return next(filter(None, (allowed.find_problem(item) for item in items if type(item) in types)), None)


@functools.cache
def _build_adapter(hint: Any) -> Any:
    import pydantic

    return pydantic.TypeAdapter(hint, config=pydantic.ConfigDict(allow_inf_nan=False))


def takes_list(hint: Any) -> bool:
    """Return whether a value of type ``hint`` may be a list."""
    return any(typing.get_origin(option) is tuple for option in (hint, *typing.get_args(hint)))


def describe_type(hint: Any) -> str:
    """Return a type in words, such as `a list of whole numbers or null`."""
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if hint in TYPE_NAMES:
        return TYPE_NAMES[hint]
    if origin is typing.Literal:
        return " or ".join(map(str, members))
    if origin is Annotated:
        return describe_type(members[0])
    if origin in (tuple, list):
        each = [describe_type(member).removeprefix("a ") for member in typing.get_args(members[0]) or members[:1]]
        return f"a list of {' or '.join(name if name == 'null' else f'{name}s' for name in each)}"
    return " or ".join(map(describe_type, members)) if origin is not dict else TYPE_NAMES[dict]
