"""Inputs that all tools share: structured activations, token ids, and models with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Work

SEED = 1234
BATCHES = 4
DIRECTIONS = 4096
ACTIVE = 24
NOISE = 0.1
VOCABULARY = {"bert": 30522, "gpt2": 50257}
STEPS = 100_000
"""Total steps that each trainer is configured for, so that no schedule ends during the measurement."""


def make_activations(work: Work) -> list[Tensor]:
    """Make BATCHES batches (N, D): sparse mixtures of fixed unit directions, plus a common mean and noise."""
    generator = torch.Generator().manual_seed(SEED)
    directions = torch.randn(DIRECTIONS, work.width, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    mean = torch.randn(work.width, generator=generator)
    batches = []
    for _ in range(BATCHES):
        # Squaring makes some directions far more frequent than others, as features of real data are.
        chosen = (torch.rand(work.tokens, ACTIVE, generator=generator).square() * DIRECTIONS).long()
        strength = torch.rand(work.tokens, ACTIVE, generator=generator) * 4
        signal = torch.nn.functional.embedding_bag(chosen, directions, per_sample_weights=strength, mode="sum")
        batches.append(signal + mean + NOISE * torch.randn(work.tokens, work.width, generator=generator))
    return batches


def make_token_ids(work: Work, sequences: int) -> Tensor:
    """Make random token ids (sequences, ctx_len); their values do not affect the time."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(1, VOCABULARY[work.model], (sequences, work.ctx_len), generator=generator)


def sequences_per_step(work: Work) -> int:
    """Number of sequences whose tokens make up one step."""
    rows = work.tokens // work.ctx_len
    assert rows * work.ctx_len == work.tokens, work
    return rows


def build_transformer(work: Work, head: bool = False) -> Any:
    """Build a transformers model of these sizes, frozen and in eval mode; ``head`` adds a language-model head."""
    import transformers

    torch.manual_seed(SEED)
    module: torch.nn.Module
    if work.model == "bert":
        config = transformers.BertConfig(
            hidden_size=work.width,
            num_hidden_layers=work.blocks,
            num_attention_heads=work.heads,
            intermediate_size=4 * work.width,
            max_position_embeddings=work.ctx_len,
        )
        module = transformers.BertModel(config)
    else:
        gpt2 = transformers.GPT2Config(n_embd=work.width, n_layer=work.blocks, n_head=work.heads)
        module = transformers.GPT2LMHeadModel(gpt2) if head else transformers.GPT2Model(gpt2)
    dtype = torch.bfloat16 if work.model_dtype == "bf16" else torch.float32
    return module.to(dtype).eval().requires_grad_(False)


def hookpoint_name(work: Work, layer: int) -> str:
    """Name of the block's module in :func:`build_transformer` without a head."""
    return f"encoder.layer.{layer}" if work.model == "bert" else f"h.{layer}"
