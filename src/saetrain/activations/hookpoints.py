"""Hookpoints: the modules whose outputs are captured, given as layer numbers or as patterns over module names."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any

from torch import nn

from saetrain.activations.model import BaseModel
from saetrain.errors import SaetrainError, did_you_mean
from saetrain.settings import Settings, Size
from saetrain.types import shown_default

LAYER_WORD = re.compile(r"\d{1,5}(-\d{1,5})?|all")
"""A word of --layers."""


@dataclass(frozen=True, kw_only=True)
class HookpointSettings(Settings):
    """Hookpoints: the activations to train on."""

    layers: Annotated[tuple[int | str, ...] | None, shown_default("0", "LAYER [LAYER ...]")] = None
    """Layers from 0: numbers, ranges such as 0-5, or all. An SAE is trained on the residual stream after each layer."""
    layer_stride: Annotated[Size | None, shown_default("none, use --layers", "INT")] = None
    """Train on every n-th layer, starting at layer 0."""
    hookpoints: Annotated[tuple[str, ...] | None, shown_default("none, use --layers", "PATTERN [PATTERN ...]")] = None
    """Patterns of module names, such as `h.*.mlp`. The SAE is trained on the output of each matching module."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hookpoints is not None and (self.layers is not None or self.layer_stride is not None):
            raise SaetrainError("--layers (or --layer_stride) and --hookpoints can't be given together: choose one")
        if self.layers is not None and self.layer_stride is not None:
            raise SaetrainError("--layers and --layer_stride can't be given together: choose one")
        if self.layers is not None:
            _check_layers(tuple(map(str, self.layers)))
        if self.hookpoints is not None and not self.hookpoints:
            raise SaetrainError("--hookpoints: pass one or more patterns")


def _check_layers(words: tuple[str, ...]) -> None:
    """Raise SaetrainError unless each word is a layer, an ascending range of layers or `all`, and none repeats."""
    shown = f"--layers {' '.join(words)}".strip()
    if not words or not all(LAYER_WORD.fullmatch(word) for word in words):
        raise SaetrainError(f"{shown}: pass one or more numbers from 0, ranges such as 0-5, or all")
    numbers = [layer for word in words if word != "all" for layer in _expand_range(word)]
    if len(numbers) < len(words) - ("all" in words):
        raise SaetrainError(f"{shown}: give the smaller number of a range first")
    if len(set(numbers)) != len(numbers) or ("all" in words and len(words) > 1):
        raise SaetrainError(f"{shown}: a layer is named twice")


def _expand_range(word: str) -> range:
    """Return the layers of a word such as ``3`` or ``0-5``."""
    first, _, last = word.partition("-")
    return range(int(first), int(last or first) + 1)


def resolve_hookpoints(model: BaseModel, settings: HookpointSettings) -> list[str]:
    """Return the module names of the hookpoints, in the model's order.

    Raises SaetrainError for a layer that does not exist or a pattern without a match.
    """
    if settings.hookpoints is not None:
        return _match_modules(model, settings.hookpoints)
    name, blocks = find_blocks(model)
    if settings.layer_stride is not None:
        layers = list(range(0, len(blocks), settings.layer_stride))
    elif settings.layers is not None and "all" in settings.layers:
        layers = list(range(len(blocks)))
    else:
        layers = [layer for word in settings.layers or (0,) for layer in _expand_range(str(word))]
    missing = [layer for layer in layers if layer >= len(blocks)]
    if missing:
        raise SaetrainError(
            f"--layers {' '.join(map(str, missing))}: {model.name} has {len(blocks)} layers, 0 to {len(blocks) - 1}"
        )
    return [f"{name}.{layer}" for layer in sorted(layers)]


def find_blocks(model: BaseModel) -> tuple[str, nn.ModuleList]:
    """Return (name, module list) of the model's layers: the outermost list of `num_hidden_layers` modules.

    Raises SaetrainError if there is no such list.
    """
    found = _find_layer_list(model.module, model.config)
    if found is None:
        raise SaetrainError(
            f"model {model.name}: its layers were not found ({model.config.model_type}); name modules with --hookpoints"
        )
    return found


def _find_layer_list(model: nn.Module, config: Any) -> tuple[str, nn.ModuleList] | None:
    depth = getattr(config, "num_hidden_layers", None)
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    return min(found, key=lambda item: item[0].count("."), default=None)


def translate_hook_name(name: str, model: nn.Module) -> str | None:
    """Return the module that ``name`` refers to: itself, a residual stream of TransformerLens, or a sparsify layer.

    The result is None for other names, and for layers that the model, a transformer without its head, does not have.
    """
    if name and name in dict(model.named_modules()):
        return name
    found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(post|pre)|layers\.(\d+)", name)
    layers = _find_layer_list(model, getattr(model, "config", None))
    if found is None or layers is None:
        return None
    layer = int(found[1] or found[3]) - (found[2] == "pre")
    return f"{layers[0]}.{layer}" if 0 <= layer < len(layers[1]) else None


def resolve_module_name(name: str, modules: Collection[str]) -> str | None:
    """Return the module of ``modules`` that the `hf_hook_name` ``name`` of SAELens refers to, or None.

    ``modules`` are names in a model without its head. ``name`` is one of them, or becomes one without the suffix
    `.output` and without the first component, which may name the headless model: `model.layers.3.output`.
    """
    base_name = name.removesuffix(".output")
    return next(
        (candidate for candidate in (name, base_name.partition(".")[2], base_name) if candidate in modules), None
    )


def _match_modules(model: BaseModel, patterns: tuple[str, ...]) -> list[str]:
    names = [name for name, _ in model.module.named_modules() if name]
    chosen: set[str] = set()
    for pattern in patterns:
        matched = fnmatch.filter(names, translate_hook_name(pattern, model.module) or pattern)
        if not matched:
            raise SaetrainError(
                f"--hookpoints {pattern}: matches no module of the model.{did_you_mean(pattern, names)} "
                f"Module names look like {', '.join(names[:3])}, …, {names[-1]}"
            )
        chosen.update(matched)
    return [name for name in names if name in chosen]
