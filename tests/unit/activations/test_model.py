"""Models are taken for what they are, and those that cannot serve are refused by name before anything runs."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from saetrain.activations.model import (
    ModelSettings,
    detect_causal,
    hash_model_weights,
    load_config,
    load_model,
    resolve_device,
)
from saetrain.atomic_io import hash_file
from saetrain.errors import SaetrainError


@pytest.fixture
def own_bert(tiny_bert: str, tmp_path: Path) -> Path:
    """A copy of the tiny BERT to break."""
    return Path(shutil.copytree(tiny_bert, tmp_path / "own-bert"))


@pytest.mark.parametrize(
    ("name", "causal"),
    [
        ("BertConfig", False),
        ("RobertaConfig", False),
        ("DistilBertConfig", False),
        ("ModernBertConfig", False),
        ("XLNetConfig", False),
        ("XLMConfig", False),
        ("FlaubertConfig", False),
        ("GPT2Config", True),
        ("LlamaConfig", True),
        ("GPTNeoXConfig", True),
    ],
)
def test_encoders_and_decoders_are_told_apart(name: str, causal: bool) -> None:
    assert detect_causal("x", getattr(transformers, name)()) is causal


def test_a_bert_made_a_decoder_is_causal() -> None:
    assert detect_causal("x", transformers.BertConfig(is_decoder=True))
    assert detect_causal("x", transformers.BertConfig(architectures=["BertLMHeadModel"]))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("T5Config", "'t5' is an encoder-decoder"),
        ("BartConfig", "'bart' is an encoder-decoder"),
        ("ViTConfig", "'vit' does not read text"),
    ],
)
def test_what_takes_no_single_stream_of_tokens_is_refused_by_name(name: str, reason: str, tmp_path: Path) -> None:
    getattr(transformers, name)().save_pretrained(tmp_path)
    # The folder holds no weights: the refusal comes before they are looked for.
    with pytest.raises(SaetrainError, match=reason):
        load_model(str(tmp_path), ModelSettings(device="cpu"))


def test_model_is_frozen_in_eval_mode_and_in_the_dtype_that_is_asked_for(own_bert: Path) -> None:
    AutoModel.from_pretrained(own_bert).half().save_pretrained(own_bert)
    assert json.loads((own_bert / "config.json").read_text())["dtype"] == "float16"
    # The library would take the checkpoint's own dtype, in which a CPU is slow and imprecise.
    for asked, dtype in ((None, torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        model = load_model(str(own_bert), ModelSettings(device="cpu", dtype=asked))  # type: ignore[arg-type]
        assert model.dtype == dtype
        assert {parameter.dtype for parameter in model.module.parameters()} == {dtype}
        assert not model.module.training
        assert not any(parameter.requires_grad for parameter in model.module.parameters())


def test_missing_weights_are_refused(own_bert: Path) -> None:
    file = own_bert / "model.safetensors"
    weights = load_file(file)
    save_file({key: w for key, w in weights.items() if "layer.3." not in key}, file, metadata={"format": "pt"})
    with pytest.raises(SaetrainError, match=r"lack 16 of the weights \(encoder\.layer\.3\."):
        load_model(str(own_bert), ModelSettings(device="cpu"))


def test_a_missing_pooler_is_nothing(own_bert: Path) -> None:
    file = own_bert / "model.safetensors"
    weights = load_file(file)
    save_file({key: w for key, w in weights.items() if "pooler" not in key}, file, metadata={"format": "pt"})
    assert load_model(str(own_bert), ModelSettings(device="cpu")).max_positions == 128


@pytest.mark.parametrize("keep", [0, 7, 0.5])
def test_truncated_weights_are_a_user_error(own_bert: Path, keep: float) -> None:
    file = own_bert / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if keep == 0.5 else int(keep)])
    with pytest.raises(SaetrainError, match=r"own-bert' could not be loaded: .+"):
        load_model(str(own_bert), ModelSettings(device="cpu"))


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model_type": "no-such-model"}'])
def test_broken_configurations_are_user_errors(own_bert: Path, content: str) -> None:
    (own_bert / "config.json").write_text(content)
    with pytest.raises(SaetrainError, match="own-bert"):
        load_model(str(own_bert), ModelSettings(device="cpu"))


def test_empty_folder_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(SaetrainError, match=str(tmp_path)):
        load_model(str(tmp_path), ModelSettings(device="cpu"))


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("gpu", "no such device; use cpu, cuda or cuda:N"),
        ("cuda:99", "this machine has [0-9]+ CUDA devices"),
        ("meta", "only cpu and cuda are supported"),
    ],
)
def test_devices_that_are_not_there(device: str, reason: str) -> None:
    with pytest.raises(SaetrainError, match=f"--device {device}: {reason}"):
        resolve_device(device)


def test_device_by_default_is_one_that_is_there() -> None:
    assert resolve_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["someone/nothing", "bert-base-uncased"])
def test_unknown_model_without_a_network_is_said_within_seconds(hub_cache: Path, name: str) -> None:
    start = time.monotonic()
    with pytest.raises(SaetrainError, match=rf"model '{name}' .*no network"):
        load_model(name, ModelSettings(device="cpu"))
    assert time.monotonic() - start < 15


def test_downloaded_model_needs_no_network(cached_model: str, tiny_bert: str) -> None:
    settings = ModelSettings(device="cpu")
    assert load_config(cached_model, settings).num_hidden_layers == 12
    model, local = load_model(cached_model, settings), load_model(tiny_bert, settings)
    assert (model.revision, local.revision) == ("0123456789" * 4, None)
    assert load_model(cached_model, ModelSettings(device="cpu", revision=model.revision)).revision == model.revision
    assert hash_model_weights(model) == hash_model_weights(local) == hash_file(Path(tiny_bert) / "model.safetensors")
    with pytest.raises(SaetrainError, match="no network"):
        load_model(cached_model, ModelSettings(device="cpu", revision="other"))


def test_a_download_without_its_weights_is_completed_or_refused(cached_model: str, hub_cache: Path) -> None:
    for file in hub_cache.rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(SaetrainError, match="no network"):
        load_model(cached_model, ModelSettings(device="cpu"))


def test_hash_of_weights_in_several_files_depends_on_each(own_bert: Path) -> None:
    model = AutoModel.from_pretrained(own_bert)
    (own_bert / "model.safetensors").unlink()
    model.save_pretrained(own_bert, max_shard_size="1MB")
    assert len(list(own_bert.glob("*.safetensors"))) > 1
    loaded = load_model(str(own_bert), ModelSettings(device="cpu"))
    before = hash_model_weights(loaded)
    last = sorted(own_bert.glob("*.safetensors"))[-1]
    save_file({key: w + 1 for key, w in load_file(last).items()}, last, metadata={"format": "pt"})
    assert len(before or "") == 64
    assert hash_model_weights(loaded) != before


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (transformers.BertConfig, 34),
        (transformers.GPT2Config, 34),
        # Their positions begin behind the padding index, 1.
        (transformers.RobertaConfig, 32),
        (transformers.MPNetConfig, 32),
    ],
)
def test_all_positions_of_a_model_can_be_used_and_no_more(config: type, positions: int, tmp_path: Path) -> None:
    sizes = {"vocab_size": 99, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    settings = config(**sizes, max_position_embeddings=34, pad_token_id=1, bos_token_id=2, eos_token_id=3)
    AutoModel.from_config(settings).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), ModelSettings(device="cpu"))
    assert model.max_positions == positions
    model.module(input_ids=torch.full((1, positions), 7))
    with pytest.raises((IndexError, RuntimeError)):
        model.module(input_ids=torch.full((1, positions + 1), 7))


def test_settings_out_of_range() -> None:
    with pytest.raises(SaetrainError, match="--model_batch_tokens 0"):
        ModelSettings(model_batch_tokens=0)
