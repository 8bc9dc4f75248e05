"""Format of sparsify 1.3: the keys of ``cfg.json`` and the tensors of ``sae.safetensors``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from saetrain.coders.topk import TopK
from saetrain.interop.schema import require_tensor_shapes

WEIGHTS_FILE = "sae.safetensors"
DIM_LETTERS = {"W_dec": "FD", "encoder.weight": "FD", "encoder.bias": "F", "b_dec": "D"}
"""Dimensions of each tensor: D activation width, F latents."""


def build_config(coder: TopK) -> dict[str, Any]:
    """Return the keys of ``cfg.json`` that sparsify reads."""
    return {
        "activation": "topk",
        "d_in": coder.d_in,
        "num_latents": coder.num_latents,
        "expansion_factor": max(1, coder.num_latents // coder.d_in),
        "k": coder.k,
        "normalize_decoder": True,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
    }


def export_tensors(coder: TopK) -> dict[str, Tensor]:
    """Return the tensors of the file: ``encoder.weight``, ``W_dec`` (F, D), ``encoder.bias`` (F,), ``b_dec`` (D,)."""
    return {
        "encoder.weight": coder.W_enc.detach().cpu().T.contiguous(),
        "encoder.bias": coder.b_enc.detach().cpu().contiguous(),
        "W_dec": coder.W_dec.detach().cpu().contiguous(),
        "b_dec": coder.b_dec.detach().cpu().contiguous(),
    }


def import_tensors(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the tensors of a sparsify file to our layout.

    Raises:
        ValueError: if the SAE is not TopK, is a transcoder, or has a skip connection or tensors of the wrong shape.
    """
    if config.get("activation", "topk") != "topk":
        raise ValueError(f"its activation is {config['activation']!r}; only 'topk' is supported")
    for key in ("transcode", "skip_connection"):
        if config.get(key):
            raise ValueError(f"it is a transcoder or has a skip connection ({key}), which is not supported")
    require_tensor_shapes(weights, DIM_LETTERS)
    return {
        "W_enc": weights["encoder.weight"].T.contiguous(),
        "b_enc": weights["encoder.bias"].clone(),
        "W_dec": weights["W_dec"].clone(),
        "b_dec": weights["b_dec"].clone(),
    }
