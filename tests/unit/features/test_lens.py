"""The lens equals the real final norm and head of each family on the direction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from saetrain.activations.lm_head import HeadKind, LMHeadModel
from saetrain.activations.model import BaseModel
from saetrain.features import lens, weights
from saetrain.features.lens import compute_lens

D, V, F = 16, 50, 13
SIZES = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
Head = Callable[[Any, Tensor], Tensor]
FAMILIES: dict[str, tuple[Any, Any, HeadKind, Head]] = {
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(vocab_size=V, n_embd=D, n_layer=2, n_head=2),
        "causal",
        lambda m, x: m.lm_head(m.transformer.ln_f(x)),
    ),
    "llama": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(**GROUPED),
        "causal",
        lambda m, x: m.lm_head(m.model.norm(x)),
    ),
    "qwen": (
        transformers.Qwen2ForCausalLM,
        transformers.Qwen2Config(**SIZES, num_key_value_heads=1),
        "causal",
        lambda m, x: m.lm_head(m.model.norm(x)),
    ),
    "gemma": (
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config(**GROUPED, final_logit_softcapping=1.0),
        "causal",
        lambda m, x: torch.tanh(m.lm_head(m.model.norm(x))),
    ),
    "neox": (
        transformers.GPTNeoXForCausalLM,
        transformers.GPTNeoXConfig(**SIZES),
        "causal",
        lambda m, x: m.get_output_embeddings()(m.gpt_neox.final_layer_norm(x)),
    ),
    "bert": (transformers.BertForMaskedLM, transformers.BertConfig(**SIZES), "masked", lambda m, x: m.cls(x)),
    "roberta": (
        transformers.RobertaForMaskedLM,
        transformers.RobertaConfig(**SIZES),
        "masked",
        lambda m, x: m.lm_head(x),
    ),
    "distilbert": (
        transformers.DistilBertForMaskedLM,
        transformers.DistilBertConfig(vocab_size=V, dim=D, n_layers=2, n_heads=2, hidden_dim=32),
        "masked",
        lambda m, x: m.vocab_projector(m.vocab_layer_norm(m.activation(m.vocab_transform(x)))),
    ),
    "modernbert": (
        transformers.ModernBertForMaskedLM,
        transformers.ModernBertConfig(**SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1),
        "masked",
        lambda m, x: m.decoder(m.head(m.model.final_norm(x))),
    ),
}


def build_head(family: str) -> LMHeadModel:
    build, config, kind, _ = FAMILIES[family]
    torch.manual_seed(0)
    module: nn.Module = build(config).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            parameter.add_(0.3 * torch.randn(parameter.shape))
        elif "head" in name or "decoder" in name:
            parameter.mul_(5)
    return wrap_module(module, getattr(module, str(module.base_model_prefix)), config, kind)


def wrap_module(module: nn.Module, base: nn.Module, config: Any, kind: HeadKind) -> LMHeadModel:
    model = BaseModel(base, "model", config, kind == "causal", 64, torch.device("cpu"), torch.float32, None)
    return LMHeadModel(module, model, kind, "")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lens_is_the_real_head(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "BLOCK_ENTRIES", 3 * V)
    head, W_dec = build_head(family), 2 * torch.randn(F, D)
    found = compute_lens(head, W_dec, V - 4)
    run = FAMILIES[family][3]
    scaled = D**0.5 * W_dec / W_dec.norm(dim=1, keepdim=True)
    expected = (run(head.module, scaled) - run(head.module, torch.zeros(1, D)))[:, : V - 4]
    assert found.kind == FAMILIES[family][2]
    assert expected.std(dim=0).median() > 1e-3
    check_extremes(found, expected)
    for hook in ("_forward_hooks", "_forward_pre_hooks"):
        assert not any(getattr(module, hook) for module in head.module.modules())


def check_extremes(found: lens.Lens, expected: Tensor) -> None:
    for ids, values, largest in (
        (found.top_ids, found.top_logits, True),
        (found.bottom_ids, found.bottom_logits, False),
    ):
        best = expected.topk(lens.LENS_TOKENS, dim=1, largest=largest).values
        assert torch.allclose(torch.from_numpy(values), best, atol=1e-5)
        assert torch.allclose(expected.gather(1, torch.from_numpy(ids).long()), best, atol=1e-5)


def test_an_encoder_without_a_head_shows_near_embeddings() -> None:
    torch.manual_seed(0)
    module = transformers.BertModel(transformers.BertConfig(**SIZES)).eval().requires_grad_(False)
    W_dec = torch.randn(F, D)
    found = compute_lens(wrap_module(module, module, module.config, "none"), W_dec, V)
    embedding = module.embeddings.word_embeddings.weight
    expected = torch.cosine_similarity(W_dec[:, None], embedding[None], dim=2)
    assert found.kind == "embedding"
    check_extremes(found, expected)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_rows_of_another_width_have_no_lens(family: str) -> None:
    head = build_head(family)
    found = compute_lens(head, torch.randn(F, 2 * D), V)
    assert found.kind == "none"
    assert found.top_ids.shape == (F, 0)
    without = wrap_module(head.base.module, head.base.module, head.base.config, "none")
    assert compute_lens(without, torch.randn(F, 2 * D), V).kind == "none"
