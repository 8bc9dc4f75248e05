"""SIGTERM and Ctrl-C as a wish to stop: the step is finished or dropped, everything saved, then the run ends."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """Raised where a wish to stop is noticed in the middle of a step."""


class StopWish:
    """While entered, the first signal is remembered, and a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopWish:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.signal = self.signal or signal.Signals(number)

    def check(self) -> None:
        """Raise :class:`Stopped` once a signal has come."""
        if self.signal is not None:
            raise Stopped

    @property
    def exit_code(self) -> int:
        """0 after SIGTERM, for a scheduler's preemption is no failure; 130 after Ctrl-C, as shells expect."""
        return 130 if self.signal is signal.SIGINT else 0
