"""Between host and device without waiting for what the device is doing."""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from torch import Tensor


def copy_to_device_async(array: np.ndarray, device: torch.device) -> Tensor:
    """The array on the device, behind the work that the device has been given so far."""
    host = torch.from_numpy(array)
    # Of memory that can be swapped out, a copy is waited for.
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


class PendingCopy:
    """A tensor on its way to the host."""

    def __init__(self, value: Tensor) -> None:
        self._host = value.to("cpu", non_blocking=True)
        self._event: torch.cuda.Event | None = None
        if value.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def get(self) -> Tensor:
        """It, waited for."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


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
