"""What the launcher (torchrun) says of this process, in its environment."""

from __future__ import annotations

import os

from saetrain.errors import RankFailure, SaetrainError

REQUIRED_ENV_VARS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def world_size() -> int:
    """Number of processes that train together."""
    return _read_int_env("WORLD_SIZE", 1)


def rank() -> int:
    """This process' number, 0 to ``world_size() - 1``."""
    return _read_int_env("RANK", 0)


def local_rank() -> int:
    """Its number on this host."""
    return _read_int_env("LOCAL_RANK", _read_int_env("SLURM_LOCALID", rank()))


def local_world_size() -> int:
    """Number of processes on this host."""
    return _read_int_env("LOCAL_WORLD_SIZE", world_size())


def _read_int_env(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise SaetrainError(f"environment variable {name}={text}: must be a whole number, as torchrun sets it")
    return int(text)


def restart_count() -> int:
    """How often torchrun has started this host's processes anew for a failure."""
    return _read_int_env("TORCHELASTIC_RESTART_COUNT", 0)


def should_print_error(error: RankFailure) -> bool:
    """Whether this process has to say it: a user's mistake is said by the first that finds it, on its terminal."""
    return error.exit_code != SaetrainError.exit_code or local_world_size() != world_size()


def require_rendezvous_env() -> None:
    """SaetrainError when the environment does not say where the processes meet."""
    missing = [name for name in REQUIRED_ENV_VARS if not os.environ.get(name)]
    if missing:
        raise SaetrainError(
            f"WORLD_SIZE={world_size()}, but the environment lacks {', '.join(missing)}; start by torchrun, or see "
            "docs/distributed.md for other launchers"
        )
    if rank() >= world_size():
        raise SaetrainError(f"environment variable RANK={rank()}: must be below WORLD_SIZE={world_size()}")


def require_one_rank(command: str) -> None:
    """Refuse several processes for a command that would do the same work in each."""
    if world_size() != 1:
        raise SaetrainError(
            f"saetrain {command} runs in one process, and was started with WORLD_SIZE={world_size()}; "
            "start it without torchrun"
        )
