"""Spikes are found alike by the host and on the device, which nobody waits for."""

from __future__ import annotations

import pytest
import torch

from saetrain.async_copy import DelayedCopy
from saetrain.training.loss_spikes import (
    SPIKE_MIN_STEPS,
    SPIKE_WINDOW_STEPS,
    DeviceSpikeDetector,
    LossSpike,
    SpikeDetector,
)
from tests.unit.ops.conftest import DEVICE

LAG = 2


def losses(seed: int, steps: int = 300) -> list[tuple[float, float]]:
    """(loss, bound), some of which are not finite or far too large."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    kinds, sizes = torch.randint(20, (steps,), generator=generator), torch.rand(steps, generator=generator)
    for kind, size in zip(kinds.tolist(), sizes.tolist(), strict=True):
        loss = {0: float("nan"), 1: 1e4, 2: float("inf")}.get(kind, 1 + size)
        found.append((loss, float("inf") if kind == 3 else 1.0))
    return found


def on_device(value: float) -> torch.Tensor:
    return torch.tensor(value, device=DEVICE)


@pytest.mark.parametrize("seed", range(3))
def test_both_leave_out_the_same_steps_and_say_the_same(seed: int) -> None:
    host, device = SpikeDetector(), DeviceSpikeDetector(torch.device(DEVICE), LAG, stop_on_spike=False)
    said: tuple[list[LossSpike], list[LossSpike]] = ([], [])
    for step, (loss, bound) in enumerate(losses(seed)):
        fine = host.check_step("h", step, loss, bound)
        assert fine == bool(device.check_step(step, on_device(loss), on_device(bound)))
        said[0].extend(host.pop_spikes("h", wait=False))
        said[1].extend(device.pop_spikes("h", wait=False))
    said[1].extend(device.pop_spikes("h", wait=True))
    assert len(said[0]) > 20
    assert [str(spike) for spike in said[0]] == [str(spike) for spike in said[1]]
    assert host.recent_losses() == pytest.approx(device.recent_losses())
    assert len(host.recent_losses()) == SPIKE_WINDOW_STEPS


def test_the_host_hears_of_it_steps_later_or_when_it_asks() -> None:
    judge = DeviceSpikeDetector(torch.device(DEVICE), LAG, stop_on_spike=False)
    heard = []
    for step in range(4):
        judge.check_step(step, on_device(float("nan")), on_device(1.0))
        heard.append([spike.step for spike in judge.pop_spikes("h", wait=False)])
    assert heard == [[], [], [0], [1]]
    assert [spike.step for spike in judge.pop_spikes("h", wait=True)] == [2, 3]
    assert judge.pop_spikes("h", wait=True) == []


def test_behind_a_spike_that_ends_the_run_nothing_is_applied() -> None:
    judge = DeviceSpikeDetector(torch.device(DEVICE), LAG, stop_on_spike=True)
    gates = [
        bool(judge.check_step(step, on_device(loss), on_device(1.0)))
        for step, loss in enumerate((1.0, float("nan"), 1.0))
    ]
    assert gates == [True, False, False]
    assert [spike.step for spike in judge.pop_spikes("h", wait=True)] == [1]


@pytest.mark.parametrize("done", [SPIKE_MIN_STEPS - 1, 40, SPIKE_WINDOW_STEPS, 250])
def test_the_running_median_goes_on_where_it_was(done: int) -> None:
    whole, later = (DeviceSpikeDetector(torch.device(DEVICE), LAG, stop_on_spike=False) for _ in range(2))
    for step in range(done):
        whole.check_step(step, on_device(1.0 + step % 7), on_device(1.0))
    later.load_recent_losses(whole.recent_losses())
    assert len(whole.recent_losses()) == min(done, SPIKE_WINDOW_STEPS)
    for step in range(done, done + 120):
        loss = 350.0 if step % 5 == 0 else 1.0 + step % 3
        gates = [bool(judge.check_step(step, on_device(loss), on_device(1.0))) for judge in (whole, later)]
        assert gates[0] == gates[1]
    assert whole.recent_losses() == later.recent_losses()


def test_delayed_figures_come_in_order() -> None:
    queue = DelayedCopy(1)
    for step in range(3):
        queue.put(step, torch.tensor([float(step), 7.0], device=DEVICE))
    assert queue.pop_ready() == [(0, [0.0, 7.0]), (1, [1.0, 7.0])]
    assert queue.pop_all() == [(2, [2.0, 7.0])]
    assert queue.pop_all() == []
