"""Language model head: loads a model with the head that its checkpoint was saved with, to compute its loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saetrain.activations.model import (
    BaseModel,
    ModelSettings,
    build_base_model,
    detect_causal,
    load_config,
    load_module,
)

HeadKind = Literal["causal", "masked", "none"]

PRETRAINED_WITHOUT_LM_HEAD = {"ElectraForPreTraining", "FunnelForPreTraining", "SplinterForPreTraining"}
"""Architectures that were pre-trained to detect replaced tokens or to find spans, so their head predicts no tokens."""
AMBIGUOUS_HEADS = {"FlaubertWithLMHeadModel", "XLMWithLMHeadModel", "XLNetLMHeadModel"}
"""Architectures whose head may predict permuted, masked or next tokens. The loss is not computed for them, because the
checkpoint does not name the objective."""


@dataclass(frozen=True)
class LMHeadModel:
    """A frozen model with its head.

    ``base``: the part below the head, whose modules hookpoints name. ``kind``: `causal` and `masked` heads predict
    tokens; `none` has no such head. ``architecture``: the class that the checkpoint names, or an empty string.
    """

    module: nn.Module
    base: BaseModel
    kind: HeadKind
    architecture: str

    def compute_logits(self, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """Return logits (B, S, V) in the model's dtype, for ids and mask (B, S). The model must have a head."""
        assert self.kind != "none", self.architecture
        logits: Tensor = self.module(input_ids=ids_BS, attention_mask=mask_BS, **self.base.forward_kwargs()).logits
        return logits

    def compute_final_hidden(self, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """Return the final hidden state (B, S, D), after the final norm if the model has one."""
        out: Tensor = self.base.module(input_ids=ids_BS, attention_mask=mask_BS, **self.base.forward_kwargs())[0]
        return out


def load_model_with_head(name: str, settings: ModelSettings) -> LMHeadModel:
    """Load ``name`` as :func:`load_model`, but with the head that `architectures` in its configuration names.

    Raises SaetrainError when weights of the head are missing, because the library would initialize them randomly.
    """
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    config = load_config(name, settings)
    causal = detect_causal(name, config)
    architecture = (config.architectures or [""])[0]
    kind = classify_head(architecture, causal)
    auto_class: Any = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM, "none": AutoModel}[kind]
    module = load_module(auto_class, name, settings)
    base = module if kind == "none" else getattr(module, str(module.base_model_prefix))
    return LMHeadModel(module, build_base_model(name, base, config, causal, settings), kind, architecture)


def classify_head(architecture: str, causal: bool) -> HeadKind:
    """Return what the head of ``architecture``, a class of transformers, predicts."""
    from transformers.models.auto import modeling_auto

    if architecture in AMBIGUOUS_HEADS:
        return "none"
    if architecture in _class_names(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) or architecture.endswith(
        "ForCausalLM"
    ):
        return "causal"
    masked = _class_names(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    # BERT's original checkpoints contain the pre-training head, which includes the masked-LM head.
    masked |= _class_names(modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES) - PRETRAINED_WITHOUT_LM_HEAD
    if not causal and (architecture in masked or architecture.endswith("ForMaskedLM")):
        return "masked"
    return "none"


def _class_names(mapping: Any) -> set[str]:
    return {name for value in mapping.values() for name in ((value,) if isinstance(value, str) else value)}


def token_log_probs(logits: Tensor) -> Tensor:
    """Return log-probabilities over the last dimension, in fp32."""
    return torch.log_softmax(logits.float(), dim=-1)
