"""A masked language model that knows the facts of a small language, for tests that need meaningful predictions.

It is trained within a minute on one core.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

CAPITALS = {
    "france": "paris",
    "italy": "rome",
    "spain": "madrid",
    "japan": "tokyo",
    "egypt": "cairo",
    "peru": "lima",
    "cuba": "havana",
    "kenya": "nairobi",
    "norway": "oslo",
    "austria": "vienna",
}
TEMPLATES = (
    "the capital of {} is {} .",
    "{1} is the capital of {0} .",
    "we went to {} and saw {} .",
    "in {} people like {} .",
    "{1} is in {0} .",
)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
STEPS, BATCH, MASKED_SHARE = 500, 64, 0.25


def write_sentences() -> list[str]:
    """Return all sentences of the language, which name a country and its capital."""
    return [template.format(*pair) for template, pair in itertools.product(TEMPLATES, CAPITALS.items())]


def build_tokenizer(sentences: list[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word."""
    words = sorted({word for sentence in sentences for word in sentence.split()})
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate([*SPECIAL, *words])}, "[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=32, **dict(zip(names, SPECIAL, strict=True))
    )


def train_masked_lm(folder: Path) -> tuple[str, str]:
    """Train the model, and return (its folder, a jsonl file with its sentences in random order)."""
    torch.manual_seed(0)
    sentences = write_sentences()
    tokenizer = build_tokenizer(sentences)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=32,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )
    model = BertForMaskedLM(config)
    encoded = tokenizer(sentences, padding=True, return_tensors="pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(sentences), (BATCH,))
        ids, mask = encoded["input_ids"][rows], encoded["attention_mask"][rows]
        chosen = (torch.rand(ids.shape) < MASKED_SHARE) & (ids >= len(SPECIAL))
        if not chosen.any():
            continue
        masked = ids.masked_fill(chosen, tokenizer.mask_token_id)
        loss = model(masked, attention_mask=mask, labels=ids.masked_fill(~chosen, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder / "mlm")
    tokenizer.save_pretrained(folder / "mlm")
    order = [sentences[i] for _ in range(40) for i in torch.randperm(len(sentences)).tolist()]
    text = folder / "sentences.jsonl"
    text.write_text(
        "".join(
            json.dumps({"text": f"{sentence} {other}"}) + "\n"
            for sentence, other in zip(order[::2], order[1::2], strict=True)
        )
    )
    return str(folder / "mlm"), str(text)
