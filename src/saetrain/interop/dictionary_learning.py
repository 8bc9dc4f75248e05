"""Format of dictionary_learning 0.1: the state dict ``ae.pt``, and ``config.json``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from saetrain.coders import SparseCoder
from saetrain.coders.batchtopk import BatchTopK
from saetrain.coders.gated import Gated
from saetrain.coders.jumprelu import JumpReLU
from saetrain.coders.matryoshka import Matryoshka
from saetrain.coders.standard import Standard
from saetrain.coders.topk import TopK
from saetrain.errors import SaetrainError
from saetrain.interop.archives import read_torch_tensors
from saetrain.interop.metadata import SaeMetadata
from saetrain.interop.schema import require_entry, require_file, require_types, restore_sae, set_prefixes
from saetrain.settings import Total
from saetrain.small_files import read_json_object

NAME = "dictionary_learning"
MARKER_FILE = "ae.pt"
CONFIG_FILE = "config.json"
FILES: tuple[str, ...] = (MARKER_FILE, CONFIG_FILE)
RESIDUAL_STREAM = re.compile(r"resid_post_layer_(\d+)")
"""``submodule_name`` of SAEs of the residual stream."""


@dataclass(frozen=True)
class DictionaryKind:
    """How a class of dictionary_learning becomes a coder.

    ``names``: {name of a tensor: our name}, if they differ. ``ignored``: tensors that inference does not use.
    """

    coder_class: type[SparseCoder]
    names: Mapping[str, str]
    ignored: frozenset[str] = frozenset()
    subtracts_b_dec: bool = True


LINEAR = {"encoder.weight": "W_enc", "decoder.weight": "W_dec", "encoder.bias": "b_enc"}
"""Tensors of ``nn.Linear``; the matrices are transposed."""
GATED_NAMES = {**LINEAR, "decoder_bias": "b_dec", "gate_bias": "b_enc", "mag_bias": "b_mag"}
K, GROUPS = "k", "group_sizes"
KINDS = {
    "AutoEncoder": DictionaryKind(Standard, {**LINEAR, "bias": "b_dec"}),
    "AutoEncoderNew": DictionaryKind(Standard, {**LINEAR, "decoder.bias": "b_dec"}, subtracts_b_dec=False),
    "GatedAutoEncoder": DictionaryKind(Gated, GATED_NAMES),
    # Its encoder selects the k largest; the threshold is for another mode.
    "AutoEncoderTopK": DictionaryKind(TopK, LINEAR, frozenset({K, "threshold"})),
    "BatchTopKSAE": DictionaryKind(BatchTopK, LINEAR, frozenset({K})),
    "MatryoshkaBatchTopKSAE": DictionaryKind(Matryoshka, {}, frozenset({K, GROUPS})),
    "JumpReluAutoEncoder": DictionaryKind(JumpReLU, {}, subtracts_b_dec=False),
}
"""``dict_class`` in ``config.json`` -> kind."""


def read_sae(folder: Path) -> tuple[SparseCoder, SaeMetadata] | None:
    """Return (coder of raw activations, metadata), or None if ``folder`` contains no SAE of dictionary_learning.

    Only tensors are read from ``ae.pt``. Raises SaetrainError if the SAE is damaged, if its class is unknown, or if its
    threshold has not been set.
    """
    path, config_path = folder / MARKER_FILE, folder / CONFIG_FILE
    if not path.exists():
        return None
    require_file(config_path)
    config = read_json_object(config_path)
    require_types(config_path, config, {"buffer": dict})
    trainer = require_entry(config_path, config, "trainer", dict)
    name = require_entry(config_path, trainer, "dict_class", str)
    kind = KINDS.get(name)
    if kind is None:
        raise SaetrainError(f"{config_path}: dict_class is {name!r}; saetrain reads {', '.join(KINDS)}")
    tensors = read_torch_tensors(path)
    weights = {
        kind.names.get(key, key): value.T if key.endswith(".weight") else value
        for key, value in tensors.items()
        if key not in kind.ignored
    }
    _require_threshold(path, weights)
    has_k = K in tensors and tensors[K].numel() == 1
    coder = restore_sae(
        kind.coder_class,
        {K: int(tensors[K])} if has_k else trainer,
        weights,
        config_path=path if has_k else config_path,
        weights_path=path,
        subtracts_b_dec=kind.subtracts_b_dec,
    )
    if isinstance(coder, Matryoshka) and GROUPS in tensors:
        set_prefixes(path, coder, tensors[GROUPS].flatten().cumsum(0).tolist())
    return coder, _read_metadata(config_path, trainer, config.get("buffer") or {})


def _require_threshold(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Raise SaetrainError if the one threshold of all latents is not set, which -1 means."""
    threshold = weights.get("threshold")
    if threshold is not None and threshold.numel() == 1 and float(threshold) < 0:
        raise SaetrainError(
            f"{path}: its threshold is not set ({float(threshold):g}), so all positive latents would fire; train the "
            "SAE for more steps than threshold_start_step"
        )


def _read_metadata(path: Path, trainer: Mapping[str, Any], buffer: Mapping[str, Any]) -> SaeMetadata:
    """Return what ``config.json`` contains about model and hookpoint."""
    require_types(path, buffer, {"ctx_len": Total}, "buffer.")
    keys = {"model": "lm_name", "hook_name": "submodule_name"}
    metadata = SaeMetadata.from_entry(path, "trainer", trainer, keys)
    # The number of a layer without the name of a module does not show whether it is the residual stream.
    found = RESIDUAL_STREAM.fullmatch(metadata.hook_name or "")
    hook_name = f"blocks.{found[1]}.hook_resid_post" if found else metadata.hook_name
    return dataclasses.replace(metadata, hook_name=hook_name, ctx_len=buffer.get("ctx_len"))
