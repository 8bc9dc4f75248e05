"""Progress bars of the library `datasets`, which are off except where a user waits."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def enable_progress_bar() -> Iterator[None]:
    """Let the library show its bar in a terminal."""
    import datasets

    if sys.stderr.isatty():
        datasets.enable_progress_bars()
    try:
        yield
    finally:
        datasets.disable_progress_bars()
