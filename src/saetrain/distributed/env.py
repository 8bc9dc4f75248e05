"""Environment variables that the launcher (torchrun) sets: ranks, world sizes and restarts."""

from __future__ import annotations

import math
import os

from saetrain.errors import RankFailure, SaetrainError

REQUIRED_ENV_VARS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PROGRESS_TIMEOUT_VARIABLE = "SAETRAIN_PROGRESS_TIMEOUT_MINUTES"
PROGRESS_TIMEOUT_MINUTES = 60.0
"""Minutes without progress after which one of several ranks counts as stuck."""


def world_size() -> int:
    """Return the number of processes of the run."""
    return _read_int_env("WORLD_SIZE", 1)


def rank() -> int:
    """Return the number of this process, 0 to ``world_size() - 1``."""
    return _read_int_env("RANK", 0)


def local_rank() -> int:
    """Return the number of this process on its host."""
    return _read_int_env("LOCAL_RANK", _read_int_env("SLURM_LOCALID", rank()))


def local_world_size() -> int:
    """Return the number of processes on this host."""
    return _read_int_env("LOCAL_WORLD_SIZE", world_size())


def _read_int_env(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise SaetrainError(f"environment variable {name}={text}: must be a whole number, as torchrun sets it")
    return int(text)


def restart_count() -> int:
    """Return how often torchrun has restarted the processes of this host after a failure."""
    return _read_int_env("TORCHELASTIC_RESTART_COUNT", 0)


def will_be_restarted() -> bool:
    """Return whether torchrun restarts this process if it ends with another exit code than 0."""
    return restart_count() < _read_int_env("TORCHELASTIC_MAX_RESTARTS", 0)


def progress_timeout_s() -> float:
    """Return the seconds without progress after which a rank counts as stuck, or infinity if this is switched off."""
    text = os.environ.get(PROGRESS_TIMEOUT_VARIABLE) or str(PROGRESS_TIMEOUT_MINUTES)
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not minutes >= 0:
        raise SaetrainError(
            f"environment variable {PROGRESS_TIMEOUT_VARIABLE}={text}: must be a number of minutes, or 0 to wait "
            "without a limit"
        )
    return 60 * minutes or math.inf


def should_print_error(error: RankFailure) -> bool:
    """Return whether this process prints the failure of another rank.

    On one host, a user's mistake is printed only by the rank that reported it first.
    """
    return error.exit_code != SaetrainError.exit_code or local_world_size() != world_size()


def require_rendezvous_env() -> None:
    """Raise SaetrainError if the environment lacks the address of the rendezvous, or if the rank is out of range."""
    missing = [name for name in REQUIRED_ENV_VARS if not os.environ.get(name)]
    if missing:
        raise SaetrainError(
            f"WORLD_SIZE={world_size()}, but the environment lacks {', '.join(missing)}; start with torchrun, or "
            "see docs/distributed.md for other launchers"
        )
    if rank() >= world_size():
        raise SaetrainError(f"environment variable RANK={rank()}: must be below WORLD_SIZE={world_size()}")


def require_one_rank(command: str) -> None:
    """Raise SaetrainError if several processes run a command that would do the same work in each of them."""
    if world_size() != 1:
        raise SaetrainError(
            f"saetrain {command} runs in one process, but was started with WORLD_SIZE={world_size()}; "
            "start it without torchrun"
        )
