"""Validation of ``cfg.json`` (types of its entries) and of the weights (shapes and dtypes)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from saetrain.errors import SaetrainError

# type() instead of isinstance() for numbers, because bool is a subclass of int.
TYPE_CHECKS: dict[str, Callable[[Any], bool]] = {
    "a string": lambda value: isinstance(value, str),
    "a string or a list": lambda value: isinstance(value, (str, list)),
    "a positive integer": lambda value: type(value) is int and value >= 1,
    "a number": lambda value: type(value) in (int, float),
    "true or false": lambda value: isinstance(value, bool),
    "true, false or a list": lambda value: isinstance(value, (bool, list)),
    "a JSON object": lambda value: isinstance(value, dict),
}
TOP_LEVEL_TYPES = {
    "d_in": "a positive integer",
    "d_sae": "a positive integer",
    "k": "a positive integer",
    "metadata": "a JSON object",
    "saetrain": "a JSON object",
}
METADATA_TYPES = {
    "model_name": "a string",
    "hook_name": "a string",
    "hf_hook_name": "a string",
    "dataset_path": "a string or a list",
    "context_size": "a positive integer",
    "prepend_bos": "true or false",
    "exclude_special_tokens": "true, false or a list",
}
SAETRAIN_TYPES = {
    "model": "a string",
    "model_revision": "a string",
    "model_weights_sha256": "a string",
    "hookpoint": "a string",
    "hook_name": "a string",
    "dataset": "a string or a list",
    "ctx_len": "a positive integer",
    "prepend_bos": "true or false",
    "exclude_special_tokens": "true or false",
    "exclude_sinks": "true or false",
    "norm_limit": "a number",
}


def require_entry_types(path: Path, config: Mapping[str, Any]) -> None:
    """Raise SaetrainError unless every entry that is read is missing, null or of its type."""
    _require_types(path, "", config, TOP_LEVEL_TYPES)
    _require_types(path, "metadata.", config.get("metadata") or {}, METADATA_TYPES)
    _require_types(path, "saetrain.", config.get("saetrain") or {}, SAETRAIN_TYPES)


def _require_types(path: Path, prefix: str, entries: Mapping[str, Any], expected_types: Mapping[str, str]) -> None:
    for key, expected_type in expected_types.items():
        value = entries.get(key)
        if value is not None and not TYPE_CHECKS[expected_type](value):
            raise SaetrainError(f"{path}: {prefix}{key} must be {expected_type}, found {value!r}")


def require_tensor_shapes(
    weights: Mapping[str, Tensor],
    dim_letters: Mapping[str, str],
    num_latents: int | None = None,
    d_in: int | None = None,
) -> None:
    """Raise ValueError unless the tensors have consistent shapes and a floating-point dtype.

    Args:
        weights: {name: tensor}.
        dim_letters: {name: one letter per dimension}, F for latents and D for width; the first name has both letters.
        num_latents: F; taken from the first tensor if None.
        d_in: D; taken from the first tensor if None.
    """
    sizes = {letter: size for letter, size in (("F", num_latents), ("D", d_in)) if size is not None}
    for name, dims in dim_letters.items():
        tensor = weights.get(name)
        found_shape = None if tensor is None else tuple(tensor.shape)
        if found_shape is not None and len(found_shape) == len(dims):
            for letter, size in zip(dims, found_shape, strict=True):
                sizes.setdefault(letter, size)
        expected_shape = tuple(sizes.get(letter) for letter in dims)
        if found_shape != expected_shape:
            expected_text = str(tuple(sizes.get(letter, letter) for letter in dims)).replace("'", "")
            raise ValueError(
                f"{name} must have shape {expected_text}, found {'nothing' if found_shape is None else found_shape}"
            )
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must contain floating-point numbers, found {tensor.dtype}")
