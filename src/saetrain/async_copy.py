"""Copies between host and device that do not wait for the device's other work."""

from __future__ import annotations

from collections import deque

import numpy as np
import torch
from torch import Tensor


def copy_to_device_async(array: np.ndarray, device: torch.device) -> Tensor:
    """Return the array on the device; the copy is queued after the work that is already queued there."""
    host = torch.from_numpy(array)
    # A copy from pageable memory would block.
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


class PendingCopy:
    """Copy of a tensor to the host that runs asynchronously."""

    def __init__(self, value: Tensor) -> None:
        self._host = value.to("cpu", non_blocking=True)
        self._event: torch.cuda.Event | None = None
        if value.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()

    def get(self) -> Tensor:
        """Block until the copy is done, then return the tensor on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


class DelayedCopy:
    """Queue of small tensors that are copied to the host.

    :meth:`pop_ready` returns an entry once ``lag`` newer ones are queued, so that it rarely blocks.
    """

    def __init__(self, lag: int) -> None:
        self._lag_steps = lag
        self._pending: deque[tuple[int, PendingCopy]] = deque()

    def put(self, step: int, value: Tensor) -> None:
        """Start to copy the values of a step, without blocking."""
        self._pending.append((step, PendingCopy(value)))

    def pop_ready(self) -> list[tuple[int, list[float]]]:
        """Return (step, values) of all but the newest ``lag`` entries, oldest first."""
        return self._pop_until(self._lag_steps)

    def pop_all(self) -> list[tuple[int, list[float]]]:
        """Block until all copies are done, and return (step, values) of the remaining entries, oldest first."""
        return self._pop_until(0)

    def _pop_until(self, n_left: int) -> list[tuple[int, list[float]]]:
        popped = []
        while len(self._pending) > n_left:
            step, pending = self._pending.popleft()
            popped.append((step, pending.get().tolist()))
        return popped
