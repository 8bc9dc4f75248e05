"""What is sent to the device and back is what it was."""

from __future__ import annotations

import numpy as np
import torch

from saetrain.async_copy import PendingCopy, copy_to_device_async
from tests.unit.ops.conftest import DEVICE


def test_there_and_back() -> None:
    numbers = np.arange(12, dtype=np.int64).reshape(3, 4)
    there = copy_to_device_async(numbers, torch.device(DEVICE))
    assert there.device.type == DEVICE
    back = PendingCopy(there.T)
    assert back.get().device.type == "cpu"
    assert back.get().tolist() == numbers.T.tolist()
