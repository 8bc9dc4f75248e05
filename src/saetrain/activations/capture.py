"""Capture: one forward pass for all hookpoints, which ends after the last one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saetrain.activations.model import BaseModel
from saetrain.async_copy import copy_to_device_async
from saetrain.errors import SaetrainError
from saetrain.types import TokenSequence

PROBE_TOKENS = 8


class _StopForward(Exception):
    """Raised in the hook of the last hookpoint to end the forward pass, because later layers are not needed."""


class ActivationCapture:
    """Captures the outputs of named modules, with hooks.

    ``hidden_states`` is not used, because in many models its last entry is the output of the final norm.

    ``widths`` {hookpoint: D}. Raises SaetrainError when a module's output is not an activation of shape (B, S, D), or
    when it does not run exactly once in a forward pass.
    """

    def __init__(self, model: BaseModel, hookpoints: list[str]) -> None:
        self.model = model
        self.hookpoints = hookpoints
        self._modules = {name: model.module.get_submodule(name) for name in hookpoints}
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
                f"--hookpoints {missing[0]}: the module does not run in the model's forward pass; choose another module"
            )
        for name, value in found.items():
            if value.dim() != 3 or value.shape[:2] != ids.shape or not value.is_floating_point():
                raise SaetrainError(
                    f"--hookpoints {name}: its output has shape {tuple(value.shape)}, but activations must have shape "
                    f"(batch 2, positions {length}, width); choose another module"
                )
        self.widths = {name: found[name].shape[-1] for name in self.hookpoints}
        return list(found)

    @torch.no_grad()
    def __call__(self, ids_BS: Tensor, mask_BS: Tensor) -> dict[str, Tensor]:
        """Return {hookpoint: (B, S, D) in the model's dtype} for token ids and attention mask, both (B, S)."""
        found: dict[str, Tensor] = {}
        handles = [module.register_forward_hook(self._make_hook(name, found)) for name, module in self._modules.items()]
        try:
            self.model.module(input_ids=ids_BS, attention_mask=mask_BS, **self.model.forward_kwargs())
        except _StopForward:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _make_hook(self, name: str, found: dict[str, Tensor]) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, (tuple, list)) and output else output
            if not isinstance(value, Tensor):
                raise SaetrainError(
                    f"--hookpoints {name}: its output is a {type(output).__name__}, not an activation; "
                    "choose another module"
                )
            if name in found:
                raise SaetrainError(
                    f"--hookpoints {name}: the module runs several times in one forward pass; choose another module"
                )
            found[name] = value
            if name == self._last_hookpoint:
                raise _StopForward

        return hook


def pad_batch(sequences: list[TokenSequence], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (ids, mask), both (B, S) int64, padded on the right with id 0 and mask 0."""
    length = max(len(sequence) for sequence in sequences)
    ids = np.zeros((len(sequences), length), dtype=np.int64)
    mask = np.zeros((len(sequences), length), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = sequence.ids
        mask[row, : len(sequence)] = 1
    return copy_to_device_async(ids, device), copy_to_device_async(mask, device)


def batch_by_length(sequences: list[TokenSequence], tokens: int) -> list[list[int]]:
    """Group the numbers of ``sequences`` by length, with at most ``tokens`` padded tokens or one sequence per group."""
    order = sorted(range(len(sequences)), key=lambda number: (-len(sequences[number]), number))
    batches: list[list[int]] = []
    for number in order:
        if batches and (len(batches[-1]) + 1) * len(sequences[batches[-1][0]]) <= tokens:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches
