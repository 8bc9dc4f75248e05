"""Format of SAELens 6: the keys of ``cfg.json`` and the tensors of ``sae_weights.safetensors``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from saetrain.coders.base import SparseCoder
from saetrain.coders.topk import TopK
from saetrain.errors import SaetrainError
from saetrain.interop.metadata import SaeMetadata
from saetrain.interop.schema import SAE_CONFIG_FILE, describe_misfit, read_tensors, restore_coder

NAME = "SAELens"
WEIGHTS_FILE = "sae_weights.safetensors"
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")
SAELENS_VERSION = "6.54.12"
"""Version written to the files: the one whose loader was tested. SAELens needs a version to read them as format 6."""
METADATA_KEYS = {
    "model": "model_name",
    "hook_name": "hook_name",
    "hookpoint": "hf_hook_name",
    "dataset": "dataset_path",
    "ctx_len": "context_size",
    "prepend_bos": "prepend_bos",
    "exclude_special_tokens": "exclude_special_tokens",
}
"""Field of SaeMetadata -> key of the entry ``metadata``."""


def unsupported(coder: SparseCoder) -> str | None:
    """Return why SAELens cannot load a coder, or None if it can."""
    return describe_misfit(coder, TopK, TENSORS)


def build_config(coder: SparseCoder, metadata: SaeMetadata) -> dict[str, Any]:
    """Return the keys of ``cfg.json`` that SAELens reads."""
    assert isinstance(coder, TopK), type(coder)
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
            **{key: getattr(metadata, field) for field, key in METADATA_KEYS.items()},
        },
    }


def write_weights(path: Path, coder: SparseCoder) -> None:
    """Write all parameters and buffers by name: ``W_enc`` (D, F), ``b_enc`` (F,), ``W_dec`` (F, D), ``b_dec`` (D,)."""
    save_file({name: value.cpu().contiguous() for name, value in coder.state_dict().items()}, path)


def read_sae(folder: Path, config: Mapping[str, Any]) -> tuple[SparseCoder, SaeMetadata] | None:
    """Return (coder of raw activations, metadata), or None if ``folder`` contains no weights of SAELens.

    Raises SaetrainError if the SAE is damaged, is not TopK, or does not take raw activations.
    """
    if not (folder / WEIGHTS_FILE).exists():
        return None
    if config.get("architecture") != "topk":
        raise SaetrainError(f"{folder}: its architecture is {config.get('architecture')!r}; only 'topk' is supported")
    for key in ("normalize_activations", "reshape_activations"):
        if config.get(key, "none") != "none":
            raise SaetrainError(f"{folder}: its {key} is {config[key]!r}; only 'none' is supported")
    weights = read_tensors(folder / WEIGHTS_FILE)
    num_latents, width = weights["W_dec"].shape
    coder = restore_coder(folder, WEIGHTS_FILE, TopK, config, weights, (width, width, num_latents))
    if not config.get("apply_b_dec_to_input", True):
        coder.b_enc.add_(coder.b_dec @ coder.W_enc)
    if config.get("rescale_acts_by_decoder_norm"):
        norms = coder.W_dec.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        coder.W_enc.mul_(norms)
        coder.b_enc.mul_(norms)
        coder.W_dec.div_(norms.unsqueeze(1))
    entry = dict(config.get("metadata") or {})
    if isinstance(entry.get("exclude_special_tokens"), list):  # ids of tokens
        entry["exclude_special_tokens"] = True
    return coder, SaeMetadata.from_entry(folder / SAE_CONFIG_FILE, "metadata", entry, METADATA_KEYS)


def resolve_module_name(name: str, modules: Collection[str]) -> str | None:
    """Return the module of ``modules`` that the `hf_hook_name` ``name`` refers to, or None.

    ``modules`` are names in a model without its head. ``name`` is one of them, or becomes one without the suffix
    `.output` and without the first component, which may name the headless model: `model.layers.3.output`.
    """
    base_name = name.removesuffix(".output")
    return next(
        (candidate for candidate in (name, base_name.partition(".")[2], base_name) if candidate in modules), None
    )
