"""A model's forward to a hook, over token ids in turn, ended there as a run ends it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Work
from benchmarks.inputs import BATCHES, hookpoint, token_ids, transformer


class _Ended(Exception):
    """Carries the activations out of the model."""

    def __init__(self, activations: Tensor) -> None:
        self.activations = activations


class Forward:
    """Token ids -> activations (N, D) of the hook's block."""

    def __init__(self, work: Work) -> None:
        self._module = transformer(work).cuda()
        self._ids = token_ids(work, BATCHES * work.tokens // work.ctx_len).cuda().chunk(BATCHES)
        self._number = 0
        self._module.get_submodule(hookpoint(work, work.layers[0])).register_forward_hook(self._end)

    @staticmethod
    def _end(_module: Any, _inputs: Any, out: Any) -> None:
        raise _Ended(out[0] if isinstance(out, tuple) else out)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Of the next ids."""
        self._number += 1
        try:
            self._module(self._ids[self._number % BATCHES], use_cache=False)
        except _Ended as ended:
            return ended.activations.flatten(0, 1)
        raise AssertionError("the hook was not reached")
