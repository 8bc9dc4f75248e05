"""dictionary_learning: its own ``TopKTrainer.update``, over prepared activations or over its nnsight buffer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import cycle, pairwise
from typing import Any

import torch
from dictionary_learning.buffer import ActivationBuffer
from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
from dictionary_learning.trainers.standard import StandardTrainer
from dictionary_learning.trainers.top_k import TopKTrainer
from dictionary_learning.trainers.trainer import SAETrainer
from nnsight import LanguageModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.cases import MATRYOSHKA_PARTS, Work
from benchmarks.inputs import (
    SEED,
    STEPS,
    VOCABULARY,
    build_transformer,
    make_activations,
    make_token_ids,
    sequences_per_step,
)

BUFFER_BATCHES = 8
PERIOD = 5
"""Steps between two refills of a buffer of 8 batches, which is refilled once less than half of it is unread."""
SEQUENCES = 256


class UpdateRunner:
    """Takes a batch and updates the trainer, as a step of ``trainSAE`` does."""

    def __init__(self, trainer: SAETrainer, batches: Iterator[Tensor], period: int) -> None:
        self._trainer, self._batches, self.period = trainer, batches, period
        self._step = 0

    def run(self, steps: int) -> list[float]:
        """Run the next ``steps`` training steps and return the seconds of each."""
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            self._trainer.update(self._step, next(self._batches))
            self._step += 1
            seconds.append(time.perf_counter() - start)
        return seconds


TRAINERS: dict[str, type[SAETrainer]] = {
    "topk": TopKTrainer,
    "batchtopk": BatchTopKTrainer,
    "matryoshka": MatryoshkaBatchTopKTrainer,
    "jumprelu": JumpReluTrainer,
    "standard": StandardTrainer,
}


def build_trainer(
    architecture: str, width: int, latents: int, k: int, *, steps: int, seed: int, **options: Any
) -> SAETrainer:
    """Build the trainer of one of our architectures; ``options`` change its defaults."""
    sparsity: dict[str, Any] = {"k": k}
    if architecture == "matryoshka":
        shares = [0.0, *(1 / part for part in MATRYOSHKA_PARTS)]
        sparsity["group_fractions"] = [stop - start for start, stop in pairwise(shares)]
    if architecture == "jumprelu":
        sparsity = {"target_l0": k}
    if architecture == "standard":
        sparsity = {}
    return TRAINERS[architecture](
        steps=steps,
        activation_dim=width,
        dict_size=latents,
        layer=0,
        lm_name="prepared activations",
        seed=seed,
        device="cpu",
        **sparsity | options,
    )


def build(work: Work) -> UpdateRunner:
    """Build the workload."""
    trainer = build_trainer(work.architecture, work.width, work.latents, work.k, steps=STEPS, seed=SEED)
    if work.kind == "step":
        return UpdateRunner(trainer, cycle(make_activations(work)), 1)
    return UpdateRunner(trainer, _build_buffer(work), PERIOD)


def _build_buffer(work: Work) -> ActivationBuffer:
    assert work.model == "gpt2", "the buffer asks a block for `.output`, which in a BERT block is a module of its own"
    (layer,) = work.layers
    rows = sequences_per_step(work)
    # The buffer takes text, so each id becomes a word, which a whole-word tokenizer turns back into the id.
    words = {f"w{number}": number for number in range(VOCABULARY[work.model])}
    backend = Tokenizer(WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", unk_token="w0")
    texts = [" ".join(f"w{number}" for number in row.tolist()) for row in make_token_ids(work, SEQUENCES)]
    module = build_transformer(work, head=True)
    model = LanguageModel(module, tokenizer=tokenizer)
    return ActivationBuffer(
        cycle(texts),
        model,
        model.transformer.h[layer],
        d_submodule=work.width,
        n_ctxs=BUFFER_BATCHES * rows,
        ctx_len=work.ctx_len,
        refresh_batch_size=rows,
        out_batch_size=work.tokens,
        device=torch.device("cpu"),
    )
