"""CUDA graphs: the launches of a function recorded once, and from then on sent off as one."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
WARMUP_CALLS = 3
"""Calls before the recording, in which kernels are compiled and libraries allocate what they keep."""


@cache
def _shared_graph_pool() -> Any:
    """What all recordings work in: they are replayed one after the other, in the order in which they were recorded."""
    return torch.cuda.graph_pool_handle()


class GraphedCallable(Generic[Result]):
    """One function of tensors whose shapes never change, and that asks the device for nothing.

    Each call gives the same tensors as the one before, with new content, which lasts until a recording that was made
    before this one is replayed.
    """

    def __init__(self) -> None:
        self._n_calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._static_inputs: list[Tensor] = []
        self._static_result: Result | None = None

    def accepts_shape(self, first: Tensor) -> bool:
        """Whether the first input has the shape that was recorded, if one was."""
        return not self._static_inputs or self._static_inputs[0].shape == first.shape

    def __call__(self, function: Callable[..., Result], *inputs: Tensor) -> Result:
        """Run ``function``, the same each time; it is not kept, for it may keep whoever calls."""
        self._n_calls += 1
        if self._n_calls <= WARMUP_CALLS:
            return function(*inputs)
        if self._graph is None:
            self._capture_graph(function, inputs)
        for static, given in zip(self._static_inputs, inputs, strict=True):
            static.copy_(given)
        assert self._graph is not None
        assert self._static_result is not None
        self._graph.replay()
        return self._static_result

    def _capture_graph(self, function: Callable[..., Result], inputs: tuple[Tensor, ...]) -> None:
        graph, static_inputs = torch.cuda.CUDAGraph(), [value.clone() for value in inputs]
        with torch.cuda.graph(graph, pool=_shared_graph_pool()):
            self._static_result = function(*static_inputs)
        self._graph, self._static_inputs = graph, static_inputs
