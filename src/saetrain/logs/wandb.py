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

from saetrain.atomic_io import write_json
from saetrain.errors import SaetrainError
from saetrain.logs.base import FINAL_KINDS, MetricsRecord, RunInfo, Sink
from saetrain.logs.console import log_rank0

START_FAILED = "--log_to_wandb true: Weights & Biases could not start a run"
LOGIN_HINT = "(log in by `wandb login` or WANDB_API_KEY, or set WANDB_MODE=offline)"
INIT_TIMEOUT_S = 30
"""Seconds to wait for the server at the start."""
MAX_ATTEMPTS = 3
"""Starts of W&B's own process."""
SERVICE_PROCESS = "wandb-core"
"""The name of that process."""
LOGGED_STEPS_FILE = "wandb/logged.json"
"""Which W&B run this is, and the last step of each kind of record that was handed to it."""


class WandBSink(Sink):
    """One W&B run, whose id survives a resume."""

    def __init__(self, info: RunInfo, every_n_steps: int, project: str) -> None:
        super().__init__(every_n_steps, info.total_steps)
        wandb = _import_wandb()
        self._run = _start_run(
            MAX_ATTEMPTS,
            project=project,
            name=info.name,
            id=info.sink_state.get("wandb_id"),
            resume="allow",
            dir=str(info.run_dir),
            config=dict(info.settings),
            settings=wandb.Settings(init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", INIT_TIMEOUT_S))),
        )
        self._is_dead = False
        self._run.define_metric("*", step_metric="step")
        # An offline run can't be rewound, and a resumed one computes the same figures again.
        self._logged_steps_path = info.run_dir / LOGGED_STEPS_FILE
        self._logged_steps_path.parent.mkdir(exist_ok=True)
        self._logged_steps = _read_logged_steps(self._logged_steps_path, str(self._run.id))

    @staticmethod
    def require_installed() -> None:
        """SaetrainError when the package is missing, or a key where the server will ask for one."""
        if importlib.util.find_spec("wandb") is None:
            raise SaetrainError(
                "--log_to_wandb true: the package wandb is not installed; pip install 'saetrain[wandb]'"
            )
        wandb = _import_wandb()
        if wandb.setup().settings.mode in ("offline", "disabled", "dryrun"):
            return
        try:
            wandb.login()
        except wandb.errors.Error as error:
            _kill_service()
            raise SaetrainError(f"{START_FAILED}: {_first_line(error)} {LOGIN_HINT}") from error

    def write(self, record: MetricsRecord) -> None:
        """Log the record, unless an earlier start did; final figures go to the run's summary as well."""
        if self._is_dead:
            return
        if record.step > self._logged_steps.get(record.kind, 0):
            # Marked first: a kill in between leaves a point out, where it would else be there twice.
            self._logged_steps[record.kind] = record.step
            write_json(self._logged_steps_path, {"id": str(self._run.id), "logged": self._logged_steps})
            self._call_wandb(lambda: self._run.log({"step": record.step, **record.to_flat_dict()}))
        if record.kind in FINAL_KINDS:
            self._call_wandb(lambda: self._write_summary(record))

    def _write_summary(self, record: MetricsRecord) -> None:
        """Put the figures into the run's summary, and read them back: no file of an offline run shows them."""
        metrics = {name: value for name, value in record.to_flat_dict().items() if math.isfinite(value)}
        self._run.summary.update(metrics)
        missing = [name for name, value in metrics.items() if self._run.summary.get(name) != value]
        if missing:
            log_rank0(
                f"the summary of the Weights & Biases run lacks {len(missing)} of its figures, such as {missing[0]}"
            )
        elif record.kind == FINAL_KINDS[-1]:
            log_rank0(f"the summary of the Weights & Biases run holds {len(metrics)} figures of the assessment")

    def _call_wandb(self, call: Callable[[], object]) -> None:
        """Training goes on where W&B's own process has gone; it is said once."""
        if self._is_dead:
            return
        try:
            call()
        except Exception as error:  # of its service process it raises types of many kinds
            self._is_dead = True
            log_rank0(
                f"Weights & Biases has stopped answering ({_first_line(error)}); the figures go on to metrics.jsonl"
            )

    def state_dict(self) -> dict[str, str]:
        """The run's id."""
        return {"wandb_id": str(self._run.id)}

    def close(self, failed: bool) -> None:
        """Finish the run."""
        self._call_wandb(lambda: self._run.finish(exit_code=1 if failed else 0))


def _import_wandb() -> Any:
    """The package, which will start a service process of its own."""
    import wandb

    # In the service of a parent process (a notebook's) a run that was killed stays open and can't be resumed.
    os.environ.pop("WANDB_SERVICE", None)
    return wandb


def _start_run(attempts: int, **options: Any) -> Any:
    """The W&B run; its service process, which a busy machine may starve, is started anew a few times."""
    wandb = _import_wandb()
    try:
        return wandb.init(**options)
    except Exception as error:  # of its service process it raises types of many kinds
        _kill_service()
        if attempts == 1 or isinstance(error, wandb.errors.Error):
            raise SaetrainError(f"{START_FAILED}: {_first_line(error)} {LOGIN_HINT}") from error
    time.sleep(1)
    return _start_run(attempts - 1, **options)


def _kill_service() -> None:
    """Kill W&B's own process, which holds nothing yet: the end of this one would wait for it, and it can be stuck.

    Where the caller of saetrain as a library has a run of its own in there, it is left alone.
    """
    wandb = _import_wandb()
    if wandb.run is not None:
        return
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if SERVICE_PROCESS in child.name():
                child.kill()
    # Torn down here, where a broken connection may be ignored, and not at the end, where its traceback is printed.
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _read_logged_steps(path: Path, run_id: str) -> dict[str, int]:
    """{kind of record: its last step} that the W&B run ``run_id`` was given; empty for a new one."""
    try:
        stored: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"id": None}
        return dict(stored["logged"]) if stored["id"] == run_id else {}
    except (ValueError, KeyError, TypeError) as error:
        raise SaetrainError(
            f"{path} is broken; delete it, and W&B is given the steps since the checkpoint again"
        ) from error
