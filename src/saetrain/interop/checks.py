"""What a ``cfg.json`` and the tensors beside it must be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from saetrain.errors import SaetrainError

# A bool is an int to Python, and no number to whoever wrote the file.
KINDS: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "text or a list": lambda value: isinstance(value, (str, list)),
    "a whole number from 1": lambda value: type(value) is int and value >= 1,
    "a number": lambda value: type(value) in (int, float),
    "true or false": lambda value: isinstance(value, bool),
    "true, false or a list": lambda value: isinstance(value, (bool, list)),
    "a JSON object": lambda value: isinstance(value, dict),
}
TOP = {
    "d_in": "a whole number from 1",
    "d_sae": "a whole number from 1",
    "k": "a whole number from 1",
    "metadata": "a JSON object",
    "saetrain": "a JSON object",
}
METADATA = {
    "model_name": "text",
    "hook_name": "text",
    "hf_hook_name": "text",
    "dataset_path": "text or a list",
    "context_size": "a whole number from 1",
    "prepend_bos": "true or false",
    "exclude_special_tokens": "true, false or a list",
}
OWN = {
    "model": "text",
    "model_revision": "text",
    "model_weights_sha256": "text",
    "hookpoint": "text",
    "hook_name": "text",
    "dataset": "text or a list",
    "ctx_len": "a whole number from 1",
    "prepend_bos": "true or false",
    "exclude_special_tokens": "true or false",
    "exclude_sinks": "true or false",
    "norm_limit": "a number",
}


def require_kinds(path: Path, config: Mapping[str, Any]) -> None:
    """SaetrainError unless every entry that is read is missing, null or of its kind."""
    _require(path, "", config, TOP)
    _require(path, "metadata.", config.get("metadata") or {}, METADATA)
    _require(path, "saetrain.", config.get("saetrain") or {}, OWN)


def _require(path: Path, within: str, entries: Mapping[str, Any], kinds: Mapping[str, str]) -> None:
    for key, kind in kinds.items():
        value = entries.get(key)
        if value is not None and not KINDS[kind](value):
            raise SaetrainError(f"{path}: {within}{key} should be {kind}, found {value!r}")


def require_tensors(
    weights: Mapping[str, Tensor], letters: Mapping[str, str], latents: int | None = None, width: int | None = None
) -> None:
    """ValueError unless the tensors fit one another, and the sizes where these are known.

    ``letters`` {tensor: a letter for each dimension, F latents and D width}, first one that has both.
    """
    sizes = {letter: size for letter, size in (("F", latents), ("D", width)) if size is not None}
    for name, dims in letters.items():
        tensor = weights.get(name)
        found = None if tensor is None else tuple(tensor.shape)
        if found is not None and len(found) == len(dims):
            for letter, size in zip(dims, found, strict=True):
                sizes.setdefault(letter, size)
        wanted = tuple(sizes.get(letter) for letter in dims)
        if found != wanted:
            shown = str(tuple(sizes.get(letter, letter) for letter in dims)).replace("'", "")
            raise ValueError(f"{name} should be of shape {shown}, found {'nothing' if found is None else found}")
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} should hold floating-point numbers, found {tensor.dtype}")
