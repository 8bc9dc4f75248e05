"""The head that a checkpoint was saved with is found, or known to be missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from saetrain.activations.lm_head import classify_head, load_model_with_head
from saetrain.activations.model import ModelSettings, detect_causal, load_model
from saetrain.errors import SaetrainError

CPU = ModelSettings(device="cpu")
SMALL: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32,
}  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "config", "kind"),
    [
        ("GPT2LMHeadModel", "GPT2Config", "causal"),
        ("LlamaForCausalLM", "LlamaConfig", "causal"),
        ("GPTNeoXForCausalLM", "GPTNeoXConfig", "causal"),
        ("Gemma2ForCausalLM", "Gemma2Config", "causal"),
        ("OwnForCausalLM", "LlamaConfig", "causal"),
        ("BertForMaskedLM", "BertConfig", "masked"),
        ("BertForPreTraining", "BertConfig", "masked"),
        ("RobertaForMaskedLM", "RobertaConfig", "masked"),
        ("DistilBertForMaskedLM", "DistilBertConfig", "masked"),
        ("ModernBertForMaskedLM", "ModernBertConfig", "masked"),
        ("ElectraForMaskedLM", "ElectraConfig", "masked"),
        ("AlbertForPreTraining", "AlbertConfig", "masked"),
        ("ElectraForPreTraining", "ElectraConfig", "none"),
        ("FunnelForPreTraining", "FunnelConfig", "none"),
        ("SplinterForPreTraining", "SplinterConfig", "none"),
        ("BertModel", "BertConfig", "none"),
        ("BertForSequenceClassification", "BertConfig", "none"),
        ("GPT2Model", "GPT2Config", "none"),
        ("GPT2ForSequenceClassification", "GPT2Config", "none"),
        ("XLNetLMHeadModel", "XLNetConfig", "none"),
        ("XLMWithLMHeadModel", "XLMConfig", "none"),
        ("FlaubertWithLMHeadModel", "FlaubertConfig", "none"),
        ("", "BertConfig", "none"),
    ],
)
def test_heads_by_architecture(architecture: str, config: str, kind: str) -> None:
    made = getattr(transformers, config)(architectures=[architecture] if architecture else None)
    assert classify_head(architecture, detect_causal("x", made)) == kind


def saved(folder: Path, cls: str, config: str, **options: Any) -> str:
    torch.manual_seed(0)
    settings = getattr(transformers, config)(**SMALL, **options)
    getattr(transformers, cls)(settings).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("cls", "config", "kind", "block"),
    [
        ("LlamaForCausalLM", "LlamaConfig", "causal", "layers.1"),
        ("GPTNeoXForCausalLM", "GPTNeoXConfig", "causal", "layers.1"),
        ("BertForMaskedLM", "BertConfig", "masked", "encoder.layer.1"),
        ("BertForPreTraining", "BertConfig", "masked", "encoder.layer.1"),
        ("RobertaForMaskedLM", "RobertaConfig", "masked", "encoder.layer.1"),
        ("ElectraForPreTraining", "ElectraConfig", "none", "encoder.layer.1"),
        ("BertForSequenceClassification", "BertConfig", "none", "encoder.layer.1"),
    ],
)
def test_the_base_is_the_model_without_its_head(tmp_path: Path, cls: str, config: str, kind: str, block: str) -> None:
    """Hookpoints name the same modules in both, and these compute the same."""
    name = saved(tmp_path, cls, config)
    head, alone = load_model_with_head(name, CPU), load_model(name, CPU)
    assert head.kind == kind
    assert head.base.causal == (kind == "causal")
    ids = torch.randint(5, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    found = {}
    for which, base in (("head", head.base), ("alone", alone)):
        module = base.module.get_submodule(block)
        module.register_forward_hook(
            lambda module, inputs, output, which=which: found.__setitem__(
                which, output[0] if isinstance(output, tuple) else output
            )
        )
    torch.testing.assert_close(head.compute_final_hidden(ids, mask), alone.module(ids, attention_mask=mask)[0])
    torch.testing.assert_close(found["head"], found["alone"])
    if kind != "none":
        own = getattr(transformers, cls).from_pretrained(name).eval()(ids, attention_mask=mask)
        theirs = own.prediction_logits if "prediction_logits" in own else own.logits
        torch.testing.assert_close(head.compute_logits(ids, mask), theirs)
    assert not any(parameter.requires_grad for parameter in head.module.parameters())
    assert not head.module.training


def rename(folder: Path, architecture: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = [architecture]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("cls", "config", "claimed", "lacking"),
    [
        ("BertModel", "BertConfig", "BertForMaskedLM", "cls.predictions"),
        ("BertModel", "BertConfig", "BertForPreTraining", "cls.predictions"),
        ("LlamaModel", "LlamaConfig", "LlamaForCausalLM", "lm_head.weight"),
    ],
)
def test_a_head_whose_weights_are_missing_is_refused(
    tmp_path: Path, cls: str, config: str, claimed: str, lacking: str
) -> None:
    name = saved(tmp_path, cls, config)
    assert load_model_with_head(name, CPU).kind == "none", "of what it says it is, it is whole"
    rename(tmp_path, claimed)
    with pytest.raises(SaetrainError, match=rf"its files lack \d+ of the weights \({lacking}"):
        load_model_with_head(name, CPU)


def test_a_head_that_is_tied_to_the_embeddings_is_not_missing(tmp_path: Path, tiny_gpt2: str) -> None:
    folder = Path(shutil.copytree(tiny_gpt2, tmp_path / "copy"))
    head = load_model_with_head(str(folder), CPU)
    assert head.kind == "causal"
    module: Any = head.module
    assert module.lm_head.weight is module.transformer.wte.weight
