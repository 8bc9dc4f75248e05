"""Errors that a user can cause, and suggestions for misspelled names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SaetrainError(Exception):
    """Error that the user can correct.

    The message names the flag or file, what was found, what is allowed and what to do. The command line prints it
    without a traceback and exits with ``exit_code``.
    """

    exit_code = 2


class DivergedRun(SaetrainError):
    """End of a run whose SAEs are saved but reconstruct worse than the mean, so they are of no use."""

    exit_code = 3


class RankFailure(SaetrainError):
    """Failure of another rank, with that rank's exit code, or with 1 if the rank is dead."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def closest_matches(word: str, options: Iterable[str], n: int = 3, cutoff: float = 0.5) -> list[str]:
    """Return up to ``n`` members of ``options`` with a similarity to ``word`` of at least ``cutoff``, best first."""
    return difflib.get_close_matches(word, list(options), n=n, cutoff=cutoff)


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return `` Did you mean …?`` with the most similar names, or an empty string if no name is similar."""
    matches = closest_matches(word, options)
    return f" Did you mean {' or '.join(matches)}?" if matches else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a CPU or GPU allocator raised ``error`` because memory ran out."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in text
        or "can't allocate memory" in text
    )
