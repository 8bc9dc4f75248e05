"""How several processes share the work: parts of the batch with all SAEs, or all of the batch with some of the SAEs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from saetrain.errors import SaetrainError

FP32_BYTES = 4
MAX_IMBALANCE = 1.15
"""Largest cost of a rank over the mean up to which SAEs count as evenly dealt."""


@dataclass(frozen=True, kw_only=True)
class ParallelSettings:
    """Several processes: how they share the work."""

    parallel: Literal["auto", "data", "hookpoints"] = "auto"
    """`data`: every process trains all SAEs on its part of the batch, and gradients are exchanged; `hookpoints`: each
    trains some of the SAEs on the whole batch, and activations are exchanged; `auto`: what exchanges fewer bytes."""


@dataclass(frozen=True)
class SaeCost:
    """What a hookpoint's SAEs are: ``parameters`` of all its seeds, ``width`` of its activations."""

    parameters: int
    width: int


@dataclass(frozen=True)
class Placement:
    """Who trains what: ``owners`` {hookpoint: rank}, empty where every rank trains all; ``reason`` in words."""

    owners: Mapping[str, int] = field(default_factory=dict)
    reason: str = ""

    def is_owned_by(self, hookpoint: str, rank: int) -> bool:
        """Whether ``rank`` trains the SAEs of ``hookpoint``."""
        return not self.owners or self.owners[hookpoint] == rank


def plan_placement(
    settings: ParallelSettings,
    sae_costs: Mapping[str, SaeCost],
    *,
    world_size: int,
    step_tokens: int,
    bytes_per_element: int,
    is_spliced: bool,
) -> Placement:
    """The division of ``sae_costs`` {hookpoint: what it costs} over ``world_size`` ranks, with the reason.

    ``step_tokens``: of the whole optimizer step; ``bytes_per_element``: bytes of an activation's element; ``is_spliced``: the loss
    is the model's own. Raises SaetrainError where the division that is asked for can't be.
    """
    if world_size == 1:
        return Placement()
    if is_spliced:
        if settings.parallel == "hookpoints":
            raise SaetrainError("--parallel hookpoints: --loss_fn ce and kl train one SAE through the model; use data")
        return Placement({}, "data parallel: the loss is the model's own, so each process runs its own sequences")
    owners, imbalance = assign_longest_first(sae_costs, world_size)
    remote_share = (world_size - 1) / world_size
    gradient_bytes = 2 * remote_share * FP32_BYTES * sum(load.parameters for load in sae_costs.values())
    activation_bytes = (
        remote_share * step_tokens / world_size * bytes_per_element * sum(load.width for load in sae_costs.values())
    )
    traffic = f"{_format_bytes(activation_bytes)} of activations, {_format_bytes(gradient_bytes)} of gradients per process and step"
    if settings.parallel != "auto":
        chosen = settings.parallel
        return Placement(owners if chosen == "hookpoints" else {}, f"{chosen} parallel, as --parallel says ({traffic})")
    if imbalance > MAX_IMBALANCE:
        count = f"{len(sae_costs)} hookpoint{'s' if len(sae_costs) > 1 else ''}"
        return Placement({}, f"data parallel: {count} can't be dealt evenly to {world_size} processes ({traffic})")
    if activation_bytes < gradient_bytes:
        return Placement(owners, f"hookpoints parallel: that exchanges less ({traffic})")
    return Placement({}, f"data parallel: that exchanges less ({traffic})")


def assign_longest_first(sae_costs: Mapping[str, SaeCost], world_size: int) -> tuple[dict[str, int], float]:
    """({hookpoint: rank}, the costliest rank over the mean): the largest first, each to the rank with least so far."""
    rank_costs = [0] * world_size
    owners = {}
    for name in sorted(sae_costs, key=lambda name: -sae_costs[name].parameters):
        owners[name] = min(range(world_size), key=lambda number: rank_costs[number])
        rank_costs[owners[name]] += sae_costs[name].parameters
    return owners, max(rank_costs) * world_size / sum(rank_costs)


def _format_bytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
