"""What several processes of a run have between them, put together where one of them writes it down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saetrain import distributed
from saetrain.errors import SaetrainError
from saetrain.optim import to_memory_order
from saetrain.runs.train.batches import BatchSourceState
from saetrain.runs.train.builders import is_data_parallel, sae_names
from saetrain.runs.train.setup import RunContext
from saetrain.training.loss_spikes import LossSpike
from saetrain.training.trainer import Trainer


def require_equal_on_ranks(values: Mapping[str, Any]) -> None:
    """SaetrainError when a rank has another of one of the named values, which must be the same everywhere."""
    by_rank = distributed.all_gather_json(dict(values), "comparing settings")
    for name, *found in zip(values, *[each.values() for each in by_rank], strict=True):
        for number, value in enumerate(found):
            if value != found[0]:
                raise SaetrainError(
                    f"{name} is {value} on rank {number} and {found[0]} on rank 0; the processes must agree on it"
                )


class RankGather:
    """Gathers over the ranks; with one, it gives back what it is given."""

    def __init__(self, run: RunContext) -> None:
        self.names = sae_names(run)
        self._owners, self._is_data_parallel = run.placement.owners, is_data_parallel(run)

    def gather_entries(self, own: dict[str, Any]) -> dict[str, Any]:
        """Every SAE's entry (of JSON) in the run's order, on every rank."""
        if not self._owners:
            return own
        every = {
            name: value
            for rows in distributed.all_gather_json(own, "gathering figures")
            for name, value in rows.items()
        }
        return {name: every[name] for name in self.names}

    def gather_tensors(self, own: Mapping[str, Mapping[str, Tensor]], what: str) -> dict[str, dict[str, Tensor]]:
        """{SAE: tensors} of all SAEs on rank 0."""
        out = {}
        for name, (hookpoint, _) in self.names.items():
            found = distributed.gather_tensors_to_rank0(self._owners.get(hookpoint, 0), own.get(name, {}), what)
            if found is not None:
                out[name] = found
        return out

    def gather_states(self, own: BatchSourceState) -> BatchSourceState:
        """Where all ranks' shards stand."""
        return {
            shard: row for state in distributed.all_gather_json(own, "gathering shards") for shard, row in state.items()
        }

    def gather_spikes(self, own: list[LossSpike]) -> list[LossSpike]:
        """Those of every rank; where all train the same SAEs, they have the same ones."""
        if not self._owners or not distributed.all_reduce_max([len(own)], "looking for spikes")[0]:
            return own
        facts = distributed.all_gather_json([spike.facts for spike in own], "gathering spikes")
        return [LossSpike.from_facts(each) for rows in facts for each in rows]

    def require_equal_weights(self, trainer: Trainer) -> None:
        """SaetrainError when weights that every step leaves the same on all ranks have drifted apart."""
        if not self._is_data_parallel:
            return
        for name, sae in trainer.saes.items():
            sums = [int(to_memory_order(p.detach()).view(torch.int32).sum()) for p in sae.coder.parameters()]
            maxima = distributed.all_reduce_max([*sums, *(-each for each in sums)], "comparing weights")
            if any(high != -low for high, low in zip(maxima[: len(sums)], maxima[len(sums) :], strict=True)):
                raise SaetrainError(
                    f"{name}: the processes' weights are no longer the same, so nothing is saved; hosts of different "
                    "kinds round differently: use hosts of one kind, or --parallel hookpoints"
                )
