"""Preemption by SIGTERM or Ctrl-C: the run finishes or drops the current step, saves a checkpoint and exits."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preempted(Exception):
    """Raised if a signal is noticed in the middle of a step."""


class PreemptionHandler:
    """Context manager that records the first signal; a Ctrl-C after it ends the process at once."""

    def __init__(self) -> None:
        self.received_signal: signal.Signals | None = None
        self._previous_handlers: dict[signal.Signals, object] = {}

    def __enter__(self) -> PreemptionHandler:
        self._previous_handlers = {number: signal.signal(number, self._record_signal) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _record_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received_signal is not None and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.received_signal = self.received_signal or signal.Signals(number)

    def raise_if_preempted(self) -> None:
        """Raise :class:`Preempted` if a signal was received."""
        if self.received_signal is not None:
            raise Preempted

    @property
    def exit_code(self) -> int:
        """0 after SIGTERM, because a scheduler's preemption is not a failure; 130 after Ctrl-C, as shells expect."""
        return 130 if self.received_signal is signal.SIGINT else 0
