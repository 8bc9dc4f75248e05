"""Weights & Biases, online or offline; imported only when asked for."""

from __future__ import annotations

import importlib.util

from saetrain.errors import SaetrainError
from saetrain.logs.base import Record, RunInfo, Sink


class WandB(Sink):
    """One W&B run, whose id survives a resume."""

    def __init__(self, info: RunInfo, every: int, project: str) -> None:
        super().__init__(every)
        self.require()
        import wandb

        self._run = wandb.init(
            project=project,
            name=info.name,
            id=info.state.get("wandb_id"),
            resume="allow",
            dir=str(info.directory),
            config=dict(info.settings),
        )
        self._run.define_metric("*", step_metric="step")

    @staticmethod
    def require() -> None:
        """SaetrainError when the package is missing."""
        if importlib.util.find_spec("wandb") is None:
            raise SaetrainError(
                "--log_to_wandb true: the package wandb is not installed; pip install 'saetrain[wandb]'"
            )

    def write(self, record: Record) -> None:
        """Log the record; final figures go to the run's summary as well."""
        self._run.log({"step": record.step, **record.flat()})
        if record.kind == "final":
            self._run.summary.update(record.flat())

    def state(self) -> dict[str, str]:
        """The run's id."""
        return {"wandb_id": str(self._run.id)}

    def close(self, failed: bool) -> None:
        """Finish the run."""
        self._run.finish(exit_code=1 if failed else 0)
