"""What is sent to the device and back is what it was."""

from __future__ import annotations

import numpy as np
import torch

from saetrain.transfer import Arriving, send
from tests.unit.kernels.conftest import DEVICE


def test_there_and_back() -> None:
    numbers = np.arange(12, dtype=np.int64).reshape(3, 4)
    there = send(numbers, torch.device(DEVICE))
    assert there.device.type == DEVICE
    back = Arriving(there.T)
    assert back.get().device.type == "cpu"
    assert back.get().tolist() == numbers.T.tolist()
