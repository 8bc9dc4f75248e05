"""Figures of the device that the host reads some steps later, when they have long arrived."""

from __future__ import annotations

from collections import deque

from torch import Tensor

from saetrain.transfer import PendingCopy


class DelayedCopy:
    """A queue of small tensors; each is given ``lag`` entries after its own, or by :meth:`pop_all`."""

    def __init__(self, lag: int) -> None:
        self._lag_steps = lag
        self._pending: deque[tuple[int, PendingCopy]] = deque()

    def put(self, step: int, value: Tensor) -> None:
        """Send the figures of a step on their way; nothing waits."""
        self._pending.append((step, PendingCopy(value)))

    def pop_ready(self) -> list[tuple[int, list[float]]]:
        """(step, figures) of those that are due, the oldest first."""
        return self._pop_until(self._lag_steps)

    def pop_all(self) -> list[tuple[int, list[float]]]:
        """All that are left, waited for."""
        return self._pop_until(0)

    def _pop_until(self, n_left: int) -> list[tuple[int, list[float]]]:
        popped = []
        while len(self._pending) > n_left:
            step, pending = self._pending.popleft()
            popped.append((step, pending.get().tolist()))
        return popped
