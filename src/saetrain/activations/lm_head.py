"""The model with the head that its checkpoint was saved with: what its outputs are scored by."""

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
"""Pre-trained to tell replaced tokens or to find spans, so without a head that predicts tokens."""
AMBIGUOUS_HEADS = {"FlaubertWithLMHeadModel", "XLMWithLMHeadModel", "XLNetLMHeadModel"}
"""Heads that serve permuted, masked or next tokens, so that one forward pass without more knowledge scores none."""


@dataclass(frozen=True)
class LMHeadModel:
    """A frozen model with its head.

    ``base``: the part below the head, whose modules hookpoints name; ``kind``: `causal` and `masked` predict tokens,
    `none` has no head that does; ``architecture``: the class that the checkpoint names, empty where it names none.
    """

    module: nn.Module
    base: BaseModel
    kind: HeadKind
    architecture: str

    def compute_logits(self, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """(B, S, V) in the model's dtype; of a model with a head."""
        assert self.kind != "none", self.architecture
        logits: Tensor = self.module(input_ids=ids_BS, attention_mask=mask_BS, **self.base.forward_kwargs()).logits
        return logits

    def compute_final_hidden(self, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """The final hidden state (B, S, D), behind the final norm where there is one."""
        out: Tensor = self.base.module(input_ids=ids_BS, attention_mask=mask_BS, **self.base.forward_kwargs())[0]
        return out


def load_model_with_head(name: str, settings: ModelSettings) -> LMHeadModel:
    """Load ``name`` with the head that its configuration's `architectures` names; as ``load_model`` otherwise.

    SaetrainError when weights of the head are missing from the files: the library would fill it with random numbers.
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
    """What the class ``architecture`` of transformers predicts."""
    from transformers.models.auto import modeling_auto

    if architecture in AMBIGUOUS_HEADS:
        return "none"
    if architecture in _class_names(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) or architecture.endswith(
        "ForCausalLM"
    ):
        return "causal"
    masked = _class_names(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    # BERT's own checkpoints hold the head of its pre-training, of which the masked-LM head is a part.
    masked |= _class_names(modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES) - PRETRAINED_WITHOUT_LM_HEAD
    if not causal and (architecture in masked or architecture.endswith("ForMaskedLM")):
        return "masked"
    return "none"


def _class_names(mapping: Any) -> set[str]:
    return {name for value in mapping.values() for name in ((value,) if isinstance(value, str) else value)}


def token_log_probs(logits: Tensor) -> Tensor:
    """Log-probabilities over the last dimension, in fp32."""
    return torch.log_softmax(logits.float(), dim=-1)
