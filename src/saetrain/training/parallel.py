"""How several processes share the work: parts of the batch with all SAEs, or all of the batch with some of the SAEs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from saetrain.errors import SaetrainError

FLOAT = 4
UNEVEN = 1.15
"""Largest cost of a rank over the mean up to which SAEs count as evenly dealt."""


@dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """Several processes: how they share the work."""

    parallel: Literal["auto", "data", "hookpoints"] = "auto"
    """`data`: every process trains all SAEs on its part of the batch, and gradients are exchanged; `hookpoints`: each
    trains some of the SAEs on the whole batch, and activations are exchanged; `auto`: what exchanges fewer bytes."""


@dataclass(frozen=True)
class Load:
    """What a hookpoint's SAEs are: ``parameters`` of all its seeds, ``width`` of its activations."""

    parameters: int
    width: int


@dataclass(frozen=True)
class Division:
    """Who trains what: ``owners`` {hookpoint: rank}, empty where every rank trains all; ``reason`` in words."""

    owners: Mapping[str, int] = field(default_factory=dict)
    reason: str = ""

    def owned(self, hookpoint: str, rank: int) -> bool:
        """Whether ``rank`` trains the SAEs of ``hookpoint``."""
        return not self.owners or self.owners[hookpoint] == rank


def divide(
    settings: ParallelSettings, loads: Mapping[str, Load], *, world: int, step_tokens: int, itemsize: int, spliced: bool
) -> Division:
    """The division of ``loads`` {hookpoint: what it costs} over ``world`` ranks, with the reason.

    ``step_tokens``: of the whole optimizer step; ``itemsize``: bytes of an activation's element; ``spliced``: the loss
    is the model's own. Raises SaetrainError where the division that is asked for can't be.
    """
    if world == 1:
        return Division()
    if spliced:
        if settings.parallel == "hookpoints":
            raise SaetrainError("--parallel hookpoints: --loss_fn ce and kl train one SAE through the model; use data")
        return Division({}, "data parallel: the loss is the model's own, so each process runs its own sequences")
    owners, uneven = deal(loads, world)
    share = (world - 1) / world
    gradients = 2 * share * FLOAT * sum(load.parameters for load in loads.values())
    activations = share * step_tokens / world * itemsize * sum(load.width for load in loads.values())
    bytes_ = f"{_mb(activations)} of activations, {_mb(gradients)} of gradients per process and step"
    if settings.parallel != "auto":
        chosen = settings.parallel
        return Division(owners if chosen == "hookpoints" else {}, f"{chosen} parallel, as --parallel says ({bytes_})")
    if uneven > UNEVEN:
        count = f"{len(loads)} hookpoint{'s' if len(loads) > 1 else ''}"
        return Division({}, f"data parallel: {count} can't be dealt evenly to {world} processes ({bytes_})")
    if activations < gradients:
        return Division(owners, f"hookpoints parallel: that exchanges less ({bytes_})")
    return Division({}, f"data parallel: that exchanges less ({bytes_})")


def deal(loads: Mapping[str, Load], world: int) -> tuple[dict[str, int], float]:
    """({hookpoint: rank}, the costliest rank over the mean): the largest first, each to the rank with least so far."""
    costs = [0] * world
    owners = {}
    for name in sorted(loads, key=lambda name: -loads[name].parameters):
        owners[name] = min(range(world), key=lambda number: costs[number])
        costs[owners[name]] += loads[name].parameters
    return owners, max(costs) * world / sum(costs)


def _mb(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
