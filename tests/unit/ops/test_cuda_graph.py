"""Functions run plainly first, are recorded once, and replayed with new inputs; by a stand-in for the GPU's graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from saetrain.ops import cuda_graph
from saetrain.ops.cuda_graph import WARMUP_CALLS, GraphedCallable


class Graph:
    """Calls the function again, which fills the tensors that it gave first, as replaying launches does."""

    again: Callable[[], object]

    def replay(self) -> None:
        self.again()


class Doubling:
    """A function that gives twice its input, in one tensor as soon as it is being recorded."""

    def __init__(self) -> None:
        self.calls, self.broken = 0, False
        self.out: Tensor | None = None
        self.recording: Graph | None = None

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.recording is None:
            return 2 * x
        if self.broken:
            raise RuntimeError("not to be recorded")
        out = torch.full_like(x, torch.nan)
        self.recording.again = lambda: torch.mul(x, 2, out=out)
        return out


@pytest.fixture
def doubling(monkeypatch: pytest.MonkeyPatch) -> Doubling:
    function = Doubling()

    @contextlib.contextmanager
    def record(graph: Graph, **_: Any) -> Iterator[None]:
        function.recording = graph
        try:
            yield
        finally:
            function.recording = None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(cuda_graph, "_shared_graph_pool", lambda: None)
    return function


def test_every_call_gives_what_the_function_would(doubling: Doubling) -> None:
    recorded: GraphedCallable[Tensor] = GraphedCallable()
    found = []
    for number in range(WARMUP_CALLS + 4):
        x = torch.tensor([float(number), 1.0])
        found.append(recorded(doubling, x))
        assert found[-1].tolist() == [2.0 * number, 2.0]
    assert doubling.calls == WARMUP_CALLS + 1
    assert len({each.data_ptr() for each in found[WARMUP_CALLS:]}) == 1


def test_another_shape_does_not_fit(doubling: Doubling) -> None:
    recorded: GraphedCallable[Tensor] = GraphedCallable()
    for _ in range(WARMUP_CALLS):
        recorded(doubling, torch.zeros(3))
        assert recorded.accepts_shape(torch.zeros(2)), "nothing is recorded yet"
    recorded(doubling, torch.zeros(3))
    assert recorded.accepts_shape(torch.zeros(3))
    assert not recorded.accepts_shape(torch.zeros(2))


def test_a_recording_that_fails_is_made_again(doubling: Doubling) -> None:
    recorded: GraphedCallable[Tensor] = GraphedCallable()
    for _ in range(WARMUP_CALLS):
        recorded(doubling, torch.zeros(1))
    doubling.broken = True
    with pytest.raises(RuntimeError, match="not to be recorded"):
        recorded(doubling, torch.zeros(1))
    doubling.broken = False
    assert recorded(doubling, torch.ones(1)).tolist() == [2.0]
