"""Reading of an SAE's folder: ``cfg.json`` with the types of its entries, and tensors with their shapes."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saetrain.activations.model import DTYPES, Dtype
from saetrain.coders.base import SparseCoder
from saetrain.errors import SaetrainError

SAE_CONFIG_FILE = "cfg.json"
PositiveInt = Annotated[int, "positive"]
# type() instead of isinstance() for numbers, because bool is a subclass of int.
JSON_TYPES: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    str: ("a string", lambda value: isinstance(value, str)),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("an integer", lambda value: type(value) is int),
    PositiveInt: ("a positive integer", lambda value: type(value) is int and value >= 1),
    float: ("a number", lambda value: type(value) in (int, float)),
    list: ("a list", lambda value: isinstance(value, list)),
    tuple: ("a list", lambda value: isinstance(value, list)),
    dict: ("a JSON object", lambda value: isinstance(value, dict)),
    Dtype: (" or ".join(DTYPES), lambda value: value in list(DTYPES)),
}


def read_sae_config(folder: Path) -> dict[str, Any]:
    """Return the contents of ``cfg.json`` in ``folder``; raise SaetrainError if it is missing or invalid."""
    path = folder / SAE_CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        inner_folders = sorted(str(found.parent) for found in folder.glob(f"**/{SAE_CONFIG_FILE}"))[:3]
        hint = f"; SAEs were found in {', '.join(inner_folders)}" if inner_folders else ""
        raise SaetrainError(f"{folder}: contains no SAE (no {SAE_CONFIG_FILE}){hint}") from error
    except OSError as error:
        raise SaetrainError(f"{path}: can't be read: {error.strerror}") from error
    except ValueError as error:
        raise SaetrainError(f"{path}: is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise SaetrainError(f"{path}: must be a JSON object")
    require_types(path, config, {"d_in": PositiveInt, "d_sae": PositiveInt, "metadata": dict, "saetrain": dict})
    return config


def require_types(path: Path, entries: Mapping[str, Any], hints: Mapping[str, Any], prefix: str = "") -> None:
    """Raise SaetrainError unless each entry is missing, null or of the type in ``hints``; items are not checked."""
    for key, hint in hints.items():
        is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        options = typing.get_args(hint) if is_union else (hint,)
        allowed = [JSON_TYPES.get(each) or JSON_TYPES.get(typing.get_origin(each)) for each in options]
        checks = [each for each in allowed if each is not None]
        value = entries.get(key)
        if value is not None and not any(is_allowed(value) for _, is_allowed in checks):
            expected = " or ".join(dict.fromkeys(text for text, _ in checks))
            raise SaetrainError(f"{path}: {prefix}{key} must be {expected}, found {value!r}")


def require_entry(path: Path, entries: Mapping[str, Any], key: str, hint: Any) -> Any:
    """Return the entry ``key``; raise SaetrainError if it is missing, null or of another type than ``hint``."""
    require_types(path, entries, {key: hint})
    if entries.get(key) is None:
        raise SaetrainError(f"{path}: has no key '{key}'")
    return entries[key]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file; raise SaetrainError if it is missing or damaged, or without ``W_dec`` (F, D)."""
    try:
        weights: dict[str, Tensor] = load_file(path)
    except FileNotFoundError as error:
        raise SaetrainError(f"{path}: is missing") from error
    except SafetensorError as error:
        raise SaetrainError(f"{path}: is damaged or truncated: {error}") from error
    found = tuple(weights["W_dec"].shape) if "W_dec" in weights else "nothing"
    if len(found) != 2:
        raise SaetrainError(f"{path}: W_dec must have shape (F, D), found {found}")
    return weights


def restore_coder(
    folder: Path,
    weights_file: str,
    cls: type[SparseCoder],
    entries: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    sizes: tuple[int, int, int],
) -> SparseCoder:
    """Return a coder of class ``cls`` with the settings in ``entries`` and the parameters and buffers in ``weights``.

    ``sizes``: width of the inputs, width of the outputs, number of latents. Raises SaetrainError if a setting is
    missing or not allowed, or if names, shapes or kinds of the weights are not those of the class.
    """
    config_path, weights_path = folder / SAE_CONFIG_FILE, folder / weights_file
    hints, (d_in, d_out, num_latents) = typing.get_type_hints(cls.Settings), sizes
    saved = {name: require_entry(config_path, entries, name, hints[name]) for name in cls.saved_settings}
    saved = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    try:
        # An architecture that does not save k uses it only in training.
        settings = cls.Settings(**{"k": 1, **saved, "num_latents": num_latents})
        is_sae = entries.get("is_sae", d_in == d_out)
        coder = cls.build(settings, d_in, None if is_sae else d_out)
    except SaetrainError as error:
        raise SaetrainError(f"{config_path}: {str(error).removeprefix('--')}") from error
    for name, value in coder.state_dict().items():
        if name in weights and weights[name].is_floating_point() != value.is_floating_point():
            raise SaetrainError(f"{weights_path}: {name} must have dtype {value.dtype}, found {weights[name].dtype}")
    try:
        coder.load_state_dict(weights)
    except RuntimeError as error:  # one line per wrong tensor, after a heading
        problems = "; ".join(line.strip() for line in str(error).splitlines()[1:])
        raise SaetrainError(f"{weights_path}: its tensors are not those of {cls.__name__}: {problems}") from error
    return coder.requires_grad_(False)


def describe_misfit(coder: SparseCoder, cls: type[SparseCoder], tensors: Collection[str]) -> str | None:
    """Return why a format for coders of class ``cls`` with these parameters cannot hold a coder, or None if it can."""
    if type(coder) is not cls:
        return f"saetrain writes only {cls.__name__} in this format"
    unknown = sorted(coder.state_dict().keys() - set(tensors))
    if unknown:
        return f"it has no tensor {', '.join(unknown)}"
    d_out = coder.W_dec.shape[1]
    return None if d_out == coder.d_in else f"it has one width, but the coder maps width {coder.d_in} to {d_out}"
