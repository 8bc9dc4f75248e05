"""Faults for tests: one step raises on rank 1 (RAISES_AT), and writing a checkpoint takes SAVES_IN seconds."""

from __future__ import annotations

import os
import time
from typing import Any

from saetrain.cli import main
from saetrain.runs.train import loop
from saetrain.training.trainer import SaeState


def install_faults() -> None:
    """Install the faults that the environment names in this process."""
    forward_backward, save_checkpoint = SaeState.forward_backward, loop.save_checkpoint

    def raise_at_step(self: SaeState, batch: Any, progress: Any) -> None:
        if os.environ["RANK"] == "1" and progress.step == int(os.environ.get("RAISES_AT", "-1")):
            raise ValueError("made to fail")
        forward_backward(self, batch, progress)

    def save_slowly(*arguments: Any) -> Any:
        time.sleep(float(os.environ.get("SAVES_IN", "0")))
        return save_checkpoint(*arguments)

    SaeState.forward_backward = raise_at_step  # type: ignore[method-assign]
    loop.save_checkpoint = save_slowly


if __name__ == "__main__":
    install_faults()
    main()
