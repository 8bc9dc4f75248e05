"""TensorBoard event files in the run directory; imported only when asked for."""

from __future__ import annotations

import importlib.util

from saetrain.errors import SaetrainError
from saetrain.logs.base import Record, RunInfo, Sink


class TensorBoard(Sink):
    """Scalars by name, over optimizer steps."""

    def __init__(self, info: RunInfo, every: int) -> None:
        super().__init__(every, info.steps)
        self.require()
        from torch.utils.tensorboard import SummaryWriter

        purge = 0 if info.resumed_step is None else info.resumed_step + 1
        self._writer = SummaryWriter(str(info.directory / "tensorboard"), purge_step=purge)

    @staticmethod
    def require() -> None:
        """SaetrainError when the package is missing."""
        if importlib.util.find_spec("tensorboard") is None:
            raise SaetrainError(
                "--log_to_tensorboard true: the package tensorboard is not installed; "
                "pip install 'saetrain[tensorboard]'"
            )

    def write(self, record: Record) -> None:
        """Add each figure as a scalar."""
        for name, value in record.flat().items():
            self._writer.add_scalar(name, value, record.step)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        """Close the file."""
        self._writer.close()
