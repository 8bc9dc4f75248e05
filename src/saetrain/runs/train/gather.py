"""Gather results and states from the ranks of a run, and check that the ranks agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saetrain import distributed
from saetrain.errors import SaetrainError
from saetrain.optim import to_memory_order
from saetrain.runs.train.batches import BatchSourceState
from saetrain.runs.train.setup import RunContext
from saetrain.training.loss_spikes import LossSpike
from saetrain.training.trainer import Trainer


def require_equal_on_ranks(values: Mapping[str, Any]) -> None:
    """Raise SaetrainError if one of the named values differs between the ranks."""
    by_rank = distributed.all_gather_json(dict(values), "comparing settings")
    # Ranks with other architectures have other settings. The name of the architecture precedes them.
    for name in dict.fromkeys(name for each in by_rank for name in each):
        first, *others = ((name in each, each.get(name, "absent")) for each in by_rank)
        for number, found in enumerate(others, 1):
            if found != first:
                raise SaetrainError(
                    f"{name} is {found[1]} on rank {number} and {first[1]} on rank 0; the processes must agree on it"
                )


class RankGather:
    """Gathers values from all ranks; with one process, the results are its own values."""

    def __init__(self, run: RunContext) -> None:
        self.names, self._owners = list(run.plans), run.resolved.placement.owners
        self._is_data_parallel = run.resolved.is_data_parallel

    def gather_entries(self, own: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON entries of all SAEs in the run's order, on every rank."""
        if not self._owners:
            return own
        every = {
            name: value
            for rows in distributed.all_gather_json(own, "gathering metrics")
            for name, value in rows.items()
        }
        return {name: every[name] for name in self.names if name in every}

    def gather_tensors(self, own: Mapping[str, Mapping[str, Tensor]], what: str) -> dict[str, dict[str, Tensor]]:
        """Return {SAE: tensors} of all SAEs on rank 0, and {} on the other ranks."""
        out = {}
        for name in self.names:
            found = distributed.gather_tensors_to_rank0(self._owners.get(name, 0), own.get(name, {}), what)
            if found is not None:
                out[name] = found
        return out

    def gather_states(self, own: BatchSourceState) -> BatchSourceState:
        """Return the states of all ranks' shards."""
        return {
            shard: row for state in distributed.all_gather_json(own, "gathering shards") for shard, row in state.items()
        }

    def gather_spikes(self, own: list[LossSpike]) -> list[LossSpike]:
        """Return the loss spikes of all ranks; ranks that train the same SAEs have the same spikes."""
        if not self._owners or not distributed.all_reduce_max([len(own)], "checking for loss spikes")[0]:
            return own
        facts = distributed.all_gather_json([spike.facts for spike in own], "gathering loss spikes")
        return [LossSpike.from_facts(each) for rows in facts for each in rows]

    def require_equal_weights(self, trainer: Trainer) -> None:
        """Raise SaetrainError if the weights of data-parallel ranks differ, although every step keeps them equal."""
        if not self._is_data_parallel:
            return
        for name, sae in trainer.saes.items():
            sums = [int(to_memory_order(p.detach()).view(torch.int32).sum()) for p in sae.coder.parameters()]
            maxima = distributed.all_reduce_max([*sums, *(-each for each in sums)], "comparing weights")
            if any(high != -low for high, low in zip(maxima[: len(sums)], maxima[len(sums) :], strict=True)):
                raise SaetrainError(
                    f"{name}: the weights differ between the processes, so no checkpoint is saved; different hardware "
                    "rounds differently: use hosts of one kind, or pass --parallel hookpoints"
                )
