"""Format of SAELens 6: the keys of ``cfg.json`` and the tensors of ``sae_weights.safetensors``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from saetrain.coders.topk import TopK
from saetrain.interop.schema import require_tensor_shapes

WEIGHTS_FILE = "sae_weights.safetensors"
DIM_LETTERS = {"W_dec": "FD", "W_enc": "DF", "b_enc": "F", "b_dec": "D"}
"""Dimensions of each tensor: D activation width, F latents."""
SAELENS_VERSION = "6.54.12"
"""Version written to the files: the one whose loader was tested. SAELens needs a version to read them as format 6."""


def build_config(coder: TopK, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of ``cfg.json`` that SAELens reads.

    ``metadata`` names the model, hookpoint, data set and context of the SAE, with the keys of saetrain's own metadata.
    """
    return {
        "architecture": "topk",
        "d_in": coder.d_in,
        "d_sae": coder.num_latents,
        "k": coder.k,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "model_name": metadata.get("model"),
            "hook_name": metadata.get("hook_name"),
            "hf_hook_name": metadata.get("hookpoint"),
            "dataset_path": metadata.get("dataset"),
            "context_size": metadata.get("ctx_len"),
            "prepend_bos": metadata.get("prepend_bos", False),
            "exclude_special_tokens": metadata.get("exclude_special_tokens", True),
        },
    }


def export_tensors(coder: TopK) -> dict[str, Tensor]:
    """Return the tensors of the file: ``W_enc`` (D, F), ``b_enc`` (F,), ``W_dec`` (F, D), ``b_dec`` (D,)."""
    return {name: value.detach().cpu().contiguous() for name, value in coder.named_parameters()}


def import_tensors(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the tensors of a SAELens file to our layout.

    Raises:
        ValueError: if the SAE is not TopK, does not take raw activations, or has tensors of the wrong shape.
    """
    if config.get("architecture") != "topk":
        raise ValueError(f"its architecture is {config.get('architecture')!r}; only 'topk' is supported")
    for key in ("normalize_activations", "reshape_activations"):
        if config.get(key, "none") != "none":
            raise ValueError(f"its {key} is {config[key]!r}; only 'none' is supported")
    require_tensor_shapes(weights, DIM_LETTERS)
    out = {name: weights[name].clone() for name in DIM_LETTERS}
    if not config.get("apply_b_dec_to_input", True):
        out["b_enc"] += out["b_dec"] @ out["W_enc"]
    return out


def resolve_module_name(name: str, modules: Collection[str]) -> str | None:
    """Return the module of ``modules`` that the `hf_hook_name` ``name`` refers to, or None.

    ``modules`` are names in a model without its head. ``name`` is one of them, or becomes one without the suffix
    `.output` and without the first component, which may name the headless model: `model.layers.3.output`.
    """
    base_name = name.removesuffix(".output")
    return next(
        (candidate for candidate in (name, base_name.partition(".")[2], base_name) if candidate in modules), None
    )
