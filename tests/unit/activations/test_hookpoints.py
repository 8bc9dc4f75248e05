"""Layers and patterns become module names, in the model's own order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoModel

from saetrain.activations.hookpoints import HookpointSettings, find_blocks, resolve_hookpoints
from saetrain.activations.model import BaseModel, ModelSettings, load_model
from saetrain.errors import SaetrainError


def resolve(model: BaseModel, **settings: Any) -> list[str]:
    return resolve_hookpoints(model, HookpointSettings(**settings))


def test_layers_by_number_and_stride(bert: BaseModel, gpt2: BaseModel) -> None:
    assert resolve(bert) == ["encoder.layer.0"]
    assert resolve(bert, layers=(11,)) == ["encoder.layer.11"]
    # Numbers, not names, are sorted: layer 10 comes after layer 2.
    assert resolve(bert, layers=(10, 0, 2)) == ["encoder.layer.0", "encoder.layer.2", "encoder.layer.10"]
    assert resolve(bert, layer_stride=5) == ["encoder.layer.0", "encoder.layer.5", "encoder.layer.10"]
    assert resolve(gpt2, layer_stride=1) == [f"h.{layer}" for layer in range(4)]
    assert resolve(gpt2, layer_stride=99) == ["h.0"]


def test_layers_by_range_and_all(bert: BaseModel, gpt2: BaseModel) -> None:
    assert resolve(gpt2, layers=("all",)) == [f"h.{layer}" for layer in range(4)]
    assert resolve(bert, layers=("8-10", 2)) == [f"encoder.layer.{layer}" for layer in (2, 8, 9, 10)]
    with pytest.raises(SaetrainError, match=r"--layers 4 5: .* has 4 layers, 0 to 3"):
        resolve(gpt2, layers=("2-5",))


def test_names_of_transformerlens_select_the_residual_stream(bert: BaseModel, gpt2: BaseModel) -> None:
    assert resolve(gpt2, hookpoints=("blocks.3.hook_resid_post", "blocks.1.hook_resid_pre")) == ["h.0", "h.3"]
    assert resolve(bert, hookpoints=("layers.2",)) == ["encoder.layer.2"]
    for missing in ("blocks.4.hook_resid_post", "blocks.0.hook_resid_pre", "blocks.0.hook_mlp_out"):
        with pytest.raises(SaetrainError, match=f"--hookpoints {missing}: matches no module"):
            resolve(gpt2, hookpoints=(missing,))


def test_layer_that_the_model_lacks(gpt2: BaseModel) -> None:
    with pytest.raises(SaetrainError, match=r"--layers 4 9: .* has 4 layers, 0 to 3"):
        resolve(gpt2, layers=(4, 0, 9))


def test_patterns_give_each_module_once_in_the_model_s_order(bert: BaseModel, gpt2: BaseModel) -> None:
    assert resolve(gpt2, hookpoints=("h.*.mlp",)) == [f"h.{layer}.mlp" for layer in range(4)]
    assert resolve(gpt2, hookpoints=("h.2", "h.1.att?", "h.[12]")) == ["h.1", "h.1.attn", "h.2"]
    layers = resolve(bert, hookpoints=("encoder.layer.?", "encoder.layer.1?"))
    assert layers == [f"encoder.layer.{layer}" for layer in range(12)]


def test_pattern_without_a_match_names_the_nearest(gpt2: BaseModel) -> None:
    with pytest.raises(SaetrainError, match=r"--hookpoints h\.2\.mlpp: matches no module.* Did you mean h\.2\.mlp or"):
        resolve(gpt2, hookpoints=("h.*", "h.2.mlpp"))
    with pytest.raises(SaetrainError, match=r"matches no module of the model\. Module names look like wte, "):
        resolve(gpt2, hookpoints=("#####",))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"layers": (0,), "hookpoints": ("h.0",)}, "can't be given together"),
        ({"layer_stride": 2, "hookpoints": ("h.0",)}, "can't be given together"),
        ({"layers": (0,), "layer_stride": 2}, "can't be given together"),
        ({"layers": (0, -1)}, "--layers 0 -1: pass one or more numbers from 0"),
        ({"layers": ()}, "one or more"),
        ({"layers": (1, 1)}, "named twice"),
        ({"layers": ("0-3", "2")}, "named twice"),
        ({"layers": ("all", 1)}, "named twice"),
        ({"layers": ("3-1",)}, "smaller number of a range first"),
        ({"layer_stride": 0}, "at least 1"),
        ({"hookpoints": ()}, "one or more patterns"),
    ],
)
def test_settings_that_contradict(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(SaetrainError, match=reason):
        HookpointSettings(**settings)


def tiny(tmp_path: Path, name: str, **sizes: int) -> BaseModel:
    """A model of this configuration class with 3 layers, written and loaded."""
    defaults = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = getattr(transformers, name)(**{**defaults, **sizes}, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    return load_model(str(tmp_path), ModelSettings(device="cpu"))


@pytest.mark.parametrize(
    ("name", "sizes", "blocks"),
    [
        ("BertConfig", {"intermediate_size": 16}, "encoder.layer"),
        ("RobertaConfig", {"intermediate_size": 16}, "encoder.layer"),
        ("DistilBertConfig", {"hidden_dim": 16}, "transformer.layer"),
        ("ModernBertConfig", {"intermediate_size": 16, "cls_token_id": 1, "sep_token_id": 2}, "layers"),
        ("GPT2Config", {}, "h"),
        ("LlamaConfig", {"intermediate_size": 16}, "layers"),
        ("OPTConfig", {"ffn_dim": 16, "word_embed_proj_dim": 16}, "decoder.layers"),
    ],
)
def test_layers_of_architectures_are_found(tmp_path: Path, name: str, sizes: dict[str, int], blocks: str) -> None:
    found, modules = find_blocks(tiny(tmp_path, name, **sizes))
    assert (found, len(modules)) == (blocks, 3)


def test_model_without_a_list_of_layers_is_told_of_hookpoints(tmp_path: Path) -> None:
    # ALBERT runs one layer several times.
    model = tiny(tmp_path, "AlbertConfig", embedding_size=16, intermediate_size=16)
    with pytest.raises(SaetrainError, match=r"layers were not found \(albert\); name modules with --hookpoints"):
        resolve(model)
