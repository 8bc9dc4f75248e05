"""Console output: a progress bar in a terminal, plain lines at intervals in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from saetrain.distributed import env

LINE_INTERVAL_S = 30.0
"""Seconds between plain lines at most."""
MIN_LINES = 10
"""Smallest number of plain lines, for runs with at least that many steps."""


def log_rank0(text: str) -> None:
    """Print a line to stderr on rank 0, above the progress bar if there is one."""
    if env.rank():
        return
    tqdm.write(text, file=sys.stderr)


class ProgressLine:
    """Progress of training with the main metrics, as a bar in a terminal, else as plain lines."""

    def __init__(self, total_steps: int, steps_done: int) -> None:
        self._total_steps, self._steps_done = total_steps, steps_done
        self._bar: Any = None
        self._first_step, self._start_s, self._last_line_s = steps_done, 0.0, 0.0

    def should_print(self, step: int) -> bool:
        """Return whether :meth:`update` prints a plain line at ``step`` (from 1) and thus needs the step's metrics."""
        if sys.stderr.isatty() or env.rank():
            return False
        tenth = max(1, self._total_steps // MIN_LINES)
        is_overdue = self._last_line_s > 0 and time.monotonic() - self._last_line_s > LINE_INTERVAL_S
        return step == self._total_steps or step % tenth == 0 or is_overdue

    def update(self, step: int, metrics: Mapping[str, float] | None) -> None:
        """Show that ``step`` is done; ``metrics`` are those of this step, or None if they were not computed."""
        if env.rank():
            return
        if not self._start_s:
            # The first step waits until the buffer is full, so its time would distort the estimate.
            self._first_step, self._start_s, self._last_line_s = step, time.monotonic(), time.monotonic()
        if sys.stderr.isatty():
            self._update_bar(step, metrics)
        elif metrics and self.should_print(step):
            self._last_line_s = time.monotonic()
            log_rank0(f"step {step}/{self._total_steps}  {format_metrics(metrics)}{self._format_time_left(step)}")
        self._steps_done = step

    def _update_bar(self, step: int, metrics: Mapping[str, float] | None) -> None:
        if self._bar is None:
            self._bar = tqdm(total=self._total_steps, initial=step, unit="step", dynamic_ncols=True, file=sys.stderr)
        if metrics:
            self._bar.set_postfix_str(format_metrics(metrics), refresh=False)
        self._bar.update(step - max(self._steps_done, self._first_step))

    def _format_time_left(self, step: int) -> str:
        if step == self._first_step or step == self._total_steps:
            return ""
        seconds = (time.monotonic() - self._start_s) / (step - self._first_step) * (self._total_steps - step)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"  {hours}:{minutes:02d}:{seconds:02d} left"

    def close(self) -> None:
        """Close the bar and leave it on the screen."""
        if self._bar is not None:
            self._bar.close()


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Return ``loss 0.21  FVU 0.210  L0 32.0  dead 1.2% by rate 0.3% by window  2,048 tok/s``."""
    parts = [
        f"loss {metrics['loss']:.4g}",
        f"FVU {metrics['fvu']:.3f}",
        f"L0 {metrics['l0']:.1f}",
        f"dead {metrics['dead_below_threshold']:.1%} by rate {metrics['dead_not_fired']:.1%} by window",
        f"{metrics['tokens_per_second']:,.0f} tok/s",
    ]
    return "  ".join(parts)
