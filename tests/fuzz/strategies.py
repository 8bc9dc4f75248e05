"""Odd values and damaged files."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

ODD_TEXTS = [
    "",
    " ",
    ".",
    "..",
    "/",
    "../../outside",
    "/etc/passwd",
    "a\0b",
    "\x1b[31mred",
    "a\nFORGED",
    "\u202eab",
    "\udcff",
    "é" * 200,
    "x" * 5000,
    "a/" * 3000,
    "1e999",
    "nan",
    "-1",
    "9" * 40,
    "9" * 5000,
    "true",
    "null",
    "--",
    "--k",
    "%s%n{0}",
    "~",
    "*",
    "/dev/zero",
    "/dev/stdin",
    "https://localhost/x",
]
texts = st.sampled_from(ODD_TEXTS) | st.text(st.characters(), max_size=30)
odd_numbers = st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64, 10**40, 0.5, -0.0, 1e-320, 1e308])
numbers = odd_numbers | st.integers() | st.floats()


def nest(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


json_values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
) | st.builds(nest, st.sampled_from([70, 500]))


@st.composite
def changed_objects(draw: st.DrawFn, value: dict[str, Any]) -> dict[str, Any]:
    """Draw ``value`` with one to three entries, at any depth, replaced, removed or added."""
    changed = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        place: Any = changed
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = draw(st.sampled_from(keys)) if keys else None
            if key is None or not isinstance(place[key], (dict, list)) or draw(st.booleans()):
                break
            place = place[key]
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        if key is None or action == "add":
            if isinstance(place, dict):
                place[draw(texts)] = draw(json_values)
        elif action == "remove":
            del place[key]
        else:
            place[key] = draw(json_values)
    return changed


def dump_json(value: Any) -> bytes:
    return json.dumps(value).encode(errors="surrogatepass")


@st.composite
def damaged_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Draw ``data`` with one to three damages: bytes flipped, cut, doubled or inserted."""
    odd = [b"[" * 50_000, b"{" * 99, b"\xff\xfe", b"\0", b"\n", b'"', b"9" * 5000, b",", b": ", b"\x1b[31m", b"&a *a"]
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from([0, 1, 2, 8, 50, 10**6])))
        action = draw(st.sampled_from(["cut", "double", "insert", "flip"]))
        if action == "cut":
            data = data[:start] + data[end:]
        elif action == "double":
            data = data[:end] + data[start:]
        elif action == "insert":
            data = data[:start] + draw(st.sampled_from(odd) | st.binary(max_size=20)) + data[start:]
        else:
            flipped = bytes(byte ^ draw(st.integers(1, 255)) for byte in data[start : start + 3])
            data = data[:start] + flipped + data[start + 3 :]
    return data[:300_000]


def damaged_objects(value: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """JSON files that were ``value``: changed entries, damaged bytes, or another value."""
    return changed_objects(value).map(dump_json) | damaged_bytes(dump_json(value)) | json_values.map(dump_json)
