"""The only file that communicates between ranks; with one rank, every function is a no-op."""

from __future__ import annotations

import os

from saetrain.errors import SaetrainError


def world_size() -> int:
    """Number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process' number, 0 to ``world_size() - 1``."""
    return int(os.environ.get("RANK", "0"))


def require_one_rank() -> None:
    """Refuse a start by ``torchrun`` with several processes, which would train the same SAE several times."""
    if world_size() != 1:
        raise SaetrainError(
            f"started with WORLD_SIZE={world_size()}, but this version trains in one process only; "
            "run `python -m saetrain …` without torchrun"
        )
