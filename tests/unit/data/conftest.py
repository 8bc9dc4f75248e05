"""Tokenizers that the real ones lack: one that sets BOS itself, one with a chat template."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from transformers import AutoTokenizer

CHAT_TEMPLATE = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture
def wordpiece(minilm: str) -> Any:
    """MiniLM's own tokenizer: an encoder's, with CLS and SEP."""
    return AutoTokenizer.from_pretrained(minilm)


@pytest.fixture
def bpe(tiny_gpt2: str) -> Any:
    """A byte-level BPE with `<|endoftext|>` alone, which sets nothing by itself, as GPT-2's."""
    return AutoTokenizer.from_pretrained(tiny_gpt2)


@pytest.fixture
def bos_bpe(bpe: Any) -> Any:
    """The same with `<s>` before every text, as Llama's."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(bpe)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.fixture
def chat_bpe(bos_bpe: Any) -> Any:
    """The same with a chat template that writes BOS, roles and EOS itself."""
    bos_bpe.chat_template = CHAT_TEMPLATE
    bos_bpe.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    return bos_bpe
