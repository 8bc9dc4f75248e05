"""Figures of the device that the host reads some steps later, when they have long arrived."""

from __future__ import annotations

from collections import deque

from torch import Tensor

from saetrain.transfer import PendingCopy


class Delayed:
    """A queue of small tensors; each is given ``lag`` entries after its own, or by :meth:`settle`."""

    def __init__(self, lag: int) -> None:
        self._lag = lag
        self._waiting: deque[tuple[int, PendingCopy]] = deque()

    def put(self, step: int, value: Tensor) -> None:
        """Send the figures of a step on their way; nothing waits."""
        self._waiting.append((step, PendingCopy(value)))

    def ready(self) -> list[tuple[int, list[float]]]:
        """(step, figures) of those that are due, the oldest first."""
        return self._take(self._lag)

    def settle(self) -> list[tuple[int, list[float]]]:
        """All that are left, waited for."""
        return self._take(0)

    def _take(self, left: int) -> list[tuple[int, list[float]]]:
        found = []
        while len(self._waiting) > left:
            step, figures = self._waiting.popleft()
            found.append((step, figures.get().tolist()))
        return found
