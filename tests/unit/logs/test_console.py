"""Plain progress lines: each shows its own step, and short runs show some."""

from __future__ import annotations

import pytest

from saetrain.logs.console import ProgressLine


@pytest.mark.parametrize("steps", [1, 3, 25, 1000])
def test_lines_are_due_about_ten_times_and_at_the_end(steps: int) -> None:
    line = ProgressLine(steps, 0)
    due = [step for step in range(1, steps + 1) if line.should_print(step)]
    assert due[-1] == steps
    assert min(steps, 10) <= len(due) <= 13


def test_a_line_shows_the_figures_of_its_step(capfd: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine(4, 0)
    for step in range(1, 5):
        figures = {
            "loss": step,
            "fvu": step,
            "l0": 2,
            "dead_below_threshold": 0.1,
            "dead_not_fired": 0.2,
            "tokens_per_second": 5,
        }
        line.update(step, figures)
    lines = capfd.readouterr().err.splitlines()
    assert [text.split()[1] for text in lines] == ["1/4", "2/4", "3/4", "4/4"]
    assert [text.split()[3] for text in lines] == ["1", "2", "3", "4"]
