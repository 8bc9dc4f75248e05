"""SAELens: its own ``SAETrainer.fit``, over prepared activations or over its own activations store."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import cycle, pairwise
from typing import Any

import torch
from datasets import Dataset
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

from benchmarks.cases import MATRYOSHKA_PARTS, Work
from benchmarks.inputs import SEED, VOCABULARY, make_activations, make_token_ids, sequences_per_step

BUFFER_BATCHES = 8
SEQUENCES = 256
LR = 3e-4
HOOK = "hook"


class TimedBatches:
    """Yields batches and records the time of each request, at which a step begins."""

    def __init__(self, batches: Iterator[Tensor]) -> None:
        self._batches = batches
        self.times: list[float] = []

    def __iter__(self) -> TimedBatches:
        return self

    def __next__(self) -> Tensor:
        self.times.append(time.perf_counter())
        return next(self._batches)


class FitRunner:
    """Calls ``fit`` for a number of steps at a time."""

    def __init__(self, trainer: SAETrainer | MultiSAETrainer, provider: TimedBatches, period: int) -> None:
        self._trainer, self._provider, self.period = trainer, provider, period

    def run(self, steps: int) -> list[float]:
        """Run the next ``steps`` training steps and return the seconds of each."""
        config = self._trainer.cfg
        config.total_training_samples = self._trainer.n_training_samples + steps * config.train_batch_size_samples
        self._provider.times = []
        self._trainer.fit()
        times = [*self._provider.times, time.perf_counter()]
        return [after - before for before, after in pairwise(times)]


def build_sae(architecture: str, width: int, latents: int, k: int, **options: Any) -> TrainingSAE[Any]:
    """Build SAELens' SAE of one of our architectures; ``options`` change its configuration."""
    name = {"matryoshka": "matryoshka_batchtopk"}.get(architecture, architecture)
    settings: dict[str, Any] = {} if architecture in ("jumprelu", "standard") else {"k": k}
    if architecture == "jumprelu":
        settings = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": k}
    if architecture == "matryoshka":
        settings["matryoshka_widths"] = [latents // part for part in MATRYOSHKA_PARTS]
    sae_class, config_class = get_sae_training_class(name)
    return sae_class(config_class(d_in=width, d_sae=latents, device="cpu", **settings | options))


def build(work: Work, autocast: bool) -> FitRunner:
    """Build the workload."""
    torch.manual_seed(SEED)
    saes = {
        str(number): build_sae(work.architecture, work.width, latents, k)
        for number, (latents, k) in enumerate(work.sizes)
    }
    # SAELens' runner sets lr_end; without the runner it must be given.
    config = SAETrainerConfig(
        total_training_samples=0,
        train_batch_size_samples=work.tokens,
        lr=LR,
        lr_end=LR / 10,
        device="cpu",
        autocast=autocast,
    )
    if work.kind == "step":
        provider, period = TimedBatches(cycle(make_activations(work))), 1
    else:
        # Half of the buffer is kept for shuffling, so a refill comes after the other half.
        provider, period = TimedBatches(iter(_build_store(work, autocast))), BUFFER_BATCHES // 2
    if not work.grid:
        return FitRunner(SAETrainer(config, saes["0"], provider), provider, period)
    trainer = MultiSAETrainer(config, saes, dict.fromkeys(saes, HOOK), ({HOOK: batch} for batch in provider))
    return FitRunner(trainer, provider, period)


def _build_store(work: Work, autocast: bool) -> ActivationsStore:
    (layer,) = work.layers
    ids = make_token_ids(work, SEQUENCES)
    rows = sequences_per_step(work)
    return ActivationsStore(
        model=_build_model(work),
        dataset=Dataset.from_dict({"input_ids": ids.tolist()}),
        streaming=False,
        hook_name=f"blocks.{layer}.hook_resid_post",
        hook_head_index=None,
        context_size=work.ctx_len,
        d_in=work.width,
        n_batches_in_buffer=BUFFER_BATCHES * rows,
        total_training_tokens=len(ids),
        store_batch_size_prompts=rows,
        train_batch_size_tokens=work.tokens,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        autocast_lm=autocast,
    )


def _build_model(work: Work) -> HookedTransformer:
    assert work.model == "gpt2", "TransformerLens's encoder cannot stop after a layer"
    config = HookedTransformerConfig(
        n_layers=work.blocks,
        d_model=work.width,
        n_ctx=1024,
        d_head=work.width // work.heads,
        n_heads=work.heads,
        d_mlp=4 * work.width,
        d_vocab=VOCABULARY[work.model],
        act_fn="gelu_new",
        normalization_type="LN",
        device="cpu",
        seed=SEED,
    )
    return HookedTransformer(config).eval().requires_grad_(False)
