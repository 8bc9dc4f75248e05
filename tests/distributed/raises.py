"""saetrain, but one step raises on rank 1 (RAISES_AT), and checkpoints take their time (SAVES_IN seconds)."""

import os
import time

import saetrain.runs.train.loop as session
from saetrain.cli import main
from saetrain.training.trainer import SaeState

take_step, save = SaeState.forward_backward, session.save_checkpoint


def micro_step(self, batch, progress):  # type: ignore[no-untyped-def]
    if os.environ["RANK"] == "1" and progress.step == int(os.environ.get("RAISES_AT", "-1")):
        raise ValueError("made to fail")
    take_step(self, batch, progress)


def save_checkpoint(*arguments):  # type: ignore[no-untyped-def]
    time.sleep(float(os.environ.get("SAVES_IN", "0")))
    return save(*arguments)


SaeState.forward_backward = micro_step
session.save_checkpoint = save_checkpoint
main()
