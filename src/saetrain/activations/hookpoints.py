"""Hookpoints: the modules whose outputs are captured, given as layer numbers or as patterns over module names."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Annotated

from torch import nn

from saetrain.activations.model import BaseModel
from saetrain.errors import SaetrainError, did_you_mean
from saetrain.types import shown_default


@dataclass(frozen=True, kw_only=True)
class HookpointSettings:
    """Hookpoints: the activations to train on."""

    layers: Annotated[tuple[int, ...] | None, shown_default("0", "INT [INT ...]")] = None
    """Layers, counted from 0. The SAE is trained on the residual stream after each layer."""
    layer_stride: Annotated[int | None, shown_default("none, use --layers", "INT")] = None
    """Train on every n-th layer, starting at layer 0."""
    hookpoints: Annotated[tuple[str, ...] | None, shown_default("none, use --layers", "PATTERN [PATTERN ...]")] = None
    """Patterns of module names, such as `h.*.mlp`. The SAE is trained on the output of each matching module."""

    def __post_init__(self) -> None:
        if self.hookpoints is not None and (self.layers is not None or self.layer_stride is not None):
            raise SaetrainError("--layers (or --layer_stride) and --hookpoints can't be given together: choose one")
        if self.layers is not None and self.layer_stride is not None:
            raise SaetrainError("--layers and --layer_stride can't be given together: choose one")
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            raise SaetrainError(f"--layers {list(self.layers)}: pass one or more numbers from 0")
        if self.layers is not None and len(set(self.layers)) != len(self.layers):
            raise SaetrainError(f"--layers {list(self.layers)}: a layer is named twice")
        if self.layer_stride is not None and self.layer_stride < 1:
            raise SaetrainError(f"--layer_stride {self.layer_stride}: must be at least 1")
        if self.hookpoints is not None and not self.hookpoints:
            raise SaetrainError("--hookpoints: pass one or more patterns")


def resolve_hookpoints(model: BaseModel, settings: HookpointSettings) -> list[str]:
    """Return the module names of the hookpoints, in the model's order.

    Raises SaetrainError for a layer that does not exist or a pattern without a match.
    """
    if settings.hookpoints is not None:
        return _match_modules(model.module, settings.hookpoints)
    name, blocks = find_blocks(model)
    if settings.layer_stride is not None:
        layers: tuple[int, ...] = tuple(range(0, len(blocks), settings.layer_stride))
    else:
        layers = settings.layers if settings.layers is not None else (0,)
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
    depth = getattr(model.config, "num_hidden_layers", None)
    found = [
        (name, module)
        for name, module in model.module.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    if not found:
        raise SaetrainError(
            f"model {model.name}: its layers were not found ({model.config.model_type}); name modules with --hookpoints"
        )
    return min(found, key=lambda item: item[0].count("."))


def _match_modules(module: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    names = [name for name, _ in module.named_modules() if name]
    chosen: set[str] = set()
    for pattern in patterns:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise SaetrainError(
                f"--hookpoints {pattern}: matches no module of the model.{did_you_mean(pattern, names)} "
                f"Module names look like {', '.join(names[:3])}, …, {names[-1]}"
            )
        chosen.update(matched)
    return [name for name in names if name in chosen]
