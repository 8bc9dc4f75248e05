"""Progress: plain lines show their own steps, the bar fits a terminal, and the time left is near the truth."""

from __future__ import annotations

import io
import os
import re
import sys

import pytest

from saetrain.logs.console import ProgressLine, format_duration, log_rank0, mute_log_lines, open_bar

METRICS = {
    "loss": 0.01387, "fvu": 0.3513, "l0": 192.0, "dead_below_threshold": 0.123, "dead_not_fired": 0.2,
    "tokens_per_second": 12_345.0,
}  # fmt: skip


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize("steps", [1, 3, 25, 1000])
def test_lines_are_due_about_ten_times_and_at_the_end(steps: int) -> None:
    line = ProgressLine(steps, 0)
    due = [step for step in range(1, steps + 1) if line.should_print(step)]
    assert due[-1] == steps
    assert min(steps, 10) <= len(due) <= 13


def test_a_line_is_due_after_half_a_minute() -> None:
    clock = Clock()
    line = ProgressLine(1000, 0, clock=clock)
    assert not line.should_print(7)
    clock.now_s += 31
    assert line.should_print(7)


def test_a_line_shows_the_figures_of_its_step(capfd: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine(4, 0)
    for step in range(1, 5):
        line.update(step, {**METRICS, "loss": step})
    lines = capfd.readouterr().err.splitlines()
    assert [text.split()[1] for text in lines] == ["1/4", "2/4", "3/4", "4/4"]
    assert [text.split()[3] for text in lines] == ["1", "2", "3", "4"]
    assert ["left" in text for text in lines] == [True, True, True, False]


class Terminal(io.StringIO):
    """A terminal of 80 columns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        monkeypatch.setattr(sys, "stderr", self)
        monkeypatch.setattr("shutil.get_terminal_size", lambda *fallback: os.terminal_size((80, 24)))

    def isatty(self) -> bool:
        return True

    def read_last_bar(self) -> str:
        return self.getvalue().rstrip("\n").split("\r")[-1]


@pytest.mark.parametrize(("steps", "hours"), [(292, 0), (2920, 0), (2920, 5), (12_920, 5)])
def test_the_bar_fits_80_columns_with_all_figures(monkeypatch: pytest.MonkeyPatch, steps: int, hours: int) -> None:
    terminal, clock = Terminal(monkeypatch), Clock()
    line = ProgressLine(steps, 0, clock=clock)
    for step in range(1, steps - steps // 10):
        clock.now_s += hours * 3600 * 10 / steps
        line.update(step, METRICS)
    line.close()
    shown = terminal.read_last_bar()
    assert len(shown) < 80
    left = r"\dh\d\d" if hours else r"0:00"
    figures = "FVU 0.351 L0 192 dead 12% loss 0.014 12k tok/s"
    found = re.fullmatch(rf"{step}/{steps} (.+) {left} left {figures}", shown)
    assert found is not None, shown
    assert len(found[1]) >= 10


def test_a_bar_without_room_shows_fewer_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    line = ProgressLine(99_999_999, 99_999_990)
    line.update(99_999_991, METRICS)
    line.close()
    shown = terminal.read_last_bar()
    assert len(shown) < 80
    assert "loss" in shown
    assert "tok/s" not in shown


@pytest.mark.parametrize("phase", ["scoring", "model loss on a_data_set_with_a_very_long_name.jsonl"])
def test_bars_of_phases_fit_80_columns(monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    terminal = Terminal(monkeypatch)
    with open_bar(phase, 1_234_567) as bar:
        bar.ncols, bar.dynamic_ncols = 80, None
        bar.update(123_456)
        bar.refresh()
    shown = max(terminal.getvalue().split("\r"), key=len)
    assert len(shown) <= 80
    assert re.fullmatch(rf"{phase[:30]} 123k/1\.23M tokens (.{{10,}}) \d\d:\d\d left", shown), shown


def test_without_a_terminal_phases_have_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with open_bar("scoring", 100) as bar:
        bar.update(50)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("shards", [1, 2, 16])
@pytest.mark.parametrize("buffer_tokens", [4096, 65_536])
@pytest.mark.parametrize("model_share", [0.05, 0.5, 0.95])
def test_the_time_left_is_near_the_truth_although_the_buffer_is_refilled_in_bursts(
    shards: int, buffer_tokens: int, model_share: float
) -> None:
    """The pools have the sizes of ShuffleBuffer: the first ones are staggered, so that refills are too."""
    clock, steps, step_tokens = Clock(), 300, 512
    model_s, step_s = model_share / step_tokens, 1 - model_share
    line = ProgressLine(steps, 0, fill_tokens=steps * step_tokens, clock=clock)
    line.start_timing(0)
    left = [0] * shards
    pool = [buffer_tokens // shards * (shard + 1) // shards for shard in range(shards)]
    needed = [steps * step_tokens // shards] * shards
    times, estimates = [], []
    for step in range(1, steps + 1):
        for shard in range(shards):
            while left[shard] < step_tokens // shards:
                size = min(pool[shard], needed[shard])
                clock.now_s += size * model_s
                line.record_fill(size, size * model_s)
                left[shard], needed[shard], pool[shard] = (
                    left[shard] + size,
                    needed[shard] - size,
                    buffer_tokens // shards,
                )
            left[shard] -= step_tokens // shards
        clock.now_s += step_s
        times.append(clock.now_s)
        estimates.append(line._time_left.estimate_seconds(step))
    for step in range(steps // 10, steps - 1):
        truth = times[-1] - times[step - 1]
        assert truth / 1.5 <= estimates[step - 1] <= truth * 1.5, step


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (65.4, "1:05"), (3599, "59:59"), (3660, "1h01")])
def test_durations(seconds: float, shown: str) -> None:
    assert format_duration(seconds) == shown


def test_muted_lines_are_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    with mute_log_lines():
        log_rank0("hidden")
    log_rank0("shown")
    assert capfd.readouterr().err == "shown\n"
