"""What the terminal shows: a progress bar there, plain lines at intervals in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from saetrain import launch

LINE_SECONDS = 30.0
LINES = 10
"""Plain lines at the least, however short the run."""


def say(text: str) -> None:
    """Print a line of the run's own account, above a progress bar where there is one; of rank 0 alone."""
    if launch.rank():
        return
    tqdm.write(text, file=sys.stderr)


class ProgressLine:
    """Steps done, with the figures that matter: a bar in a terminal, else a line now and then."""

    def __init__(self, steps: int, done: int) -> None:
        self._steps, self._done = steps, done
        self._bar: Any = None
        self._first, self._start, self._last_line = done, 0.0, 0.0

    def due(self, step: int) -> bool:
        """Whether a plain line is to be printed at step ``step`` (from 1), which then wants its figures."""
        if sys.stderr.isatty() or launch.rank():
            return False
        tenth = max(1, self._steps // LINES)
        late = self._last_line > 0 and time.monotonic() - self._last_line > LINE_SECONDS
        return step == self._steps or step % tenth == 0 or late

    def update(self, step: int, figures: Mapping[str, float] | None) -> None:
        """Step ``step`` is done; ``figures`` are those of this step, where they were computed."""
        if launch.rank():
            return
        if not self._start:
            # The first step waits for the buffer to fill, which says nothing of the others.
            self._first, self._start, self._last_line = step, time.monotonic(), time.monotonic()
        if sys.stderr.isatty():
            self._show_bar(step, figures)
        elif figures and self.due(step):
            self._last_line = time.monotonic()
            say(f"step {step}/{self._steps}  {describe(figures)}{self._left(step)}")
        self._done = step

    def _show_bar(self, step: int, figures: Mapping[str, float] | None) -> None:
        if self._bar is None:
            self._bar = tqdm(total=self._steps, initial=step, unit="step", dynamic_ncols=True, file=sys.stderr)
        if figures:
            self._bar.set_postfix_str(describe(figures), refresh=False)
        self._bar.update(step - max(self._done, self._first))

    def _left(self, step: int) -> str:
        if step == self._first or step == self._steps:
            return ""
        seconds = (time.monotonic() - self._start) / (step - self._first) * (self._steps - step)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"  {hours}:{minutes:02d}:{seconds:02d} left"

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def describe(figures: Mapping[str, float]) -> str:
    """``loss 0.21  FVU 0.21  L0 32.0  dead 1.2% by rate 0.3% by window  2048 tok/s``."""
    parts = [
        f"loss {figures['loss']:.4g}",
        f"FVU {figures['fvu']:.3f}",
        f"L0 {figures['l0']:.1f}",
        f"dead {figures['dead_below_threshold']:.1%} by rate {figures['dead_not_fired']:.1%} by window",
        f"{figures['tokens_per_second']:,.0f} tok/s",
    ]
    return "  ".join(parts)
