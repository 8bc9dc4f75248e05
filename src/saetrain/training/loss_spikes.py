"""Loss spikes: steps whose loss is not finite or far above the running median, detected before the update."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saetrain.async_copy import DelayedCopy

SPIKE_FACTOR = 100.0
"""Ratio of the loss to its running median above which a step is a spike."""
SPIKE_WINDOW_STEPS = 101
"""Number of recent steps in the running median."""
SPIKE_MIN_STEPS = 5
"""Number of steps before the running median is used."""


class LossSpike:
    """A loss spike of ``sae`` in ``step``; ``facts`` also has the loss and its median, ``str()`` is the message."""

    def __init__(self, sae: str, step: int, loss: float, median: float | None) -> None:
        self.sae, self.step = sae, step
        self.facts = {"sae": sae, "step": step, "loss": repr(loss), "running_median": median}
        ratio = f", {loss / median:.0f} times its running median {median:.4g}" if median and math.isfinite(loss) else ""
        gradient = "" if ratio or not math.isfinite(loss) else ", and its gradient is not finite"
        self._text = f"{sae}: the loss of step {step} is {loss:.4g}{ratio}{gradient}"

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> LossSpike:
        """Build the spike of another rank from its ``facts``."""
        return cls(facts["sae"], facts["step"], float(facts["loss"]), facts["running_median"])

    def __str__(self) -> str:
        return self._text


class SpikeDetector:
    """Detects loss spikes on the host."""

    def __init__(self) -> None:
        self._recent_losses: deque[float] = deque(maxlen=SPIKE_WINDOW_STEPS)
        self._spikes: list[LossSpike] = []

    def check_step(self, sae: str, step: int, loss: float, bound: float) -> bool:
        """Return whether the step may be applied; ``bound`` is an upper bound of its gradient norm."""
        median = statistics.median(self._recent_losses) if len(self._recent_losses) >= SPIKE_MIN_STEPS else None
        has_jumped = median is not None and loss > SPIKE_FACTOR * median
        is_ok = math.isfinite(loss) and math.isfinite(bound) and not has_jumped
        if is_ok:
            self._recent_losses.append(loss)
        else:
            self._spikes.append(LossSpike(sae, step, loss, median))
        return is_ok

    def pop_spikes(self, sae: str, *, wait: bool) -> list[LossSpike]:
        """Return the spikes since the last call; ``wait`` has no effect."""
        found, self._spikes = self._spikes, []
        return found

    def recent_losses(self) -> list[float]:
        """Return the losses in the running median."""
        return list(self._recent_losses)

    def load_recent_losses(self, recent: list[float]) -> None:
        """Load the result of :meth:`recent_losses`."""
        self._recent_losses.extend(recent)


class DeviceSpikeDetector:
    """Detects loss spikes on the device; the host reads the results ``lag_steps`` steps later, without waiting.

    ``stop_on_spike``: no step after a spike is applied, because the run ends there.
    """

    def __init__(self, device: torch.device, lag_steps: int, *, stop_on_spike: bool) -> None:
        self._stop_on_spike = stop_on_spike
        self._recent_losses = torch.full((SPIKE_WINDOW_STEPS,), torch.nan, dtype=torch.float64, device=device)
        self._count = torch.zeros((), dtype=torch.long, device=device)
        self._is_stopped = torch.zeros((), dtype=torch.bool, device=device)
        self._pending_results = DelayedCopy(lag_steps)

    def check_step(self, step: int, loss: Tensor, bound: Tensor) -> Tensor:
        """Return whether the step may be applied, as a bool on the device."""
        loss = loss.double()
        median = self._recent_losses.nanquantile(0.5)
        has_median = self._count >= SPIKE_MIN_STEPS
        is_ok = loss.isfinite() & bound.isfinite() & ~(has_median & (loss > SPIKE_FACTOR * median))
        position = (self._count % SPIKE_WINDOW_STEPS).unsqueeze(0)
        self._recent_losses.scatter_(
            0, position, torch.where(is_ok, loss, self._recent_losses.gather(0, position).squeeze(0)).unsqueeze(0)
        )
        self._count += is_ok
        is_applied = is_ok & ~self._is_stopped
        self._pending_results.put(step, torch.stack([is_ok.double(), loss, torch.where(has_median, median, torch.nan)]))
        if self._stop_on_spike:
            self._is_stopped |= ~is_ok
        return is_applied

    def pop_spikes(self, sae: str, *, wait: bool) -> list[LossSpike]:
        """Return the spikes since the last call in the steps whose results are ready, or with ``wait`` in all steps."""
        results = self._pending_results.pop_all() if wait else self._pending_results.pop_ready()
        return [
            LossSpike(sae, step, loss, None if math.isnan(median) else median)
            for step, (is_ok, loss, median) in results
            if not is_ok
        ]

    def recent_losses(self) -> list[float]:
        """Return the losses in the running median."""
        ordered = self._recent_losses.roll(-int(self._count) % SPIKE_WINDOW_STEPS).tolist()
        return [loss for loss in ordered if not math.isnan(loss)]

    def load_recent_losses(self, recent: list[float]) -> None:
        """Load the result of :meth:`recent_losses`."""
        self._recent_losses[: len(recent)] = torch.tensor(recent, dtype=torch.float64)
        self._count.fill_(len(recent))
