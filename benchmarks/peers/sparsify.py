"""eai-sparsify: its own ``Trainer.fit``, over a real model or over one that returns prepared activations."""

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
    """A data set with as many sequences as the next call of ``fit`` trains on."""

    def __init__(self, ids: Tensor, count: int) -> None:
        self._ids, self.count = ids, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._ids[index % len(self._ids)]}

    def select(self, rows: range) -> TokenDataset:
        """Return all sequences, because each call of ``fit`` starts with new ones."""
        return self


class ReplayModel(nn.Module):
    """Replaces a model: its only layer returns the next prepared activations."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.device, self.config = torch.device("cpu"), SimpleNamespace(num_hidden_layers=1)
        self.base_model = SimpleNamespace(named_modules=self.named_modules, get_submodule=self.get_submodule)
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}
        self._batches, self._next = batches, 0

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the next prepared activations and ignore ``input_ids``."""
        batch = self._batches[self._next % len(self._batches)]
        self._next += 1
        out: Tensor = self.layer(batch)
        return out


class TimedTrainer(Trainer):
    """Records the time at which it would save, which is right after the last step of ``fit``."""

    times: list[float]

    def save(self) -> None:
        """Record the time and write nothing."""
        self.times.append(time.perf_counter())


class FitRunner:
    """Calls ``fit`` for a number of steps at a time; a step lasts from one call of the model to the next."""

    period = 1

    def __init__(self, trainer: TimedTrainer, tokens: TokenDataset) -> None:
        self._trainer, self._tokens = trainer, tokens
        trainer.model.register_forward_pre_hook(self._record_time)

    def _record_time(self, *_: Any) -> None:
        self._trainer.times.append(time.perf_counter())

    def run(self, steps: int) -> list[float]:
        """Run the next ``steps`` training steps and return the seconds of each."""
        self._tokens.count = steps * self._trainer.cfg.batch_size
        self._trainer.times = []
        self._trainer.fit()
        times = self._trainer.times
        return [after - before for before, after in pairwise(times)]


def build(work: Work, optimizer: str) -> FitRunner:
    """Build the workload."""
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
