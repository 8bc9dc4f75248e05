"""Format of sparsify 1.3: the keys of ``cfg.json`` and the tensors of ``sae.safetensors``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from saetrain.coders.base import SparseCoder
from saetrain.coders.topk import TopK
from saetrain.errors import SaetrainError
from saetrain.interop.metadata import SaeMetadata
from saetrain.interop.schema import (
    SAE_CONFIG_FILE,
    describe_misfit,
    read_flag,
    read_sae_config,
    read_tensors,
    restore_sae,
)

NAME = "sparsify"
MARKER_FILE = SAE_CONFIG_FILE
WEIGHTS_FILE = "sae.safetensors"
FILES: tuple[str, ...] = (SAE_CONFIG_FILE, WEIGHTS_FILE)
TENSORS = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
"""Name in the file -> our parameter."""


def unsupported(coder: SparseCoder) -> str | None:
    """Return why sparsify cannot load a coder, or None if it can."""
    return describe_misfit(coder, (TopK,), TENSORS.values())


def build_config(coder: SparseCoder, metadata: SaeMetadata) -> dict[str, Any]:
    """Return the keys of ``cfg.json`` that sparsify reads."""
    assert isinstance(coder, TopK), type(coder)
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


def build_tensors(coder: SparseCoder) -> dict[str, Tensor]:
    """Return ``encoder.weight`` and ``W_dec``, both (F, D), ``encoder.bias`` (F,) and ``b_dec`` (D,)."""
    state = coder.state_dict() | {"W_enc": coder.W_enc.detach().T}
    return {name: state[own] for name, own in TENSORS.items()}


def read_sae(folder: Path) -> tuple[SparseCoder, SaeMetadata] | None:
    """Return (coder of raw activations, metadata), or None if ``folder`` contains no SAE of sparsify.

    sparsify records only the hookpoint, as the name of the folder.
    Raises SaetrainError if the SAE is damaged, is not TopK, or is a transcoder or has a skip connection.
    """
    config_path, weights_path = folder / SAE_CONFIG_FILE, folder / WEIGHTS_FILE
    if not config_path.exists() or not weights_path.exists():
        return None
    config = read_sae_config(folder)
    if config.get("activation", "topk") != "topk":
        raise SaetrainError(f"{folder}: its activation is {config['activation']!r}; only 'topk' is supported")
    for key in ("transcode", "skip_connection"):
        if read_flag(config_path, config, key, default=False):
            raise SaetrainError(
                f"{folder}: it is a transcoder or has a skip connection ({key}), which is not supported"
            )
    weights = {TENSORS.get(name, name): value for name, value in read_tensors(weights_path).items()}
    if "W_enc" in weights:
        weights["W_enc"] = weights["W_enc"].T
    coder = restore_sae(TopK, config, weights, config_path=config_path, weights_path=weights_path)
    return coder, SaeMetadata(hook_name=folder.name)
