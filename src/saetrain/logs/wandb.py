"""Weights & Biases, online or offline; imported only when asked for."""

from __future__ import annotations

import importlib.util
import os

from saetrain.errors import SaetrainError
from saetrain.logs.base import Record, RunInfo, Sink

REFUSED = "--log_to_wandb true: Weights & Biases could not start a run"
WAY_OUT = "(log in by `wandb login` or WANDB_API_KEY, or set WANDB_MODE=offline)"
TIMEOUT_S = 30
"""Seconds to wait for the server at the start."""


class WandB(Sink):
    """One W&B run, whose id survives a resume."""

    def __init__(self, info: RunInfo, every: int, project: str) -> None:
        super().__init__(every, info.steps)
        import wandb

        try:
            self._run = wandb.init(
                project=project,
                name=info.name,
                id=info.state.get("wandb_id"),
                resume="allow",
                dir=str(info.directory),
                config=dict(info.settings),
                settings=wandb.Settings(init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", TIMEOUT_S))),
            )
        except wandb.errors.Error as error:
            raise SaetrainError(f"{REFUSED}: {str(error).splitlines()[0]} {WAY_OUT}") from error
        self._run.define_metric("*", step_metric="step")
        # An offline run can't be rewound, and a resumed one computes the same figures again.
        self._logged = dict(info.logged) if "wandb_id" in info.state else {}

    @staticmethod
    def require() -> None:
        """SaetrainError when the package is missing, or a key where the server will ask for one."""
        if importlib.util.find_spec("wandb") is None:
            raise SaetrainError(
                "--log_to_wandb true: the package wandb is not installed; pip install 'saetrain[wandb]'"
            )
        import wandb

        if wandb.setup().settings.mode in ("offline", "disabled", "dryrun"):
            return
        try:
            wandb.login()
        except wandb.errors.Error as error:
            raise SaetrainError(f"{REFUSED}: {str(error).splitlines()[0]} {WAY_OUT}") from error

    def write(self, record: Record) -> None:
        """Log the record; final figures go to the run's summary as well."""
        if record.step <= self._logged.get(record.kind, 0):
            return
        self._run.log({"step": record.step, **record.flat()})
        if record.kind == "final":
            self._run.summary.update(record.flat())

    def state(self) -> dict[str, str]:
        """The run's id."""
        return {"wandb_id": str(self._run.id)}

    def close(self, failed: bool) -> None:
        """Finish the run."""
        self._run.finish(exit_code=1 if failed else 0)
