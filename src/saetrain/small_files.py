"""Small JSON and YAML files that other programs may have written: read with limits on kind, size and depth."""

from __future__ import annotations

import functools
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from saetrain.errors import SaetrainError
from saetrain.untrusted import show_text

MAX_JSON_BYTES = 10_000_000
MAX_YAML_BYTES = 100_000
"""PyYAML reads about 50 kB per second."""
MAX_DEPTH = 64
"""Largest depth of lists and objects; a parser that recurses can crash on thousands."""
# A string ends at a line break: an unclosed one must not hide the brackets of later rows, which are parsed as well.
JSON_STRINGS = re.compile(rb'"[^"\\\r\n]*(?:\\[^\r\n][^"\\\r\n]*)*"?')
BRACKETS = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")


def measure_depth(data: bytes) -> int:
    """Return the largest depth of brackets in JSON, also if it is not valid."""
    opening = data.count(b"[") + data.count(b"{")
    if opening <= MAX_DEPTH:
        return opening
    brackets = JSON_STRINGS.sub(b"", data).translate(BRACKETS, delete=bytes(set(range(256)) - set(b"[{]}")))
    return int(np.frombuffer(brackets, np.int8).cumsum(dtype=np.int64).max(initial=0))


def read_small_file(path: Path, label: str, max_bytes: int) -> bytes:
    """Return the content of a file; raise SaetrainError that names ``label`` if it is not small, regular and UTF-8."""
    try:
        # Without O_NONBLOCK, opening a FIFO waits for a writer.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise SaetrainError(f"{label}: is not a regular file")
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise SaetrainError(f"{label}: can't be read: {error.strerror}") from error
    if len(data) > max_bytes:
        raise SaetrainError(f"{label}: is larger than {max_bytes:,} bytes")
    try:
        data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SaetrainError(f"{label}: line {line} is not UTF-8") from error
    return data


def parse_json(data: bytes, label: str, schema: Any = None) -> Any:
    """Return the value of JSON text, as type ``schema`` if one is given.

    Raises SaetrainError that names ``label`` if the text is invalid or deep, if a key occurs twice, or if an entry has
    another type than in ``schema``.
    """
    depth = measure_depth(data)
    if depth > MAX_DEPTH:
        raise SaetrainError(f"{label}: is nested {depth:,} levels deep; at most {MAX_DEPTH} are allowed")
    try:
        # Given bytes, the parser would also take UTF-16, whose depth was not measured.
        value = json.loads(data.decode("utf-8-sig"), object_pairs_hook=_build_object)
    except ValueError as error:
        raise SaetrainError(f"{label}: is not valid JSON: {error}") from error
    return value if schema is None else _convert_json(data, label, schema)


def _convert_json(data: bytes, label: str, schema: Any) -> Any:
    # The import takes 0.2 s, and most commands read no such file.
    import pydantic

    try:
        return _build_adapter(schema).validate_json(data, strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise SaetrainError(": ".join(filter(None, [label, show_text(where), first["msg"]]))) from error


@functools.cache
def _build_adapter(schema: Any) -> Any:
    import pydantic

    return pydantic.TypeAdapter(schema)


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key '{show_text(twice)}' occurs twice")
    return found


def read_json(path: Path, schema: Any = None, label: str = "") -> Any:
    """Return what :func:`parse_json` returns of a small file; ``label``: its name in messages, by default its path."""
    label = label or str(path)
    return parse_json(read_small_file(path, label, MAX_JSON_BYTES), label, schema)


def read_json_object(path: Path, remedy: str = "") -> dict[str, Any]:
    """Return the JSON object in a file; raise SaetrainError that ends with ``remedy`` if there is none."""
    try:
        content = read_json(path)
        if not isinstance(content, dict):
            raise SaetrainError(f"{path}: must contain a JSON object")
    except SaetrainError as error:
        raise SaetrainError(f"{error}{remedy}") from error
    return content


class _StrictLoader(yaml.SafeLoader):
    """YAML loader that refuses aliases, tags, deep nesting, and keys that occur twice."""

    normalize_key: Callable[[str], str] = str
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        problem = None
        if isinstance(event, yaml.AliasEvent) or event.anchor or event.tag:
            problem = "anchors (&), aliases (*) and tags (!) are not allowed"
        elif self.depth >= MAX_DEPTH:
            problem = f"is nested more than {MAX_DEPTH} levels deep"
        if problem is not None:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = type(self).normalize_key(key.value) if isinstance(key, yaml.ScalarNode) else ""
            if name in seen:
                problem = f"the key '{show_text(key.value)}' occurs twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


class _SettingsLoader(_StrictLoader):
    """Loader of settings files, in which dashes and underscores in keys are the same."""

    @staticmethod
    def normalize_key(key: str) -> str:
        return key.replace("-", "_")


def parse_yaml(text: bytes, label: str, loader: type[yaml.SafeLoader] = _StrictLoader) -> Any:
    """Return the value of YAML text; raise SaetrainError that names the line if it is not valid or not allowed."""
    try:
        return yaml.load(text, loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise SaetrainError(f"{label}: is not valid YAML: {line}{error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise SaetrainError(f"{label}: is not valid YAML: {str(error).splitlines()[0]}") from error


def read_settings(path: str, flag: str = "--config ") -> dict[str, Any]:
    """Return the flat settings of a YAML file; dashes in names become underscores.

    ``flag`` precedes the file in messages; it is empty if no flag named the file. Raises SaetrainError if the file
    can't be read or does not contain settings.
    """
    label = f"{flag}{path}"
    values = parse_yaml(read_small_file(Path(path), label, MAX_YAML_BYTES), label, _SettingsLoader)
    if not isinstance(values, dict):
        raise SaetrainError(f"{label}: must contain lines of the form 'setting: value'")
    return {_SettingsLoader.normalize_key(str(name)): value for name, value in values.items()}
