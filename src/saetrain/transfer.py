"""Between host and device without waiting for what the device is doing."""

from __future__ import annotations

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
