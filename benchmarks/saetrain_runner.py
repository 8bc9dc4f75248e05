"""saetrain's training step on prepared activations, and its end-to-end training, through its own classes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import Work
from benchmarks.inputs import SEED, STEPS, VOCABULARY, build_transformer, hookpoint_name, make_activations
from saetrain.activations.buffer import ShuffleBuffer
from saetrain.activations.capture import ActivationCapture
from saetrain.activations.extract import ActivationExtractor, Activations
from saetrain.activations.model import BaseModel
from saetrain.activations.normalize import Normalizer, compute_norm_limits, fit_normalizers
from saetrain.coders import CODERS, CoderSettings
from saetrain.data.packing import Sequences
from saetrain.data.sharded import LoaderSettings, ShardedSequences
from saetrain.optim import OptimSettings, resolve_warmup_steps
from saetrain.runs.train.choose_step import build_train_step, choose_kernels
from saetrain.training.dead_latents import DEFAULT_DEAD_BIAS_LIFT, DeadSettings, FiringTracker
from saetrain.training.sae_state import SaeState
from saetrain.training.steps.base import KernelSettings, MicroBatch, StepRequest
from saetrain.training.trainer import SiteBatches, Trainer, TrainSettings
from saetrain.types import Site, TokenKind, TokenSequence

CPU = torch.device("cpu")
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
LOG_EVERY = 10
"""Steps between two reads of the metrics, as in a run."""
BUFFER_BATCHES = 8
"""Size of the shuffle buffer in steps; the other tools' buffers have the same size here."""
SHARDS = 4
CALIBRATION_BATCHES = 2
HOOKPOINT = "activations"


def build_sae_trainer(
    hookpoint: str,
    normalizer: Normalizer,
    settings: CoderSettings,
    kernels: str,
    compute_dtype: str,
    tokens: int,
    *,
    architecture: str = "topk",
    alone: bool = True,
    optim: OptimSettings | None = None,
    steps: int = STEPS,
    seed: int = SEED,
    functions: dict[bool, Callable[[Tensor], Tensor]] | None = None,
) -> SaeState:
    """Build the state of one SAE for a run of ``steps``; ``alone``: the run has one process.

    ``functions`` {whether it gives bf16: function that normalizes}: shared by the SAEs of a hookpoint, as in a run.
    """
    width = len(normalizer.mean)
    coder_class = CODERS[architecture]
    coder = coder_class.build(settings, width, seed=seed)
    optim, dead = optim or OptimSettings(), DeadSettings()
    names: Any = {"kernels": kernels, "compute_dtype": DTYPES.get(compute_dtype, compute_dtype)}
    chosen = choose_kernels(KernelSettings(**names), StepRequest(coder_class, optim, CPU, sae=settings))
    window = dead.resolve_window(steps * tokens, coder.num_latents, coder.expected_l0())
    firing = FiringTracker(coder.num_latents, window, dead.dead_percentage_threshold, CPU)
    lr = coder.recommended_lr(tokens, steps) if optim.lr == "auto" else optim.lr
    assert lr is not None, f"no rule for the learning rate of {architecture}"
    functions, bf16 = {} if functions is None else functions, chosen.compute_dtype == "bfloat16"
    normalize = functions.setdefault(bf16, partial(normalizer, bf16=bf16))
    return SaeState(
        Site.of_sae(hookpoint),
        coder,
        normalize,
        normalize,
        build_train_step(coder, chosen, optim, no_accumulation=alone),
        firing,
        data_variance=normalizer.scaled_variance,
        mse_per_fvu=normalizer.variance / coder.d_in,
        peak_lr=lr,
        seed=seed,
        dead_bias_lr_multiplier=DEFAULT_DEAD_BIAS_LIFT,
    )


def iterate_sae_batches(take: Callable[[int], Mapping[str, Tensor]]) -> Iterator[SiteBatches]:
    """Yield the micro-batches ``take(number)`` of SAEs."""
    for number in count():
        yield {name: MicroBatch.of_sae(x_ND) for name, x_ND in take(number).items()}


class TrainerRunner:
    """Runs training steps on the batches of ``take(number)``, and reads the metrics as a run does."""

    def __init__(
        self, trainer: Trainer, take: Callable[[int], dict[str, Tensor]], period: int, dead_share: float = 0.0
    ) -> None:
        self.period = period
        self._trainer, self._dead_share = trainer, dead_share
        self._batches = iterate_sae_batches(take)

    def run(self, steps: int) -> list[float]:
        """Run the next ``steps`` training steps and return the seconds of each."""
        seconds = []
        for _ in range(steps):
            self._mark_dead()
            start = time.perf_counter()
            self._trainer.train_step(self._batches)
            if self._trainer.step % LOG_EVERY == 0:
                self._trainer.compute_metrics()
            seconds.append(time.perf_counter() - start)
        return seconds

    def _mark_dead(self) -> None:
        """Mark latents that AuxK has revived as dead again, so that every step costs the same."""
        for sae in self._trainer.saes.values():
            dead = round(self._dead_share * sae.coder.num_latents)
            sae.firing.since_fired[:dead] = sae.firing.window_tokens


def build(work: Work, kernels: str, compute_dtype: str, warmup: int = 0) -> TrainerRunner:
    """Build the workload; ``warmup``: steps to run before."""
    dead: dict[str, Any] = {"auxk_alpha": 1 / 32} if work.dead_share else {}
    cls = CODERS[work.architecture].Settings
    settings = [cls(k=k, num_latents=latents, **dead) for latents, k in work.sizes]
    build_runner = _build_step if work.kind == "step" else _build_end_to_end
    runner = build_runner(work, settings, kernels, compute_dtype)
    runner.run(warmup)
    return runner


def _build_trainer(saes: dict[str, SaeState], tokens: int) -> Trainer:
    settings = TrainSettings(max_tokens=STEPS * tokens)
    return Trainer(saes, settings, tokens_per_step=tokens, warmup_steps=resolve_warmup_steps(OptimSettings(), STEPS))


def _build_saes(
    work: Work, hookpoint: str, normalizer: Normalizer, settings: list[CoderSettings], kernels: str, compute_dtype: str
) -> dict[str, SaeState]:
    """Build the SAEs of a hookpoint."""
    functions: dict[bool, Callable[[Tensor], Tensor]] = {}
    return {
        f"{hookpoint}/{number}": build_sae_trainer(
            hookpoint,
            normalizer,
            each,
            kernels,
            compute_dtype,
            work.tokens,
            architecture=work.architecture,
            functions=functions,
            seed=SEED + number,
        )
        for number, each in enumerate(settings)
    }


def _build_step(work: Work, settings: list[CoderSettings], kernels: str, compute_dtype: str) -> TrainerRunner:
    batches = make_activations(work)
    sample = Activations({HOOKPOINT: batches[0]}, np.zeros(work.tokens, dtype=np.int64), 0)
    normalizers = fit_normalizers(sample, {}, [Site.of_sae(HOOKPOINT)])
    saes = _build_saes(work, HOOKPOINT, normalizers[HOOKPOINT], settings, kernels, compute_dtype)
    trainer = _build_trainer(saes, work.tokens)
    return TrainerRunner(trainer, lambda number: {HOOKPOINT: batches[number % len(batches)]}, 1, work.dead_share)


class RandomSequences(Sequences):
    """Sequences of random token ids without padding."""

    def __init__(self, work: Work, count: int) -> None:
        self._work, self._count = work, count
        self.text_tokens = count * work.ctx_len
        self.lengths = np.full(count, work.ctx_len, dtype=np.int64)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> TokenSequence:
        length = self._work.ctx_len
        ids = np.random.default_rng([SEED, index]).integers(1, VOCABULARY[self._work.model], length, dtype=np.int32)
        kind = np.zeros(length, dtype=np.uint8)
        if self._work.model == "gpt2":
            kind[0] = TokenKind.FIRST
        return TokenSequence(ids, kind, np.full(length, index, dtype=np.int64))


def _build_end_to_end(work: Work, settings: list[CoderSettings], kernels: str, compute_dtype: str) -> TrainerRunner:
    names = [hookpoint_name(work, layer) for layer in work.layers]
    causal = work.model == "gpt2"
    source = ShardedSequences(
        RandomSequences(work, STEPS), LoaderSettings(data_shards=SHARDS), True, causal, work.tokens
    )
    # The other tools' models also get this many tokens at once.
    reader = ActivationExtractor(ActivationCapture(build_base_model(work), names), source.keep, work.tokens)
    sample = reader.extract_all(source.read_first_batches(CALIBRATION_BATCHES * work.tokens))
    reader.set_norm_limits(compute_norm_limits(sample))
    normalizers = fit_normalizers(sample, reader.norm_limits, map(Site.of_sae, names))
    saes: dict[str, SaeState] = {}
    for name, normalizer in normalizers.items():
        saes |= _build_saes(work, name, normalizer, settings, kernels, compute_dtype)
    slots_per_shard = BUFFER_BATCHES * work.tokens // SHARDS
    buffer = ShuffleBuffer(reader, source, list(range(SHARDS)), SHARDS, slots_per_shard, SEED)

    def take(number: int) -> dict[str, Tensor]:
        return buffer.take_activations(number * work.tokens, work.tokens, STEPS * work.tokens)

    return TrainerRunner(_build_trainer(saes, work.tokens), take, BUFFER_BATCHES)


def build_base_model(work: Work) -> BaseModel:
    """Build the workload's model, wrapped as saetrain's BaseModel."""
    module: Any = build_transformer(work)
    return BaseModel(
        module=module,
        name=work.model,
        config=module.config,
        causal=work.model == "gpt2",
        max_positions=work.ctx_len,
        device=CPU,
        dtype=module.dtype,
        revision=None,
    )
