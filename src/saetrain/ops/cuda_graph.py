"""CUDA graphs: capture the kernel launches of a function once, then replay them with one launch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
WARMUP_CALLS = 3
"""Calls before the capture, in which kernels are compiled and libraries allocate their workspaces."""


@cache
def _shared_graph_pool() -> Any:
    """Return the memory pool of all graphs, which are replayed one at a time, in the order of their capture."""
    return torch.cuda.graph_pool_handle()


class GraphedCallable(Generic[Result]):
    """CUDA graph of a function whose input shapes never change and which does not synchronize with the device.

    Each call returns the same tensors with new content. The content is valid until a graph that was captured before
    this one is replayed.
    """

    def __init__(self) -> None:
        self._n_calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._static_inputs: list[Tensor] = []
        self._static_result: Result | None = None

    def accepts_shape(self, first: Tensor) -> bool:
        """Return whether ``first`` has the shape of the captured first input; True before the capture."""
        return not self._static_inputs or self._static_inputs[0].shape == first.shape

    def __call__(self, function: Callable[..., Result], *inputs: Tensor) -> Result:
        """Run ``function``, which must be the same in each call; the first WARMUP_CALLS calls run without a graph.

        The function is not stored, because it may hold a reference to the owner of this object.
        """
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
