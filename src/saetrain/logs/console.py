"""What the terminal shows: a progress bar there, plain lines at intervals in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from saetrain.distributed import env

LINE_INTERVAL_S = 30.0
MIN_LINES = 10
"""Plain lines at the least, however short the run."""


def log_rank0(text: str) -> None:
    """Print a line of the run's own account, above a progress bar where there is one; of rank 0 alone."""
    if env.rank():
        return
    tqdm.write(text, file=sys.stderr)


class ProgressLine:
    """Steps done, with the figures that matter: a bar in a terminal, else a line now and then."""

    def __init__(self, total_steps: int, steps_done: int) -> None:
        self._total_steps, self._steps_done = total_steps, steps_done
        self._bar: Any = None
        self._first_step, self._start_s, self._last_line_s = steps_done, 0.0, 0.0

    def should_print(self, step: int) -> bool:
        """Whether a plain line is to be printed at step ``step`` (from 1), which then wants its figures."""
        if sys.stderr.isatty() or env.rank():
            return False
        tenth = max(1, self._total_steps // MIN_LINES)
        is_overdue = self._last_line_s > 0 and time.monotonic() - self._last_line_s > LINE_INTERVAL_S
        return step == self._total_steps or step % tenth == 0 or is_overdue

    def update(self, step: int, metrics: Mapping[str, float] | None) -> None:
        """Step ``step`` is done; ``figures`` are those of this step, where they were computed."""
        if env.rank():
            return
        if not self._start_s:
            # The first step waits for the buffer to fill, which says nothing of the others.
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
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def format_metrics(metrics: Mapping[str, float]) -> str:
    """``loss 0.21  FVU 0.21  L0 32.0  dead 1.2% by rate 0.3% by window  2048 tok/s``."""
    parts = [
        f"loss {metrics['loss']:.4g}",
        f"FVU {metrics['fvu']:.3f}",
        f"L0 {metrics['l0']:.1f}",
        f"dead {metrics['dead_below_threshold']:.1%} by rate {metrics['dead_not_fired']:.1%} by window",
        f"{metrics['tokens_per_second']:,.0f} tok/s",
    ]
    return "  ".join(parts)
