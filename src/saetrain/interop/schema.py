"""Reading of an SAE's files: JSON entries with their types, tensors with their shapes, and coders built from both."""

from __future__ import annotations

import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saetrain.coders import SparseCoder, architecture_name
from saetrain.coders.matryoshka import Matryoshka
from saetrain.errors import SaetrainError
from saetrain.settings import Size
from saetrain.small_files import read_json_object
from saetrain.typed_values import require_type

SAE_CONFIG_FILE = "cfg.json"


def read_sae_config(folder: Path) -> dict[str, Any]:
    """Return the contents of ``cfg.json`` in ``folder``; raise SaetrainError if it is missing or invalid."""
    path = folder / SAE_CONFIG_FILE
    if not path.exists():
        raise SaetrainError(f"{folder}: contains no {SAE_CONFIG_FILE}")
    config = read_json_object(path)
    require_types(path, config, {"d_in": Size, "d_sae": Size, "metadata": dict, "saetrain": dict})
    return config


def require_types(path: Path, entries: Mapping[str, Any], hints: Mapping[str, Any], prefix: str = "") -> None:
    """Raise SaetrainError unless each entry is missing, null or of the type in ``hints``."""
    for key, hint in hints.items():
        if entries.get(key) is not None:
            require_type(entries[key], hint, f"{path}: {prefix}{key}")


def require_entry(path: Path, entries: Mapping[str, Any], key: str, hint: Any) -> Any:
    """Return the entry ``key``; raise SaetrainError if it is missing, null or of another type than ``hint``."""
    require_types(path, entries, {key: hint})
    if entries.get(key) is None:
        raise SaetrainError(f"{path}: has no key '{key}'")
    return entries[key]


def read_flag(path: Path, entries: Mapping[str, Any], key: str, *, default: bool) -> bool:
    """Return the entry ``key``, or ``default`` if it is missing or null; SaetrainError if it is no boolean."""
    require_types(path, entries, {key: bool})
    found = entries.get(key)
    return default if found is None else bool(found)


def require_file(path: Path) -> None:
    """Raise SaetrainError unless ``path`` is a file."""
    if not path.is_file():
        raise SaetrainError(f"{path}: is {'not a file' if path.exists() else 'missing'}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises SaetrainError if it is missing or damaged, or if a value is not finite.
    """
    require_file(path)
    try:
        weights: dict[str, Tensor] = load_file(path)
    except OSError as error:
        raise SaetrainError(f"{path}: can't be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise SaetrainError(f"{path}: is damaged or truncated: {error}") from error
    return require_finite(path, weights)


def require_finite(path: Path, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file; raise SaetrainError if a value is not finite."""
    for name, value in weights.items():
        n_wrong = int((~value.float().isfinite()).sum())
        if n_wrong:
            raise SaetrainError(
                f"{path}: {name} contains {n_wrong:,} values that are NaN or infinite, so the SAE can't be used; train "
                "it again, with a lower --lr if its loss diverged"
            )
    return weights


def measure_decoder(path: Path, weights: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return (F, D), the shape of ``W_dec``; raise SaetrainError if there is none."""
    shape = tuple(weights["W_dec"].shape) if "W_dec" in weights else ()
    if len(shape) != 2 or 0 in shape:
        raise SaetrainError(f"{path}: W_dec must have shape (F, D), found {shape or 'nothing'}")
    return shape[0], shape[1]


def restore_sae(
    cls: type[SparseCoder],
    entries: Mapping[str, Any],
    weights: dict[str, Tensor],
    *,
    config_path: Path,
    weights_path: Path,
    subtracts_b_dec: bool = True,
) -> SparseCoder:
    """Return an SAE of another library as a coder of class ``cls``, whose sizes are those of ``W_dec``.

    ``weights`` have our names. ``subtracts_b_dec``: the encoder subtracts ``b_dec`` from its input; if not, the biases
    are changed so that ours may. Raises SaetrainError as :func:`restore_coder` does.
    """
    num_latents, width = measure_decoder(weights_path, weights)
    if "threshold" in weights and weights["threshold"].is_floating_point():
        # The other libraries take the ReLU of what is above a threshold, so a negative one is the same as 0.
        weights = {**weights, "threshold": weights["threshold"].clamp(min=0)}
    sizes = (width, width, num_latents)
    coder = restore_coder(cls, entries, weights, sizes, config_path=config_path, weights_path=weights_path)
    if not subtracts_b_dec:
        coder.shift_pre_activations_(coder.b_dec @ coder.W_enc)
    return coder


def set_prefixes(path: Path, coder: Matryoshka, sizes: Sequence[int]) -> None:
    """Set the numbers of latents of the prefixes; raise SaetrainError unless they increase up to all latents."""
    if sorted(set(sizes)) != list(sizes) or not sizes or sizes[0] < 1 or sizes[-1] != coder.num_latents:
        raise SaetrainError(f"{path}: the prefixes {list(sizes)} must increase up to {coder.num_latents} latents")
    coder.prefix_sizes = tuple(sizes)


def restore_coder(
    cls: type[SparseCoder],
    entries: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    sizes: tuple[int, int, int],
    *,
    config_path: Path,
    weights_path: Path,
) -> SparseCoder:
    """Return a coder of class ``cls`` with the settings in ``entries`` and the parameters and buffers in ``weights``.

    ``sizes``: width of the inputs, width of the outputs, number of latents. Raises SaetrainError if a setting is
    missing or not allowed, or if names, shapes or kinds of the weights are not those of the class.
    """
    hints, (d_in, d_out, num_latents) = typing.get_type_hints(cls.Settings), sizes
    found = measure_decoder(weights_path, weights)
    if found != (num_latents, d_out):
        raise SaetrainError(f"{weights_path}: W_dec has shape {found}, but {config_path} gives {num_latents, d_out}")
    unknown = {name for name in cls.recorded_settings if entries.get(name) is None}
    names = (*cls.saved_settings, *(name for name in cls.recorded_settings if name not in unknown))
    saved = {name: require_entry(config_path, entries, name, hints[name]) for name in names}
    saved = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    is_sae = read_flag(config_path, entries, "is_sae", default=d_in == d_out)
    try:
        # An architecture that does not save k uses it only in training.
        settings = cls.Settings(**{"k": 1, **saved, "num_latents": num_latents})
        # The sizes in the file are not trusted, so no memory is allocated before the weights have them.
        with torch.device("meta"):
            expected = cls.build(settings, d_in, None if is_sae else d_out)
    except SaetrainError as error:
        raise SaetrainError(f"{config_path}: {str(error).removeprefix('--')}") from error
    _require_tensors(weights_path, expected, weights)
    coder = cls.build(settings, d_in, None if is_sae else d_out)
    coder.load_state_dict(weights, strict=False)
    for name in unknown:
        setattr(coder, name, None)
    return coder.requires_grad_(False)


def _require_tensors(path: Path, coder: SparseCoder, weights: Mapping[str, Tensor]) -> None:
    """Raise SaetrainError unless names, shapes and kinds of the weights are those of ``coder``, which has no memory."""
    expected = coder.state_dict()
    for name, value in expected.items():
        if name in weights and weights[name].is_floating_point() != value.is_floating_point():
            raise SaetrainError(f"{path}: {name} must have dtype {value.dtype}, found {weights[name].dtype}")
    optional = {name: value for name, value in expected.items() if name in coder.training_buffers}
    try:
        coder.load_state_dict(optional | dict(weights), assign=True)
    except RuntimeError as error:  # one line per wrong tensor, after a heading
        problems = "; ".join(line.strip() for line in str(error).splitlines()[1:])
        raise SaetrainError(f"{path}: its tensors are not those of {type(coder).__name__}: {problems}") from error


def describe_misfit(coder: SparseCoder, classes: Collection[type[SparseCoder]], tensors: Iterable[str]) -> str | None:
    """Return why a format for SAEs of ``classes`` with these parameters cannot hold a coder, or None if it can."""
    if type(coder) not in classes:
        return f"saetrain writes only {', '.join(map(architecture_name, classes))} in this format"
    unknown = sorted(coder.state_dict().keys() - coder.training_buffers - set(tensors))
    if unknown:
        return f"it has no tensor {', '.join(unknown)}"
    d_out = coder.W_dec.shape[1]
    if d_out != coder.d_in:
        return f"it has one width, but the coder maps width {coder.d_in} to {d_out}"
    return None if coder.is_sae else "the coder reconstructs other activations than it reads"
