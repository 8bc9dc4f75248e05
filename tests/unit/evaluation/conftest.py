"""Models that are sure of themselves, so that a splice shows in their loss, and sequences of real text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from saetrain.activations.lm_head import LMHeadModel, load_model_with_head
from saetrain.activations.model import ModelSettings
from saetrain.types import TokenKind, TokenSequence

CPU = ModelSettings(device="cpu")


def sharpened(auto_class: Any, source: str, folder: Path) -> str:
    """The model in ``source`` with embeddings and weights so large that its predictions differ between tokens."""
    from transformers import AutoTokenizer

    model = auto_class.from_pretrained(source)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(8 if "embed" in name or "wte" in name or "wpe" in name else 3)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def sure_gpt2(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: str) -> str:
    """Folder of the small GPT-2, sharpened."""
    from transformers import AutoModelForCausalLM

    return sharpened(AutoModelForCausalLM, tiny_gpt2, tmp_path_factory.mktemp("models") / "sure-gpt2")


@pytest.fixture(scope="session")
def sure_mlm(tmp_path_factory: pytest.TempPathFactory, tiny_mlm: str) -> str:
    """Folder of the small BERT with its masked-LM head, sharpened."""
    from transformers import AutoModelForMaskedLM

    return sharpened(AutoModelForMaskedLM, tiny_mlm, tmp_path_factory.mktemp("models") / "sure-mlm")


@pytest.fixture(scope="session")
def gpt2_head(sure_gpt2: str) -> LMHeadModel:
    return load_model_with_head(sure_gpt2, CPU)


@pytest.fixture(scope="session")
def mlm_head(sure_mlm: str) -> LMHeadModel:
    return load_model_with_head(sure_mlm, CPU)


@pytest.fixture(scope="session")
def encoder_head(minilm: str) -> LMHeadModel:
    """MiniLM, a trained sentence encoder that predicts nothing."""
    return load_model_with_head(minilm, CPU)


@pytest.fixture(scope="session")
def packed(sure_gpt2: str, topics: list[str]) -> list[TokenSequence]:
    """Windows for a causal model, of unlike lengths, two documents in most with a special token between them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sure_gpt2)
    out = []
    for number, (first, second) in enumerate([(30, 20), (7, 0), (25, 40), (64, 12), (3, 5), (40, 41), (1, 0)]):
        a, b = (tokenizer(topics[2 * number + side])["input_ids"] for side in (0, 1))
        ids = [*a[:first], tokenizer.eos_token_id, *b[:second]] if second else a[:first]
        kind = np.zeros(len(ids), dtype=np.uint8)
        if second:
            kind[first] = TokenKind.SPECIAL
        kind[0] |= np.uint8(TokenKind.FIRST)
        docs = np.array([2 * number] * min(first + 1, len(ids)) + [2 * number + 1] * second, dtype=np.int64)
        out.append(TokenSequence(np.array(ids, dtype=np.int32), kind, docs))
    return out


@pytest.fixture(scope="session")
def single(small_wordpiece: Any, topics: list[str]) -> list[TokenSequence]:
    """Sequences for an encoder, of unlike lengths, [CLS] and [SEP] around each; two of them of one document."""
    out = []
    for number, length in enumerate([40, 9, 100, 64, 20, 77, 2]):
        ids = small_wordpiece(topics[number], truncation=True, max_length=length)["input_ids"]
        kind = np.zeros(len(ids), dtype=np.uint8)
        kind[[0, -1]] = TokenKind.SPECIAL
        docs = np.full(len(ids), max(number, 1), dtype=np.int64)
        out.append(TokenSequence(np.array(ids, dtype=np.int32), kind, docs))
    return out


@pytest.fixture(scope="session")
def activations() -> Callable[[LMHeadModel, list[TokenSequence], str], torch.Tensor]:
    """Takes a module's output on each sequence alone, (n, D) over all their tokens, without the package's capture."""

    def run(head: LMHeadModel, sequences: list[TokenSequence], hookpoint: str) -> torch.Tensor:
        rows: list[torch.Tensor] = []

        def hook(module: Any, inputs: Any, output: Any) -> None:
            rows.append((output[0] if isinstance(output, tuple) else output)[0].detach().clone())

        handle = dict(head.base.module.named_modules())[hookpoint].register_forward_hook(hook)
        with torch.no_grad():
            for sequence in sequences:
                head.base.module(torch.from_numpy(sequence.ids.astype(np.int64))[None])
        handle.remove()
        return torch.cat(rows)

    return run
