"""Placement of SAEs on ranks: a rank trains all SAEs on part of the batch, or some SAEs on the whole batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from saetrain.errors import SaetrainError
from saetrain.settings import Settings

FP32_BYTES = 4
MAX_IMBALANCE = 1.15
"""Largest ratio of a rank's cost to the mean for which an assignment counts as even."""


@dataclass(frozen=True, kw_only=True)
class ParallelSettings(Settings):
    """Several processes: how they share the work."""

    parallel: Literal["auto", "data", "hookpoints"] = "auto"
    """`data`: split the batch over the processes; `hookpoints`: split the SAEs; `auto`: what sends fewer bytes."""


@dataclass(frozen=True)
class SaeCost:
    """Cost of an SAE: its ``parameters``, and the ``widths`` {hookpoint: D} of the activations that it needs."""

    parameters: int
    widths: Mapping[str, int]


@dataclass(frozen=True)
class Placement:
    """Assignment ``owners`` {SAE: rank}, empty if every rank trains all SAEs; ``reason`` is logged."""

    owners: Mapping[str, int] = field(default_factory=dict)
    reason: str = ""

    def is_owned_by(self, sae: str, rank: int) -> bool:
        """Return whether ``rank`` trains the SAE with this name."""
        return not self.owners or self.owners[sae] == rank


def plan_placement(
    settings: ParallelSettings,
    sae_costs: Mapping[str, SaeCost],
    *,
    world_size: int,
    step_tokens: int,
    bytes_per_element: int,
    is_spliced: bool,
) -> Placement:
    """Assign the SAEs of ``sae_costs`` {SAE: cost} to ``world_size`` ranks.

    ``step_tokens``: tokens of the whole optimizer step; ``bytes_per_element``: bytes per element of the activations;
    ``is_spliced``: the loss is that of the model's outputs. Raises SaetrainError if the requested mode is impossible.
    """
    if world_size == 1:
        return Placement()
    if is_spliced:
        if settings.parallel == "hookpoints":
            raise SaetrainError(
                "--parallel hookpoints: --loss_fn ce and kl train one SAE inside the model; use --parallel data"
            )
        return Placement(
            {}, "data parallel: with --loss_fn ce and kl, each process runs the model on its own sequences"
        )
    owners, imbalance = assign_longest_first(sae_costs, world_size)
    remote_share = (world_size - 1) / world_size
    gradient_bytes = 2 * remote_share * FP32_BYTES * sum(cost.parameters for cost in sae_costs.values())
    # A rank receives the activations of a hookpoint once, for all its SAEs.
    received = {(owners[name], *item) for name, cost in sae_costs.items() for item in cost.widths.items()}
    width = sum(each for _, _, each in received)
    activation_bytes = remote_share * step_tokens / world_size * bytes_per_element * width
    activations, gradients = _format_bytes(activation_bytes), _format_bytes(gradient_bytes)
    traffic = f"{activations} of activations, {gradients} of gradients per process and step"
    if settings.parallel != "auto":
        chosen = settings.parallel
        return Placement(owners if chosen == "hookpoints" else {}, f"{chosen} parallel, set by --parallel ({traffic})")
    if imbalance > MAX_IMBALANCE:
        count = f"{len(sae_costs)} SAE{'s' if len(sae_costs) > 1 else ''}"
        return Placement({}, f"data parallel: {count} can't be divided evenly among {world_size} processes ({traffic})")
    if activation_bytes < gradient_bytes:
        return Placement(owners, f"hookpoints parallel: communicates fewer bytes ({traffic})")
    return Placement({}, f"data parallel: communicates fewer bytes ({traffic})")


def assign_longest_first(sae_costs: Mapping[str, SaeCost], world_size: int) -> tuple[dict[str, int], float]:
    """Assign the largest SAE first, each to the rank with the fewest parameters so far.

    Return ({SAE: rank}, parameters of the largest rank over the mean).
    """
    rank_costs = [0] * world_size
    owners = {}
    for name in sorted(sae_costs, key=lambda name: -sae_costs[name].parameters):
        owners[name] = min(range(world_size), key=lambda rank: rank_costs[rank])
        rank_costs[owners[name]] += sae_costs[name].parameters
    return owners, max(rank_costs) * world_size / sum(rank_costs)


def _format_bytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
