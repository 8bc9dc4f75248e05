"""Console output: progress bars in a terminal, plain lines at intervals in a log file."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from tqdm import tqdm

from saetrain.distributed import env
from saetrain.untrusted import escape_text

LINE_INTERVAL_S = 30.0
"""Seconds between plain lines at most."""
MIN_LINES = 10
"""Smallest number of plain lines, for runs with at least that many steps."""
MIN_BAR_COLUMNS = 10
MAX_PHASE_COLUMNS = 30
"""Largest width of the name of a phase, in characters."""
_is_muted = False


@contextlib.contextmanager
def mute_log_lines() -> Iterator[None]:
    """Print no lines of :func:`log_rank0`, while a run opens its own text again."""
    global _is_muted
    outer, _is_muted = _is_muted, True
    try:
        yield
    finally:
        _is_muted = outer


def log_rank0(text: str) -> None:
    """Print a line to stderr on rank 0, above the progress bar if there is one."""
    if env.rank() or _is_muted:
        return
    # A full disk below the log must not end a run.
    with contextlib.suppress(OSError):
        tqdm.write(escape_text(text), file=sys.stderr)


def print_rank0(text: str) -> None:
    """Print a line of results to stdout on rank 0."""
    if env.rank() == 0:
        print(escape_text(text))


def print_lines(text: str) -> None:
    """Print results of several lines; text from a user must not contain line breaks."""
    for line in text.split("\n"):
        print_rank0(line)


def open_bar(phase: str, total: float) -> tqdm[NoReturn]:
    """Return a progress bar over the ``total`` tokens of a phase, which disappears at its end.

    Without a terminal, and on ranks other than 0, it shows nothing.
    """
    return tqdm(
        total=total,
        desc=phase[:MAX_PHASE_COLUMNS],
        unit_scale=True,
        smoothing=0,
        leave=False,
        dynamic_ncols=True,
        disable=True if env.rank() else None,
        file=sys.stderr,
        bar_format="{desc} {n_fmt}/{total_fmt} tokens {bar} {remaining} left",
    )


class TimeLeft:
    """Estimates the time that the rest of a run takes.

    The shuffle buffer is filled before the first step and refilled in bursts. The estimate adds the remaining steps and
    the activations that are still to be computed, each at its mean speed so far. This equals the mean over whole refill
    periods, and is also right before the first period has ended.
    """

    def __init__(self, steps: int, fill_tokens: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._steps, self._fill_tokens, self._clock = steps, fill_tokens, clock
        self._start_s, self._n_filled, self._fill_s = clock(), 0, 0.0

    def record_fill(self, tokens: int, seconds: float) -> None:
        """Add the time in which the model computed activations for the buffer."""
        self._n_filled += tokens
        self._fill_s += seconds

    def estimate_seconds(self, steps_done: int) -> float:
        """Return the seconds left after ``steps_done`` steps, at least one."""
        step_s = (self._clock() - self._start_s - self._fill_s) / steps_done
        tokens_left = max(0.0, self._fill_tokens - self._n_filled)
        return step_s * (self._steps - steps_done) + self._fill_s / max(1, self._n_filled) * tokens_left


class ProgressLine:
    """Progress of training with the main metrics, as a bar in a terminal, else as plain lines.

    ``fill_tokens``: activations that this rank computes for the remaining steps.
    """

    def __init__(
        self,
        total_steps: int,
        steps_done: int,
        fill_tokens: float = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps, self._first_step, self._fill_tokens, self._clock = (
            total_steps,
            steps_done,
            fill_tokens,
            clock,
        )
        self._bar: Any = None
        self._is_training, self._figures = False, ["…"]
        self.start_timing(0)

    def start_timing(self, first_fill_tokens: int) -> None:
        """Measure the time from now on, and show the first filling of the shuffle buffer."""
        self._time_left = TimeLeft(self._total_steps - self._first_step, self._fill_tokens, self._clock)
        self._last_line_s = self._clock()
        if first_fill_tokens:
            log_rank0(f"filling the shuffle buffer ({first_fill_tokens:,} activations)")
            self._bar = open_bar("filling the buffer", first_fill_tokens)

    def record_fill(self, tokens: int, seconds: float) -> None:
        """Add activations of the shuffle buffer to the bar of the first filling and to the estimate of the time."""
        self._time_left.record_fill(tokens, seconds)
        if self._bar is not None and not self._is_training:
            self._bar.update(min(tokens, self._bar.total - self._bar.n))

    def should_print(self, step: int) -> bool:
        """Return whether :meth:`update` prints a plain line at ``step`` (from 1) and thus needs the step's metrics."""
        if sys.stderr.isatty() or env.rank():
            return False
        tenth = max(1, self._total_steps // MIN_LINES)
        is_overdue = step > self._first_step + 1 and self._clock() - self._last_line_s > LINE_INTERVAL_S
        return step == self._total_steps or step % tenth == 0 or is_overdue

    def update(self, step: int, metrics: Mapping[str, float] | None) -> None:
        """Show that ``step`` is done; ``metrics`` are those of this step, or None if they were not computed."""
        if env.rank():
            return
        seconds = self._time_left.estimate_seconds(step - self._first_step)
        left = f"{format_duration(seconds)} left"
        if sys.stderr.isatty():
            self._update_bar(step, left, metrics)
        elif metrics and self.should_print(step):
            self._last_line_s = self._clock()
            ending = "" if step == self._total_steps else f"  {left}"
            log_rank0(f"step {step}/{self._total_steps}  {format_metrics(metrics)}{ending}")

    def _update_bar(self, step: int, left: str, metrics: Mapping[str, float] | None) -> None:
        if metrics:
            self._figures = format_bar_figures(metrics)
        done = f"{step}/{self._total_steps}"
        figures = [left, *self._figures]
        # The last column stays free, because some terminals wrap a line that fills it.
        columns = shutil.get_terminal_size().columns - 1
        while len(" ".join([done, *figures])) + 1 + MIN_BAR_COLUMNS > columns and len(figures) > 1:
            figures.pop()
        layout = f"{done} {{bar}} {' '.join(figures)}"
        if not self._is_training:
            self.close()
            self._is_training = True
            total = self._total_steps
            self._bar = tqdm(total=total, initial=step, file=sys.stderr, bar_format=layout, ncols=columns)
            return
        self._bar.bar_format, self._bar.ncols = layout, columns
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Close the bar and leave it on the screen."""
        if self._bar is not None:
            self._bar.close()


def format_duration(seconds: float) -> str:
    """Return ``1:05`` for 65 seconds, and ``1h01`` for 61 minutes."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}" if hours else f"{minutes}:{seconds:02d}"


def format_bar_figures(metrics: Mapping[str, float]) -> list[str]:
    """Return ``FVU 0.210``, ``L0 32``, ``dead 1%`` (by rate), ``loss 0.21`` and ``2.0k tok/s``."""
    rate = metrics["tokens_per_second"]
    return [
        f"FVU {metrics['fvu']:.3f}",
        f"L0 {metrics['l0']:.3g}",
        f"dead {metrics['dead_below_threshold']:.0%}",
        f"loss {metrics['loss']:.2g}",
        f"{rate:.0f} tok/s" if rate < 1000 else f"{rate / 1000:.{0 if rate >= 9950 else 1}f}k tok/s",
    ]


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
