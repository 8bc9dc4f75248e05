"""Real activations for all tests of this folder."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def activations(minilm: str, topics: list[str]) -> Tensor:
    """Activations of layer 3 of MiniLM on real text, (N, 384)."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm)
    batch = tokenizer(topics[:40], return_tensors="pt", truncation=True, max_length=64, padding=True)
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states[4]
    values: Tensor = hidden[batch["attention_mask"].bool()]
    return values
