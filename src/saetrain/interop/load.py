"""Loading a saved SAE of saetrain, SAELens or sparsify: its configuration, weights and metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saetrain.coders.topk import TopK
from saetrain.errors import SaetrainError
from saetrain.interop import saelens, sparsify
from saetrain.interop.saetrain_format import CONFIG_FILE, load_sae, read_sae_config, require_valid_k


def read_weights(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (contents of cfg.json, weights) of the SAE in ``folder``.

    The weights are W_enc (D, F), b_enc (F,), W_dec (F, D) and b_dec (D,), in the dtype of the file, for an encoder
    that subtracts b_dec from its input.

    Raises:
        SaetrainError: if a file is missing or damaged, or the SAE is not TopK. The message starts with the folder.
    """
    config = read_sae_config(folder)
    try:
        if (folder / saelens.WEIGHTS_FILE).exists():
            return config, saelens.import_tensors(config, load_file(folder / saelens.WEIGHTS_FILE))
        if (folder / sparsify.WEIGHTS_FILE).exists():
            return config, sparsify.import_tensors(config, load_file(folder / sparsify.WEIGHTS_FILE))
    except SafetensorError as error:
        raise SaetrainError(f"{folder}: its weights are damaged or truncated: {error}") from error
    except ValueError as error:
        raise SaetrainError(f"{folder}: {error}") from error
    raise SaetrainError(f"{folder}: contains neither {saelens.WEIGHTS_FILE} nor {sparsify.WEIGHTS_FILE}")


def load_any_format(folder: Path) -> tuple[TopK, dict[str, Any]]:
    """Return (coder of raw activations, metadata) of the SAE in ``folder``, in any of the three formats.

    The metadata of other libraries is translated to the keys of saetrain's own.

    Raises:
        SaetrainError: if ``folder`` contains no SAE, or if the SAE is damaged or not TopK.
    """
    config = read_sae_config(folder)
    if isinstance(config.get("saetrain"), dict):
        return load_sae(folder)
    config, weights = read_weights(folder)
    k = config.get("k")
    if k is None:
        raise SaetrainError(f"{folder / CONFIG_FILE}: has no key 'k'")
    num_latents, d_in = weights["W_dec"].shape
    require_valid_k(folder / CONFIG_FILE, k, num_latents)
    coder = TopK(d_in, num_latents, k)
    ranked_by_norm = bool(config.get("rescale_acts_by_decoder_norm"))
    with torch.no_grad():
        for name, parameter in coder.named_parameters():
            parameter.copy_(weights[name].float())
        if ranked_by_norm:
            norms = coder.W_dec.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
            coder.W_enc.mul_(norms)
            coder.b_enc.mul_(norms)
            coder.W_dec.div_(norms.unsqueeze(1))
    return coder.requires_grad_(False), _foreign_metadata(folder, config)


def _foreign_metadata(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of another library's SAE; sparsify stores only the hookpoint, as the folder's name."""
    metadata = config.get("metadata") or {}
    known = {
        "model": metadata.get("model_name"),
        "hookpoint": metadata.get("hf_hook_name"),
        "hook_name": metadata.get("hook_name") or (folder.name if "metadata" not in config else None),
        "dataset": metadata.get("dataset_path"),
        "ctx_len": metadata.get("context_size"),
        "prepend_bos": metadata.get("prepend_bos"),
        "exclude_special_tokens": metadata.get("exclude_special_tokens"),
    }
    return {name: value for name, value in known.items() if value not in (None, "")}
