"""saetrain, but the step with the number in RAISES_AT raises on rank 1."""

import os

from saetrain.cli import main
from saetrain.training.trainer import SaeTrainer

take_step = SaeTrainer.micro_step


def micro_step(self, batch, progress):  # type: ignore[no-untyped-def]
    if os.environ["RANK"] == "1" and progress.step == int(os.environ["RAISES_AT"]):
        raise ValueError("made to fail")
    take_step(self, batch, progress)


SaeTrainer.micro_step = micro_step
main()
