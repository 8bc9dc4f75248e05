"""Format of sparsify 1.3: the keys of ``cfg.json`` and the tensors of ``sae.safetensors``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from saetrain.coders.base import SparseCoder
from saetrain.coders.topk import TopK
from saetrain.errors import SaetrainError
from saetrain.interop.metadata import SaeMetadata
from saetrain.interop.schema import describe_misfit, read_tensors, restore_coder

NAME = "sparsify"
WEIGHTS_FILE = "sae.safetensors"
TENSORS = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
"""Name in the file -> our parameter."""


def unsupported(coder: SparseCoder) -> str | None:
    """Return why sparsify cannot load a coder, or None if it can."""
    return describe_misfit(coder, TopK, TENSORS.values())


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


def write_weights(path: Path, coder: SparseCoder) -> None:
    """Write ``encoder.weight`` and ``W_dec``, both (F, D), ``encoder.bias`` (F,) and ``b_dec`` (D,)."""
    tensors = {"encoder.weight": coder.W_enc.T, "encoder.bias": coder.b_enc, "W_dec": coder.W_dec, "b_dec": coder.b_dec}
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)


def read_sae(folder: Path, config: Mapping[str, Any]) -> tuple[SparseCoder, SaeMetadata] | None:
    """Return (coder of raw activations, metadata), or None if ``folder`` contains no weights of sparsify.

    sparsify records only the hookpoint, as the name of the folder.
    Raises SaetrainError if the SAE is damaged, is not TopK, or is a transcoder or has a skip connection.
    """
    if not (folder / WEIGHTS_FILE).exists():
        return None
    if config.get("activation", "topk") != "topk":
        raise SaetrainError(f"{folder}: its activation is {config['activation']!r}; only 'topk' is supported")
    for key in ("transcode", "skip_connection"):
        if config.get(key):
            raise SaetrainError(
                f"{folder}: it is a transcoder or has a skip connection ({key}), which is not supported"
            )
    weights = {TENSORS.get(name, name): value for name, value in read_tensors(folder / WEIGHTS_FILE).items()}
    if "W_enc" in weights:
        weights["W_enc"] = weights["W_enc"].T
    num_latents, width = weights["W_dec"].shape
    coder = restore_coder(folder, WEIGHTS_FILE, TopK, config, weights, (width, width, num_latents))
    return coder, SaeMetadata(hook_name=folder.name)
