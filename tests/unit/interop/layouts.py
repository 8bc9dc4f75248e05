"""Small SAEs in the layouts of other libraries, written by hand, with what the libraries compute from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

D, F, K = 6, 20, 3
Tensors = dict[str, Tensor]


def draw_weights(seed: int = 0) -> Tensors:
    """Return random weights with our names; the decoder has unit norm."""
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(F, D, generator=generator)
    return {
        "W_enc": torch.randn(D, F, generator=generator),
        "b_enc": 0.1 * torch.randn(F, generator=generator),
        "W_dec": W_dec / W_dec.norm(dim=1, keepdim=True),
        "b_dec": torch.randn(D, generator=generator),
    }


def draw_thresholds() -> Tensor:
    """Return thresholds of which some are negative, as training may leave them."""
    return torch.linspace(-0.3, 1.0, F)


def draw_gate() -> Tensors:
    """Return the tensors that a gated SAE has besides ``b_enc``, the bias of the gate."""
    generator = torch.Generator().manual_seed(1)
    return {name: 0.5 * torch.randn(F, generator=generator) for name in ("r_mag", "b_mag")}


def write_saelens(folder: Path, architecture: str, tensors: Tensors, **config: Any) -> Path:
    """Write ``cfg.json`` and ``sae_weights.safetensors``."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "sae_weights.safetensors")
    metadata = {"sae_lens_version": "6.54.12", "model_name": "gpt2", "hook_name": "blocks.1.hook_resid_post"}
    content = {"architecture": architecture, "d_in": D, "d_sae": F, "dtype": "float32", "metadata": metadata, **config}
    (folder / "cfg.json").write_text(json.dumps(content))
    return folder


def write_dictionary(folder: Path, dict_class: str, tensors: Any, **trainer: Any) -> Path:
    """Write ``ae.pt`` and ``config.json`` of dictionary_learning."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "ae.pt")
    described = {"dict_class": dict_class, "lm_name": "gpt2", "submodule_name": "resid_post_layer_1", **trainer}
    content = {"trainer": described, "buffer": {"ctx_len": 128}}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def name_as_linear(weights: Tensors, decoder_bias: str = "b_dec") -> Tensors:
    """Return weights with the names of dictionary_learning's classes that consist of ``nn.Linear``."""
    return {
        "encoder.weight": weights["W_enc"].T.contiguous(),
        "encoder.bias": weights["b_enc"],
        "decoder.weight": weights["W_dec"].T.contiguous(),
        decoder_bias: weights["b_dec"],
    }


def name_as_gated(weights: Tensors) -> Tensors:
    """Return weights with the names of dictionary_learning's gated SAE."""
    linear, gate = name_as_linear(weights, "decoder_bias"), draw_gate()
    gate_bias = linear.pop("encoder.bias")
    return {**linear, "gate_bias": gate_bias, "mag_bias": gate["b_mag"], "r_mag": gate["r_mag"]}


def write_gemma_scope(folder: Path, tensors: Tensors, **arrays: Any) -> Path:
    """Write ``params.npz``."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "params.npz", **{name: value.numpy() for name, value in tensors.items()}, **arrays)
    return folder


def compute_code(kind: str, w: Tensors, x_ND: Tensor, *, subtracts: bool = True) -> Tensor:
    """Return the code of a kind of SAE by its formula, (N, F)."""
    product_NF = (x_ND - w["b_dec"] if subtracts else x_ND) @ w["W_enc"]
    pre_NF = product_NF + w["b_enc"]
    if kind == "gated":
        gate = draw_gate()
        return (pre_NF > 0) * torch.relu(product_NF * gate["r_mag"].exp() + gate["b_mag"])
    if kind == "jumprelu":
        return torch.relu(pre_NF) * (pre_NF > draw_thresholds())
    if kind == "batchtopk":
        return torch.relu(pre_NF) * (pre_NF > 0.5)
    if kind == "topk":
        values, indices = pre_NF.topk(K, dim=1)
        return torch.zeros_like(pre_NF).scatter(1, indices, values.relu())
    if kind == "abstopk":
        indices = pre_NF.abs().topk(K, dim=1).indices
        return torch.zeros_like(pre_NF).scatter(1, indices, pre_NF.gather(1, indices))
    assert kind == "standard", kind
    return pre_NF.relu()
