"""Figures of the device that the host reads some steps later, when they have long arrived."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class Delayed:
    """A queue of small tensors; each is given ``lag`` entries after its own, or by :meth:`settle`."""

    def __init__(self, lag: int) -> None:
        self._lag = lag
        self._waiting: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def put(self, step: int, value: Tensor) -> None:
        """Send the figures of a step on their way; nothing waits."""
        host = value.to("cpu", non_blocking=True)
        event = None
        if value.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self._waiting.append((step, host, event))

    def ready(self) -> list[tuple[int, list[float]]]:
        """(step, figures) of those that are due, the oldest first."""
        return self._take(self._lag)

    def settle(self) -> list[tuple[int, list[float]]]:
        """All that are left, waited for."""
        return self._take(0)

    def _take(self, left: int) -> list[tuple[int, list[float]]]:
        found = []
        while len(self._waiting) > left:
            step, host, event = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            found.append((step, host.tolist()))
        return found
