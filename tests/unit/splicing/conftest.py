"""Small models of three families, SAEs for them, and splices written by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import saetrain
from saetrain.coders.topk import TopK
from saetrain.interop.metadata import SaeMetadata
from saetrain.sae import SAE

D, F, K, V = 16, 48, 4, 50
SIZES = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=D, n_layer=3, n_head=2)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1)),
}
HOOKPOINTS = {"bert": "encoder.layer.1", "gpt2": "h.1", "llama": "layers.1"}
IDS = torch.tensor([[5, 9, 3, 30, 7, 2], [11, 4, 8, 1, 6, 40]])


@functools.cache
def build_model(family: str) -> nn.Module:
    torch.manual_seed(0)
    return BUILDERS[family]().eval().requires_grad_(False)


@pytest.fixture(params=BUILDERS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(family: str) -> nn.Module:
    return build_model(family)


def make_sae(hookpoint: str, seed: int = 0, **metadata: Any) -> SAE:
    coder = TopK(D, F, K, seed=seed).requires_grad_(False)
    coder.b_enc.copy_(0.1 * torch.randn(F, generator=torch.Generator().manual_seed(1)))
    return SAE(coder, SaeMetadata(model="m", hookpoint=hookpoint, **metadata), Path("sae"))


@pytest.fixture
def sae(family: str) -> SAE:
    return make_sae(HOOKPOINTS[family])


def module_of(model: nn.Module, family: str) -> nn.Module:
    prefix = {"bert": "bert", "gpt2": "transformer", "llama": "model"}[family]
    return model.get_submodule(f"{prefix}.{HOOKPOINTS[family]}")


class hand_written:
    """A hook that replaces a module's output by ``edit(x)``."""

    def __init__(self, module: nn.Module, edit: Callable[[Tensor], Tensor]) -> None:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (edit(output[0]), *output[1:])
            return edit(output)

        self._module, self._hook = module, hook

    def __enter__(self) -> None:
        self._handle = self._module.register_forward_hook(self._hook)

    def __exit__(self, *error: object) -> None:
        self._handle.remove()


def edit_by_hand(sae: SAE, factors: dict[int, float], *, replace: bool = False) -> Callable[[Tensor], Tensor]:
    def edit(x: Tensor) -> Tensor:
        codes = sae.encode(x)
        values = codes.values.clone()
        for latent, factor in factors.items():
            values[codes.indices == latent] *= factor
        edited = sae.coder.decode(saetrain.Codes(values, codes.indices, F)).view_as(x)
        return edited if replace else x + (edited - sae.coder.decode(codes).view_as(x))

    return edit


def active_latents(model: nn.Module, sae: SAE) -> list[int]:
    with torch.no_grad(), saetrain.splice(model, sae) as spliced:
        model(input_ids=IDS)
    return spliced.codes.firing_counts().topk(3).indices.tolist()  # type: ignore[no-any-return]
