"""Spikes are found alike by the host and on the device, which nobody waits for."""

from __future__ import annotations

import pytest
import torch

from saetrain.training.delayed import Delayed
from saetrain.training.spikes import SPIKE_MIN, SPIKE_WINDOW, DeviceJudge, HostJudge, Spike
from tests.unit.kernels.conftest import DEVICE

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
    host, device = HostJudge(), DeviceJudge(torch.device(DEVICE), LAG, halts=False)
    said: tuple[list[Spike], list[Spike]] = ([], [])
    for step, (loss, bound) in enumerate(losses(seed)):
        fine = host.fine("h", step, loss, bound)
        assert fine == bool(device.gate(step, on_device(loss), on_device(bound)))
        said[0].extend(host.spikes("h", settle=False))
        said[1].extend(device.spikes("h", settle=False))
    said[1].extend(device.spikes("h", settle=True))
    assert len(said[0]) > 20
    assert [str(spike) for spike in said[0]] == [str(spike) for spike in said[1]]
    assert host.recent() == pytest.approx(device.recent())
    assert len(host.recent()) == SPIKE_WINDOW


def test_the_host_hears_of_it_steps_later_or_when_it_asks() -> None:
    judge = DeviceJudge(torch.device(DEVICE), LAG, halts=False)
    heard = []
    for step in range(4):
        judge.gate(step, on_device(float("nan")), on_device(1.0))
        heard.append([spike.step for spike in judge.spikes("h", settle=False)])
    assert heard == [[], [], [0], [1]]
    assert [spike.step for spike in judge.spikes("h", settle=True)] == [2, 3]
    assert judge.spikes("h", settle=True) == []


def test_behind_a_spike_that_ends_the_run_nothing_is_applied() -> None:
    judge = DeviceJudge(torch.device(DEVICE), LAG, halts=True)
    gates = [
        bool(judge.gate(step, on_device(loss), on_device(1.0))) for step, loss in enumerate((1.0, float("nan"), 1.0))
    ]
    assert gates == [True, False, False]
    assert [spike.step for spike in judge.spikes("h", settle=True)] == [1]


@pytest.mark.parametrize("done", [SPIKE_MIN - 1, 40, SPIKE_WINDOW, 250])
def test_the_running_median_goes_on_where_it_was(done: int) -> None:
    whole, later = (DeviceJudge(torch.device(DEVICE), LAG, halts=False) for _ in range(2))
    for step in range(done):
        whole.gate(step, on_device(1.0 + step % 7), on_device(1.0))
    later.restore(whole.recent())
    assert len(whole.recent()) == min(done, SPIKE_WINDOW)
    for step in range(done, done + 120):
        loss = 350.0 if step % 5 == 0 else 1.0 + step % 3
        gates = [bool(judge.gate(step, on_device(loss), on_device(1.0))) for judge in (whole, later)]
        assert gates[0] == gates[1]
    assert whole.recent() == later.recent()


def test_delayed_figures_come_in_order() -> None:
    queue = Delayed(1)
    for step in range(3):
        queue.put(step, torch.tensor([float(step), 7.0], device=DEVICE))
    assert queue.ready() == [(0, [0.0, 7.0]), (1, [1.0, 7.0])]
    assert queue.settle() == [(2, [2.0, 7.0])]
    assert queue.settle() == []
