"""Format of SAELens 6: the keys of ``cfg.json`` and the tensors of ``sae_weights.safetensors``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saetrain.coders import SparseCoder
from saetrain.coders.abstopk import AbsTopK
from saetrain.coders.batchtopk import BatchTopK
from saetrain.coders.gated import Gated
from saetrain.coders.jumprelu import JumpReLU
from saetrain.coders.matryoshka import Matryoshka
from saetrain.coders.standard import Standard
from saetrain.coders.topk import TopK
from saetrain.errors import SaetrainError
from saetrain.interop.metadata import SaeMetadata
from saetrain.interop.schema import (
    SAE_CONFIG_FILE,
    describe_misfit,
    read_flag,
    read_sae_config,
    read_tensors,
    require_types,
    restore_sae,
    set_prefixes,
)

NAME = "SAELens"
MARKER_FILE = SAE_CONFIG_FILE
WEIGHTS_FILE = "sae_weights.safetensors"
FILES: tuple[str, ...] = (SAE_CONFIG_FILE, WEIGHTS_FILE)
SAELENS_VERSION = "6.54.12"
"""Version written to the files: the one whose loader was tested. SAELens needs a version to read them as format 6."""
WRITTEN: dict[type[SparseCoder], str] = {
    TopK: "topk",
    BatchTopK: "jumprelu",
    Matryoshka: "jumprelu",
    JumpReLU: "jumprelu",
    Standard: "standard",
    AbsTopK: "abstopk",
}
"""Class -> architecture of SAELens that computes the same codes."""
READ: dict[str, type[SparseCoder]] = {
    "topk": TopK,
    "batchtopk": BatchTopK,
    "matryoshka_batchtopk": Matryoshka,
    "jumprelu": JumpReLU,
    "standard": Standard,
    "abstopk": AbsTopK,
    "gated": Gated,
}
"""Architecture of SAELens -> class. Checkpoints of its training have the second and the third."""
TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec")
RENAMED = {"topk_threshold": "threshold", "b_gate": "b_enc"}
"""Name of a tensor in SAELens -> our name, if they differ."""
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
EARLIER_NAMES = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
"""Key of ``cfg.json`` in earlier versions of SAELens -> key in version 5."""


def unsupported(coder: SparseCoder) -> str | None:
    """Return why SAELens cannot load a coder, or None if it can."""
    extra = ("threshold",) if WRITTEN.get(type(coder)) == "jumprelu" else ()
    return describe_misfit(coder, WRITTEN, (*TENSORS, *extra))


def build_config(coder: SparseCoder, metadata: SaeMetadata) -> dict[str, Any]:
    """Return the keys of ``cfg.json`` that SAELens reads."""
    architecture, trained = WRITTEN[type(coder)], next(name for name, cls in READ.items() if cls is type(coder))
    trained_as = {} if architecture == trained else {"training_architecture": trained}
    return {
        "architecture": architecture,
        "d_in": coder.d_in,
        "d_sae": coder.num_latents,
        "k": coder.expected_l0(),
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            **{key: getattr(metadata, field) for field, key in METADATA_KEYS.items()},
            **trained_as,
        },
    }


def build_tensors(coder: SparseCoder) -> dict[str, Tensor]:
    """Return ``W_enc`` (D, F), ``b_enc`` (F,), ``W_dec`` (F, D), ``b_dec`` (D,), and ``threshold`` (F,) of JumpReLU."""
    tensors = {name: value for name, value in coder.state_dict().items() if name not in coder.training_buffers}
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].expand(coder.num_latents)
    return tensors


def read_sae(folder: Path) -> tuple[SparseCoder, SaeMetadata] | None:
    """Return (coder of raw activations, metadata), or None if ``folder`` contains no SAE of SAELens.

    Raises SaetrainError if the SAE is damaged, has another architecture than READ, or does not take raw activations.
    """
    config_path, weights_path = folder / SAE_CONFIG_FILE, folder / WEIGHTS_FILE
    if not config_path.exists() or not weights_path.exists():
        return None
    config = _upgrade_config(config_path, read_sae_config(folder))
    name = config.get("architecture")
    if name not in list(READ):  # a damaged file may contain a name that can't be hashed
        raise SaetrainError(f"{folder}: its architecture is {name!r}; saetrain reads {', '.join(READ)}")
    for key in ("normalize_activations", "reshape_activations"):
        if config.get(key, "none") != "none":
            raise SaetrainError(f"{folder}: its {key} is {config[key]!r}; only 'none' is supported")
    weights = {RENAMED.get(key, key): value for key, value in read_tensors(weights_path).items()}
    coder = restore_sae(
        READ[name],
        config,
        weights,
        config_path=config_path,
        weights_path=weights_path,
        subtracts_b_dec=read_flag(config_path, config, "apply_b_dec_to_input", default=True),
    )
    if read_flag(config_path, config, "rescale_acts_by_decoder_norm", default=False):
        _fold_decoder_norms(coder)
    if isinstance(coder, Matryoshka) and config.get("matryoshka_widths"):
        require_types(config_path, config, {"matryoshka_widths": list[int]})
        set_prefixes(config_path, coder, config["matryoshka_widths"])
    entry = dict(config.get("metadata") or {})
    if isinstance(entry.get("exclude_special_tokens"), list):  # ids of tokens
        entry["exclude_special_tokens"] = True
    return coder, SaeMetadata.from_entry(config_path, "metadata", entry, METADATA_KEYS)


def _upgrade_config(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``cfg.json`` with the keys of SAELens 6.

    Earlier versions had no entry ``metadata`` and named the activation function instead of TopK. The k of checkpoints
    of batchtopk is a mean and may be a fraction; it does not change the codes, and is rounded.
    """
    new = {EARLIER_NAMES.get(key, key): value for key, value in config.items()}
    if "metadata" in config:
        if isinstance(new.get("k"), float):
            require_types(path, new, {"k": float})
            new["k"] = max(1, round(new["k"]))
        return new
    types = {"activation_fn": str, "activation_fn_kwargs": dict, "hook_name": str, "normalize_activations": bool | str}
    require_types(path, new, types)
    function = new.get("activation_fn") or "relu"
    if function not in ("relu", "topk"):
        raise SaetrainError(f"{path}: its activation_fn is {function!r}; only 'relu' and 'topk' are supported")
    if function == "topk":
        new |= {"architecture": "topk", "k": (new.get("activation_fn_kwargs") or {}).get("k")}
    if new.get("normalize_activations") in (None, False):
        new["normalize_activations"] = "none"
    reshapes = "hook_z" in (new.get("hook_name") or "")
    new = {"architecture": "standard", "reshape_activations": "hook_z" if reshapes else "none", **new}
    return {**new, "metadata": {key: new[key] for key in METADATA_KEYS.values() if key in new}}


def _fold_decoder_norms(coder: SparseCoder) -> None:
    """Multiply the pre-activations by the norms of the decoder rows, which become 1; the outputs stay the same."""
    norms_F = coder.W_dec.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    coder.W_enc.mul_(norms_F)
    coder.b_enc.mul_(norms_F)
    coder.W_dec.div_(norms_F.unsqueeze(1))
