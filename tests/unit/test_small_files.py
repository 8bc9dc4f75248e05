"""Settings and metadata of any content: the value, or one line that names the file and the line or key."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from saetrain.cli import parse_train
from saetrain.errors import SaetrainError
from saetrain.small_files import (
    MAX_DEPTH,
    MAX_JSON_BYTES,
    MAX_YAML_BYTES,
    measure_depth,
    parse_json,
    parse_yaml,
    read_json_object,
    read_settings,
)

LAUGHS = "a: &a [x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
BAD_YAML = {
    "deep": ("[" * 5000, "is nested more than 64 levels deep"),
    "deep mapping": ("{a: " * 100 + "}" * 100, "is nested more than 64 levels deep"),
    "aliases": (LAUGHS, r"line 1: anchors \(&\), aliases \(\*\) and tags \(!\) are not allowed"),
    "tag": ("model: !!python/object/apply:os.system [ls]", "line 1: anchors .* are not allowed"),
    "duplicate key": ("k: 3\nlayers: 1\nk: 4", "line 3: the key 'k' occurs twice"),
    "duplicate spelling": ("max_tokens: 3\nmax-tokens: 4", "line 2: the key 'max-tokens' occurs twice"),
    "10,000 digits": (f"k: {'9' * 10_000}", "is not valid YAML: Exceeds the limit"),
    "date": ("k: 2024-99-99", "is not valid YAML: month must be in 1..12"),
    "bits": ("k: 0b_", "is not valid YAML"),
    "half a mapping": ("k: [3\nlayers: 4", "line 2: "),
    "control character": ("k: \x07", "is not valid YAML: unacceptable character"),
    "list as a key": ("? [a]\n: b", "line 1: found unhashable key"),
    "escape in a key": ('"\\e[31mred\\nforged": 3', r"there is no setting '\\x1b\[31mred\\nforged'"),
    "40 digits": (f"k: {'9' * 40}", "--k 9+: must be at most"),
    "hexadecimal digits": (f"k: 0x{'f' * 20_000}", "--k a number of 80000 bits: must be at most"),
    "not a number": ("auxk_alpha: .nan", "auxk_alpha: found nan, must be a finite number"),
    "infinity": ("lr: .inf", "lr: found inf, must be a finite number"),
    "list of lists": ("layers: [[1]]", r"layers: found \[\[1\]\], must be a list of whole numbers or strings or null"),
    "too large": (f"# {'x' * MAX_YAML_BYTES}", "is larger than 100,000 bytes"),
}


@pytest.mark.parametrize("name", BAD_YAML)
def test_settings_files_that_are_refused(tmp_path: Path, name: str) -> None:
    text, message = BAD_YAML[name]
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(SaetrainError, match=message) as caught:
        parse_train(["--config", str(path), "model", "data"])
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


BAD_JSON = {
    "deep": ('{"a": ' + "[" * 100_000, "is nested 100,001 levels deep; at most 64"),
    "duplicate key": ('{"d_in": 3, "k": 1, "d_in": 4}', "is not valid JSON: the key 'd_in' occurs twice"),
    "10,000 digits": (f'{{"k": {"9" * 10_000}}}', "is not valid JSON: Exceeds the limit"),
    "list": ("[]", "must contain a JSON object"),
    "half": ('{\n"k": 3,', "is not valid JSON: .*line 2"),
    "too large": (f'{{"k": "{"x" * MAX_JSON_BYTES}"}}', "is larger than 10,000,000 bytes"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_json_files_that_are_refused(tmp_path: Path, name: str) -> None:
    text, message = BAD_JSON[name]
    path = tmp_path / "cfg.json"
    path.write_text(text)
    with pytest.raises(SaetrainError, match=rf"cfg\.json: {message}"):
        read_json_object(path)


def test_a_string_without_an_end_hides_no_brackets() -> None:
    """pyarrow parses the rows of a block in parallel, so an invalid row does not keep it from the next one."""
    deep = b'{"b": ' + b"[" * 500 + b"]" * 500 + b"}"
    for line_break in (b"\n", b"\r\n", b"\r"):
        assert measure_depth(b'{"text": "no end}' + line_break + deep) >= 500
        assert measure_depth(b'{"text": "no end\\' + line_break + deep) >= 500


def test_json_in_utf_16_is_refused() -> None:
    """Its depth is not measured: read as UTF-8, the escaped quote begins a string."""
    text = '{"a":"\\"","b":' + "[" * 5000 + "]" * 5000 + "}"
    with pytest.raises(SaetrainError, match=r"cfg\.json: is not valid JSON"):
        parse_json(text.encode("utf-16-le"), "cfg.json")
    assert parse_json(b"\xef\xbb\xbf{}", "cfg.json") == {}


@pytest.mark.parametrize("read", [lambda path: read_settings(str(path)), read_json_object])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, read: Any) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes").write_bytes(b"a: 1\n\xff: 2")
    cases = {"/dev/zero": "is not a regular file", "/dev/null": "is not a regular file"}
    cases |= {
        str(tmp_path / "fifo"): "is not a regular file",
        str(tmp_path / "folder"): "can't be read: Is a dir",
    }
    cases |= {str(tmp_path / "bytes"): "line 2 is not UTF-8", str(tmp_path / "no"): "can't be read: No such file"}
    for path, message in cases.items():
        with pytest.raises(SaetrainError, match=f"{path}: {message}"):
            read(Path(path))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def depth_of(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (max(map(depth_of, inner), default=0) + 1) if isinstance(value, (list, dict)) else 0


@dataclass(frozen=True)
class Entry:
    name: str
    sizes: tuple[int, int]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"name": 3, "sizes": [1, 2]}', "here: name: Input should be a valid string"),
        ('{"name": "a", "sizes": [1, "2"]}', "here: sizes.1: Input should be a valid integer"),
        ('{"name": "a", "name": "b", "sizes": [1, 2]}', "here: is not valid JSON: the key 'name' occurs twice"),
        ('{"name": "a", "sizes": ' + "[" * 1000, "here: is nested 1,001 levels deep"),
        ("[", "here: is not valid JSON"),
    ],
)
def test_a_schema_adds_to_the_other_checks(text: str, said: str) -> None:
    assert parse_json(b'{"name": "a", "sizes": [1, 2], "later": 3}', "here", Entry) == Entry("a", (1, 2))
    with pytest.raises(SaetrainError, match=said):
        parse_json(text.encode(), "here", Entry)


@given(JSON_VALUES, st.integers(0, 2 * MAX_DEPTH))
def test_valid_json_is_read_up_to_the_depth_limit(value: Any, extra: int) -> None:
    for _ in range(extra):
        value = [value]
    text = json.dumps(value)
    # Brackets in strings do not count, so many of them lead to the exact measurement.
    padded = json.dumps([value, "[{" * MAX_DEPTH])
    assert measure_depth(padded.encode()) == max(depth_of(value) + 1, 1)
    if depth_of(value) <= MAX_DEPTH:
        assert parse_json(text.encode(), "here") == value
    else:
        with pytest.raises(SaetrainError, match="levels deep"):
            parse_json(text.encode(), "here")


@given(st.dictionaries(st.text().filter(str.isprintable), st.integers() | st.lists(st.booleans())))
def test_what_a_run_writes_as_yaml_is_read(value: Any) -> None:
    assert parse_yaml(yaml.safe_dump(value, allow_unicode=True).encode(), "here") == value
