"""What the terminal shows: a progress bar there, plain lines at intervals in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm

LINE_SECONDS = 30.0
LINES = 10
"""Plain lines at the least, however short the run."""


def say(text: str) -> None:
    """Print a line of the run's own account, above a progress bar where there is one."""
    tqdm.write(text, file=sys.stderr)


class ProgressLine:
    """Steps done, with the figures that matter."""

    def __init__(self, steps: int, done: int) -> None:
        self._steps, self._done = steps, done
        self._start, self._first = time.monotonic(), done
        self._last_line = self._start
        self._bar = (
            tqdm(total=steps, initial=done, unit="step", dynamic_ncols=True, leave=True, file=sys.stderr)
            if sys.stderr.isatty()
            else None
        )
        self._figures = ""

    def update(self, step: int, figures: Mapping[str, float] | None) -> None:
        """Step ``step`` (from 1) is done; ``figures`` where new ones were computed."""
        if figures:
            self._figures = describe(figures)
        if self._bar is not None:
            self._bar.set_postfix_str(self._figures, refresh=False)
            self._bar.update(step - self._done)
        elif self._line_due(step):
            self._last_line = time.monotonic()
            say(f"step {step}/{self._steps}  {self._figures}  {self._left(step)} left")
        self._done = step

    def _line_due(self, step: int) -> bool:
        tenth = max(1, self._steps // LINES)
        return (
            step == self._steps
            or step // tenth > (step - 1) // tenth
            or (time.monotonic() - self._last_line > LINE_SECONDS)
        )

    def _left(self, step: int) -> str:
        seconds = (time.monotonic() - self._start) / max(step - self._first, 1) * (self._steps - step)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}"

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def describe(figures: Mapping[str, float]) -> str:
    """``loss 0.21  FVU 0.21  L0 32.0  dead 1.2 %  2048 tok/s``."""
    parts = [
        f"loss {figures['loss']:.4g}",
        f"FVU {figures['fvu']:.3f}",
        f"L0 {figures['l0']:.1f}",
        f"dead {100 * figures['dead_below_threshold']:.1f} %",
        f"{figures['tokens_per_second']:,.0f} tok/s",
    ]
    return "  ".join(parts)
