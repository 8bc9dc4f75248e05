"""Loaded models, and sequences that need no tokenizer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from saetrain.activations.model import BaseModel, ModelSettings, load_model
from saetrain.types import TokenKind, TokenSequence

CPU = ModelSettings(device="cpu")


@pytest.fixture(scope="session")
def bert(tiny_bert: str) -> BaseModel:
    """BERT of 12 layers with random weights."""
    return load_model(tiny_bert, CPU)


@pytest.fixture(scope="session")
def gpt2(tiny_gpt2: str) -> BaseModel:
    """GPT-2 of 4 layers with random weights."""
    return load_model(tiny_gpt2, CPU)


@pytest.fixture
def sequences() -> Callable[..., list[TokenSequence]]:
    """Makes sequences of random ids with these lengths, a special token at both ends; sequence i is of row i."""

    def make(*lengths: int, seed: int = 0, causal: bool = False) -> list[TokenSequence]:
        rng = np.random.default_rng(seed)
        out = []
        for doc, length in enumerate(lengths):
            kind = np.zeros(length, dtype=np.uint8)
            kind[[0, -1]] = TokenKind.SPECIAL
            if causal:
                kind[0] |= np.uint8(TokenKind.FIRST)
            ids = rng.integers(5, 900, length).astype(np.int32)
            out.append(TokenSequence(ids, kind, np.full(length, doc, dtype=np.int64)))
        return out

    return make
