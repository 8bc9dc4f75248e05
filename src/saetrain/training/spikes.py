"""A step whose loss is not finite or has jumped: found before it is applied, by the host or on the device."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saetrain.training.delayed import Delayed

SPIKE_FACTOR = 100.0
SPIKE_WINDOW = 101
"""Steps that the running median is taken of."""
SPIKE_MIN = 5
"""Steps before which a jump is not judged."""


class Spike:
    """A loss that is not finite or has jumped; ``facts`` say where, the text says how."""

    def __init__(self, sae: str, step: int, loss: float, median: float | None) -> None:
        self.step = step
        self.facts = {"sae": sae, "step": step, "loss": repr(loss), "running_median": median}
        usual = f", {loss / median:.0f} times its running median {median:.4g}" if median and math.isfinite(loss) else ""
        gradient = "" if usual or not math.isfinite(loss) else ", and its gradient is not finite"
        self._text = f"{sae}: the loss of step {step} is {loss:.4g}{usual}{gradient}"

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Spike:
        """The spike of another rank, by its facts."""
        return cls(facts["sae"], facts["step"], float(facts["loss"]), facts["running_median"])

    def __str__(self) -> str:
        return self._text


class HostJudge:
    """Judges a step by numbers that the host has."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self._found: list[Spike] = []

    def fine(self, sae: str, step: int, loss: float, bound: float) -> bool:
        """Whether the step may be applied: its loss, and ``bound`` on its gradient's norm, are as they should be."""
        median = statistics.median(self._recent) if len(self._recent) >= SPIKE_MIN else None
        jumped = median is not None and loss > SPIKE_FACTOR * median
        fine = math.isfinite(loss) and math.isfinite(bound) and not jumped
        if fine:
            self._recent.append(loss)
        else:
            self._found.append(Spike(sae, step, loss, median))
        return fine

    def spikes(self, sae: str, *, settle: bool) -> list[Spike]:
        """Those since the last call; there is nothing to wait for."""
        found, self._found = self._found, []
        return found

    def recent(self) -> list[float]:
        """The losses that the running median is taken of."""
        return list(self._recent)

    def restore(self, recent: list[float]) -> None:
        """Take back what :meth:`recent` gave."""
        self._recent.extend(recent)


class DeviceJudge:
    """The same on the device: the host hears of a spike ``lag`` steps later, and no step waits for it.

    ``halts``: nothing behind a spike is applied either, as the run ends there.
    """

    def __init__(self, device: torch.device, lag: int, *, halts: bool) -> None:
        self._halts = halts
        self._recent = torch.full((SPIKE_WINDOW,), torch.nan, dtype=torch.float64, device=device)
        self._count = torch.zeros((), dtype=torch.long, device=device)
        self._halted = torch.zeros((), dtype=torch.bool, device=device)
        self._verdicts = Delayed(lag)

    def gate(self, step: int, loss: Tensor, bound: Tensor) -> Tensor:
        """Whether the step may be applied, a bool on the device."""
        loss = loss.double()
        median = self._recent.nanquantile(0.5)
        known = self._count >= SPIKE_MIN
        fine = loss.isfinite() & bound.isfinite() & ~(known & (loss > SPIKE_FACTOR * median))
        place = (self._count % SPIKE_WINDOW).unsqueeze(0)
        self._recent.scatter_(0, place, torch.where(fine, loss, self._recent.gather(0, place).squeeze(0)).unsqueeze(0))
        self._count += fine
        gate = fine & ~self._halted
        self._verdicts.put(step, torch.stack([fine.double(), loss, torch.where(known, median, torch.nan)]))
        if self._halts:
            self._halted |= ~fine
        return gate

    def spikes(self, sae: str, *, settle: bool) -> list[Spike]:
        """Those of steps whose verdict is there, or with ``settle`` of all, since the last call."""
        verdicts = self._verdicts.settle() if settle else self._verdicts.ready()
        return [
            Spike(sae, step, loss, None if math.isnan(median) else median)
            for step, (fine, loss, median) in verdicts
            if not fine
        ]

    def recent(self) -> list[float]:
        """The losses that the running median is taken of."""
        ordered = self._recent.roll(-int(self._count) % SPIKE_WINDOW).tolist()
        return [loss for loss in ordered if not math.isnan(loss)]

    def restore(self, recent: list[float]) -> None:
        """Take back what :meth:`recent` gave."""
        self._recent[: len(recent)] = torch.tensor(recent, dtype=torch.float64)
        self._count.fill_(len(recent))
