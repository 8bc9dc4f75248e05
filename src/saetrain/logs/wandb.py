"""Weights & Biases, online or offline; imported only when asked for."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from saetrain.errors import SaetrainError
from saetrain.files import write_json
from saetrain.logs.base import LAST, Record, RunInfo, Sink
from saetrain.logs.console import say

REFUSED = "--log_to_wandb true: Weights & Biases could not start a run"
WAY_OUT = "(log in by `wandb login` or WANDB_API_KEY, or set WANDB_MODE=offline)"
TIMEOUT_S = 30
"""Seconds to wait for the server at the start."""
TRIES = 3
"""Starts of W&B's own process."""
SERVICE = "wandb-core"
"""The name of that process."""
MARKS = "wandb/logged.json"
"""Which W&B run this is, and the last step of each kind of record that was handed to it."""


class WandB(Sink):
    """One W&B run, whose id survives a resume."""

    def __init__(self, info: RunInfo, every: int, project: str) -> None:
        super().__init__(every, info.steps)
        wandb = _wandb()
        self._run = _started(
            TRIES,
            project=project,
            name=info.name,
            id=info.state.get("wandb_id"),
            resume="allow",
            dir=str(info.directory),
            config=dict(info.settings),
            settings=wandb.Settings(init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", TIMEOUT_S))),
        )
        self._gone = False
        self._run.define_metric("*", step_metric="step")
        # An offline run can't be rewound, and a resumed one computes the same figures again.
        self._path = info.directory / MARKS
        self._path.parent.mkdir(exist_ok=True)
        self._logged = _marks(self._path, str(self._run.id))

    @staticmethod
    def require() -> None:
        """SaetrainError when the package is missing, or a key where the server will ask for one."""
        if importlib.util.find_spec("wandb") is None:
            raise SaetrainError(
                "--log_to_wandb true: the package wandb is not installed; pip install 'saetrain[wandb]'"
            )
        wandb = _wandb()
        if wandb.setup().settings.mode in ("offline", "disabled", "dryrun"):
            return
        try:
            wandb.login()
        except wandb.errors.Error as error:
            _end_service()
            raise SaetrainError(f"{REFUSED}: {_first_line(error)} {WAY_OUT}") from error

    def write(self, record: Record) -> None:
        """Log the record, unless an earlier start did; final figures go to the run's summary as well."""
        if self._gone:
            return
        if record.step > self._logged.get(record.kind, 0):
            # Marked first: a kill in between leaves a point out, where it would else be there twice.
            self._logged[record.kind] = record.step
            write_json(self._path, {"id": str(self._run.id), "logged": self._logged})
            self._hand_over(lambda: self._run.log({"step": record.step, **record.flat()}))
        if record.kind in LAST:
            self._hand_over(lambda: self._summarise(record))

    def _summarise(self, record: Record) -> None:
        """Put the figures into the run's summary, and read them back: no file of an offline run shows them."""
        figures = {name: value for name, value in record.flat().items() if math.isfinite(value)}
        self._run.summary.update(figures)
        lacking = [name for name, value in figures.items() if self._run.summary.get(name) != value]
        if lacking:
            say(f"the summary of the Weights & Biases run lacks {len(lacking)} of its figures, such as {lacking[0]}")
        elif record.kind == LAST[-1]:
            say(f"the summary of the Weights & Biases run holds {len(figures)} figures of the assessment")

    def _hand_over(self, call: Callable[[], object]) -> None:
        """Training goes on where W&B's own process has gone; it is said once."""
        if self._gone:
            return
        try:
            call()
        except Exception as error:  # of its service process it raises types of many kinds
            self._gone = True
            say(f"Weights & Biases has stopped answering ({_first_line(error)}); the figures go on to metrics.jsonl")

    def state(self) -> dict[str, str]:
        """The run's id."""
        return {"wandb_id": str(self._run.id)}

    def close(self, failed: bool) -> None:
        """Finish the run."""
        self._hand_over(lambda: self._run.finish(exit_code=1 if failed else 0))


def _wandb() -> Any:
    """The package, which will start a service process of its own."""
    import wandb

    # In the service of a parent process (a notebook's) a run that was killed stays open and can't be resumed.
    os.environ.pop("WANDB_SERVICE", None)
    return wandb


def _started(tries: int, **options: Any) -> Any:
    """The W&B run; its service process, which a busy machine may starve, is started anew a few times."""
    wandb = _wandb()
    try:
        return wandb.init(**options)
    except Exception as error:  # of its service process it raises types of many kinds
        _end_service()
        if tries == 1 or isinstance(error, wandb.errors.Error):
            raise SaetrainError(f"{REFUSED}: {_first_line(error)} {WAY_OUT}") from error
    time.sleep(1)
    return _started(tries - 1, **options)


def _end_service() -> None:
    """Kill W&B's own process, which holds nothing yet: the end of this one would wait for it, and it can be stuck.

    Where the caller of saetrain as a library has a run of its own in there, it is left alone.
    """
    wandb = _wandb()
    if wandb.run is not None:
        return
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if SERVICE in child.name():
                child.kill()
    # Torn down here, where a broken connection may be ignored, and not at the end, where its traceback is printed.
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _marks(path: Path, run_id: str) -> dict[str, int]:
    """{kind of record: its last step} that the W&B run ``run_id`` was given; empty for a new one."""
    try:
        kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"id": None}
        return dict(kept["logged"]) if kept["id"] == run_id else {}
    except (ValueError, KeyError, TypeError) as error:
        raise SaetrainError(
            f"{path} is broken; delete it, and W&B is given the steps since the checkpoint again"
        ) from error
