"""TensorBoard event files in the run directory; the package is imported only if the sink is enabled."""

from __future__ import annotations

import importlib.util

from saetrain.errors import SaetrainError
from saetrain.logs.base import MetricsRecord, RunInfo, Sink

OVERVIEW_METRICS = ("fvu", "l0", "dead_below_threshold", "lr")
"""Metrics of which one chart shows the curves of all SAEs."""


class TensorBoardSink(Sink):
    """Write metrics as scalars over optimizer steps."""

    def __init__(self, info: RunInfo, every_n_steps: int) -> None:
        super().__init__(every_n_steps, info.total_steps)
        self.require_installed()
        from torch.utils.tensorboard import SummaryWriter

        purge_step = 0 if info.resumed_step is None else info.resumed_step + 1
        self._writer = SummaryWriter(str(info.run_dir / "tensorboard"), purge_step=purge_step)
        # A run has dozens of scalars per SAE, so the tab "Custom scalars" collects the few that people read first.
        charts = {name: ["Multiline", [f"^train/.*/{name}$"]] for name in OVERVIEW_METRICS}
        self._writer.add_custom_scalars({"All SAEs": charts})

    @staticmethod
    def require_installed() -> None:
        """Raise SaetrainError if the package is missing."""
        if importlib.util.find_spec("tensorboard") is None:
            raise SaetrainError(
                "--log_to_tensorboard true: the package tensorboard is not installed; "
                "run pip install 'saetrain[tensorboard]'"
            )

    def write(self, record: MetricsRecord) -> None:
        """Add each metric as a scalar."""
        for name, value in record.to_flat_dict().items():
            self._writer.add_scalar(name, value, record.step)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        """Close the event file."""
        self._writer.close()
