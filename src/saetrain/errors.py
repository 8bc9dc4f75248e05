"""What a user can cause: one exception type, and the words that help to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SaetrainError(Exception):
    """A mistake that the user can mend.

    The message names the flag or file, what was found and what is allowed. The command line prints it without
    a traceback and exits with ``exit_code``.
    """

    exit_code = 2


class RankFailure(SaetrainError):
    """Another process of the run has failed, with its exit code, or is gone."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def closest_matches(word: str, options: Iterable[str], n: int = 3) -> list[str]:
    """Up to ``n`` members of ``options`` that are spelt like ``word``, best first."""
    return difflib.get_close_matches(word, list(options), n=n, cutoff=0.5)


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """`` Did you mean …?`` with the nearest names, or an empty string when nothing is near."""
    matches = closest_matches(word, options)
    return f" Did you mean {' or '.join(matches)}?" if matches else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is what a CPU or GPU allocator raises when memory runs out."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in text
        or "can't allocate memory" in text
    )
