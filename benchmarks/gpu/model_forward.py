"""A model's forward pass up to a hook, where it stops, as in a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Work
from benchmarks.inputs import BATCHES, build_transformer, hookpoint_name, make_token_ids


class _HookReached(Exception):
    """Carries the activations out of the forward pass."""

    def __init__(self, activations: Tensor) -> None:
        self.activations = activations


class ModelForward:
    """Token ids -> activations (N, D) of the hook's block."""

    def __init__(self, work: Work) -> None:
        self._module = build_transformer(work).cuda()
        self._ids = make_token_ids(work, BATCHES * work.tokens // work.ctx_len).cuda().chunk(BATCHES)
        self._number = 0
        self._module.get_submodule(hookpoint_name(work, work.layers[0])).register_forward_hook(self._stop_forward)

    @staticmethod
    def _stop_forward(_module: Any, _inputs: Any, out: Any) -> None:
        raise _HookReached(out[0] if isinstance(out, tuple) else out)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Return the activations of the next token ids."""
        self._number += 1
        try:
            self._module(self._ids[self._number % BATCHES], use_cache=False)
        except _HookReached as ended:
            return ended.activations.flatten(0, 1)
        raise AssertionError("the hook was not reached")
