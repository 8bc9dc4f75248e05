"""Weights & Biases, online or offline; the package is imported only if the sink is enabled."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from saetrain.atomic_io import write_json
from saetrain.errors import SaetrainError
from saetrain.logs.base import FINAL_KINDS, MetricsRecord, RunInfo, Sink
from saetrain.logs.console import log_rank0
from saetrain.small_files import read_json
from saetrain.untrusted import show_value

START_FAILED = "--log_to_wandb true: Weights & Biases could not start a run"
LOGIN_HINT = "(run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline)"
INIT_TIMEOUT_S = 30
"""Seconds to wait for the server at the start."""
MAX_ATTEMPTS = 3
"""Number of times that the service process of W&B is started."""
SERVICE_PROCESS = "wandb-core"
"""Name of the service process of W&B."""
LOGGED_STEPS_FILE = "wandb/logged.json"
"""File with the id of the W&B run, and the last logged step per kind of record."""


class WandBSink(Sink):
    """Log to one W&B run, which a resumed run continues."""

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
            settings=wandb.Settings(init_timeout=_read_init_timeout(), quiet=True),
        )
        self._is_dead = False
        self._run.define_metric("*", step_metric="step")
        # A resumed run computes some metrics again, but the points of an offline run can't be removed.
        self._logged_steps_path = info.run_dir / LOGGED_STEPS_FILE
        self._logged_steps_path.parent.mkdir(exist_ok=True)
        self._logged_steps = _read_logged_steps(self._logged_steps_path, str(self._run.id))

    @staticmethod
    def require_installed() -> None:
        """Raise SaetrainError if the package is missing, or if an online run could not start."""
        if importlib.util.find_spec("wandb") is None:
            raise SaetrainError(
                "--log_to_wandb true: the package wandb is not installed; run pip install 'saetrain[wandb]'"
            )
        _read_init_timeout()
        wandb = _import_wandb()
        if wandb.setup().settings.mode in ("offline", "disabled", "dryrun"):
            return
        try:
            wandb.login()
        except wandb.errors.Error as error:
            _kill_service()
            raise SaetrainError(f"{START_FAILED}: {_first_line(error)} {LOGIN_HINT}") from error

    def write(self, record: MetricsRecord) -> None:
        """Log the record unless an earlier start did; final metrics are also written to the summary of the run."""
        if self._is_dead:
            return
        if record.step > self._logged_steps.get(record.kind, 0):
            # The step is marked first, so that a kill in between loses a point instead of logging it twice.
            self._logged_steps[record.kind] = record.step
            write_json(self._logged_steps_path, {"id": str(self._run.id), "logged": self._logged_steps})
            self._call_wandb(lambda: self._run.log({"step": record.step, **record.to_flat_dict()}))
        if record.kind in FINAL_KINDS:
            self._call_wandb(lambda: self._write_summary(record))

    def _write_summary(self, record: MetricsRecord) -> None:
        """Write the metrics to the summary of the run and read them back, because no offline file shows them."""
        metrics = {name: value for name, value in record.to_flat_dict().items() if math.isfinite(value)}
        self._run.summary.update(metrics)
        missing = [name for name, value in metrics.items() if self._run.summary.get(name) != value]
        if missing:
            log_rank0(f"the summary of the Weights & Biases run lacks {len(missing)} metrics, such as {missing[0]}")
        elif record.kind == FINAL_KINDS[-1]:
            log_rank0(f"the summary of the Weights & Biases run contains {len(metrics)} metrics of the assessment")

    def _call_wandb(self, call: Callable[[], object]) -> None:
        """Call W&B; after the first error, log one message and call W&B no more, so that training continues."""
        if self._is_dead:
            return
        try:
            call()
        except Exception as error:  # The client raises many types of errors about its service process.
            self._is_dead = True
            log_rank0(
                f"Weights & Biases has stopped answering ({_first_line(error)}); training continues, and "
                "metrics.jsonl still receives all metrics"
            )

    def state_dict(self) -> dict[str, str]:
        """Return the id of the W&B run."""
        return {"wandb_id": str(self._run.id)}

    def close(self, failed: bool) -> None:
        """Finish the W&B run, with exit code 1 after a failure."""
        self._call_wandb(lambda: self._run.finish(exit_code=1 if failed else 0))


def _read_init_timeout() -> float:
    given = os.environ.get("WANDB_INIT_TIMEOUT") or INIT_TIMEOUT_S
    try:
        return float(given)
    except ValueError as error:
        raise SaetrainError(f"WANDB_INIT_TIMEOUT {show_value(given)}: must be a number of seconds") from error


def _import_wandb() -> Any:
    """Import the package, set up so that it starts its own service process."""
    import wandb

    # A run in the service process of a parent (such as a notebook) stays open after a kill and can't be resumed.
    os.environ.pop("WANDB_SERVICE", None)
    return wandb


def _start_run(attempts: int, **options: Any) -> Any:
    """Start the W&B run; a service process that fails to start, as on a busy machine, is restarted a few times."""
    wandb = _import_wandb()
    try:
        return wandb.init(**options)
    except Exception as error:  # The client raises many types of errors about its service process.
        _kill_service()
        if attempts == 1 or isinstance(error, wandb.errors.Error):
            raise SaetrainError(f"{START_FAILED}: {_first_line(error)} {LOGIN_HINT}") from error
    time.sleep(1)
    return _start_run(attempts - 1, **options)


def _kill_service() -> None:
    """Kill the service process of W&B, which has no data yet; at exit, this process would wait for a stuck one.

    If the caller of saetrain as a library has its own W&B run, the service process is not killed.
    """
    wandb = _import_wandb()
    if wandb.run is not None:
        return
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if SERVICE_PROCESS in child.name():
                child.kill()
    # At exit, teardown would print a traceback about the broken connection, which can be ignored here.
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class _LoggedSteps:
    """Content of LOGGED_STEPS_FILE."""

    id: str
    logged: dict[str, int]


def _read_logged_steps(path: Path, run_id: str) -> dict[str, int]:
    """Return {kind of record: last step logged} of the W&B run ``run_id``; empty for a new run."""
    try:
        stored = read_json(path, _LoggedSteps) if path.exists() else None
        return stored.logged if stored is not None and stored.id == run_id else {}
    except SaetrainError as error:
        raise SaetrainError(
            f"{path}: is not valid; delete it, and the steps since the checkpoint are logged to W&B again"
        ) from error
