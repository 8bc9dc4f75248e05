"""eai-sparsify: its own ``Trainer.fit``, over a real model or over one that hands out prepared activations."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from sparsify import SparseCoderConfig, TrainConfig, Trainer
from torch import Tensor, nn

from benchmarks.cases import Work
from benchmarks.inputs import STEPS, build_transformer, hookpoint_name, make_activations, make_token_ids

SEQUENCES = 64


class TokenDataset:
    """A data set of as many sequences as the next call of ``fit`` shall train on."""

    def __init__(self, ids: Tensor, count: int) -> None:
        self._ids, self.count = ids, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._ids[index % len(self._ids)]}

    def select(self, rows: range) -> TokenDataset:
        """All of it, since a later ``fit`` gets new sequences rather than the rest of the old ones."""
        return self


class ReplayModel(nn.Module):
    """In the place of a model: its one layer gives the next prepared activations."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.device, self.config = torch.device("cpu"), SimpleNamespace(num_hidden_layers=1)
        self.base_model = SimpleNamespace(named_modules=self.named_modules, get_submodule=self.get_submodule)
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}
        self._batches, self._next = batches, 0

    def forward(self, input_ids: Tensor) -> Tensor:
        """The activations in place of those of ``input_ids``."""
        batch = self._batches[self._next % len(self._batches)]
        self._next += 1
        out: Tensor = self.layer(batch)
        return out


class TimedTrainer(Trainer):
    """Notes the time where it would save, which is right behind the last step of ``fit``."""

    times: list[float]

    def save(self) -> None:
        """Nothing is written while it is timed."""
        self.times.append(time.perf_counter())


class FitRunner:
    """Calls of ``fit`` for some steps each; a step is from one call of the model to the next."""

    period = 1

    def __init__(self, trainer: TimedTrainer, tokens: TokenDataset) -> None:
        self._trainer, self._tokens = trainer, tokens
        trainer.model.register_forward_pre_hook(self._record_time)

    def _record_time(self, *_: Any) -> None:
        self._trainer.times.append(time.perf_counter())

    def run(self, steps: int) -> list[float]:
        """Seconds of each of the next ``steps`` training steps."""
        self._tokens.count = steps * self._trainer.cfg.batch_size
        self._trainer.times = []
        self._trainer.fit()
        times = self._trainer.times
        return [after - before for before, after in pairwise(times)]


def build(work: Work, optimizer: str) -> FitRunner:
    """The work, ready to run."""
    rows = work.tokens // work.ctx_len
    model: Any
    if work.kind == "step":
        model = ReplayModel([batch.view(rows, work.ctx_len, work.width) for batch in make_activations(work)])
        names = ["layer"]
    else:
        model = build_transformer(work)
        names = [hookpoint_name(work, layer) for layer in work.layers]
    config = TrainConfig(
        SparseCoderConfig(num_latents=work.latents, k=work.k),
        batch_size=rows,
        optimizer=optimizer,
        hookpoints=names,
        save_every=10 * STEPS,
        log_to_wandb=False,
    )
    tokens = TokenDataset(make_token_ids(work, SEQUENCES), STEPS * rows)
    return FitRunner(TimedTrainer(config, tokens, model), tokens)
