"""Replace the absolute paths of this machine in everything that is shared by the last part of their names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath, PurePosixPath, PureWindowsPath
from typing import Any, TypeGuard


def is_local_path(text: str) -> bool:
    """Return whether ``text`` as a whole is a path of a machine, and not a hub id or a plain name."""
    is_absolute = PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()
    return is_absolute or text.startswith(("~", "./", "../"))


def is_hub_id(name: str | None) -> TypeGuard[str]:
    """Return whether ``name`` can be the name of a repository on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not is_local_path(name or "")


def iterate_strings(value: Any) -> Iterator[str]:
    """Yield every string of a JSON value, also the keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from iterate_strings([*value, *value.values()])
    elif isinstance(value, list):
        for item in value:
            yield from iterate_strings(item)


class PathShortener:
    """Replaces local paths in texts and JSON values.

    The paths are the home directory, the keys of ``names`` ({path: name in its place}), and every
    string of the JSON values ``documents`` that is a path as a whole.
    """

    def __init__(self, documents: Iterable[Any], names: Mapping[str, str]) -> None:
        self.given = names
        found = {text: PureWindowsPath(text).name for text in iterate_strings(list(documents)) if is_local_path(text)}
        # Roots of a file system have no name, and would match everywhere.
        self.names = {
            path: name
            for path, name in {os.path.expanduser("~"): "~", **found, **names}.items()
            if PurePath(path).name not in ("", "..")
        }
        longest_first = sorted(self.names, key=len, reverse=True)
        # Without a path, the pattern matches nothing.
        paths = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._pattern = re.compile(rf"(?<![\w.~-])(?:{paths})(?![\w-])")

    def find_paths(self, text: str) -> list[str]:
        """Return the local paths in ``text``."""
        return self._pattern.findall(text)

    def shorten_paths(self, value: Any) -> Any:
        """Return a text or a JSON value without local paths."""
        if isinstance(value, str):
            return self._pattern.sub(lambda match: self.names[match[0]], value)
        if isinstance(value, Mapping):
            return {self.shorten_paths(key): self.shorten_paths(item) for key, item in value.items()}
        return [self.shorten_paths(item) for item in value] if isinstance(value, list) else value
