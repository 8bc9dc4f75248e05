"""Capture: one forward pass for all hookpoints, which ends after the last one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from saetrain.activations.model import BaseModel
from saetrain.async_copy import copy_to_device_async
from saetrain.errors import SaetrainError
from saetrain.types import INPUT_SUFFIX, TokenSequence

PROBE_TOKENS = 8
ADVICE = "choose another module (* in a pattern also matches modules inside a layer; --layers all selects all layers)"
"""What to do about a hookpoint that cannot be captured."""


class _StopForward(Exception):
    """Raised in the hook of the last hookpoint to end the forward pass, because later layers are not needed."""


class ActivationCapture:
    """Captures the outputs and inputs of named modules, with hooks.

    ``hidden_states`` is not used, because in many models its last entry is the output of the final norm.

    ``widths`` {hookpoint: D}. Raises SaetrainError when what is captured is not an activation of shape (B, S, D), or
    when a module does not run exactly once in a forward pass.
    """

    def __init__(self, model: BaseModel, hookpoints: list[str]) -> None:
        self.model = model
        self.hookpoints = hookpoints
        self._modules = {name: model.module.get_submodule(name.removesuffix(INPUT_SUFFIX)) for name in hookpoints}
        self._last_hookpoint: str | None = None
        order = self._probe_hookpoints()
        self._last_hookpoint = order[-1]

    def _probe_hookpoints(self) -> list[str]:
        """Run a few tokens through the whole model, set ``widths``, and return the hookpoints in order of execution."""
        length = min(PROBE_TOKENS, self.model.max_positions or PROBE_TOKENS)
        ids = torch.ones(2, length, dtype=torch.long, device=self.model.device)
        found = self(ids, torch.ones_like(ids))
        missing = [name for name in self.hookpoints if name not in found]
        if missing:
            raise SaetrainError(
                f"--hookpoints {missing[0]}: the module does not run in the model's forward pass; {ADVICE}"
            )
        for name, value in found.items():
            if value.dim() != 3 or value.shape[:2] != ids.shape or not value.is_floating_point():
                raise SaetrainError(
                    f"--hookpoints {name}: its output has shape {tuple(value.shape)}, but activations must have shape "
                    f"(batch 2, positions {length}, width); {ADVICE}"
                )
        self.widths = {name: found[name].shape[-1] for name in self.hookpoints}
        return list(found)

    @torch.no_grad()
    def __call__(self, ids_BS: Tensor, mask_BS: Tensor) -> dict[str, Tensor]:
        """Return {hookpoint: (B, S, D) in the model's dtype} for token ids and attention mask, both (B, S)."""
        found: dict[str, Tensor] = {}
        handles = [
            register_recorder(module, name, partial(self._record_activation, name, found))
            for name, module in self._modules.items()
        ]
        try:
            self.model.module(input_ids=ids_BS, attention_mask=mask_BS, **self.model.forward_kwargs())
        except _StopForward:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _record_activation(self, name: str, found: dict[str, Tensor], captured: Any) -> None:
        if not isinstance(captured, Tensor):
            raise SaetrainError(
                f"--hookpoints {name}: its output is a {type(captured).__name__}, not an activation; choose another "
                "module"
            )
        if name in found:
            raise SaetrainError(f"--hookpoints {name}: the module runs several times in one forward pass; {ADVICE}")
        found[name] = captured
        if name == self._last_hookpoint:
            raise _StopForward


def register_recorder(module: torch.nn.Module, hookpoint: str, record: Callable[[Any], None]) -> RemovableHandle:
    """Call ``record`` in each forward pass with the output of ``module``, or its input if ``hookpoint`` stands for it.

    Of several inputs or outputs, the first one is passed.
    """

    def record_first(values: Any) -> None:
        record(values[0] if isinstance(values, (tuple, list)) and values else values)

    if hookpoint.endswith(INPUT_SUFFIX):
        return module.register_forward_pre_hook(
            lambda module, args, kwargs: record_first(args or tuple(kwargs.values())), with_kwargs=True
        )
    return module.register_forward_hook(lambda module, args, output: record_first(output))


def pad_batch(sequences: list[TokenSequence], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (ids, mask), both (B, S) int64, padded on the right with id 0 and mask 0."""
    length = max(len(sequence) for sequence in sequences)
    ids = np.zeros((len(sequences), length), dtype=np.int64)
    mask = np.zeros((len(sequences), length), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence.ids
        mask[row, : len(sequence)] = 1
    return copy_to_device_async(ids, device), copy_to_device_async(mask, device)
