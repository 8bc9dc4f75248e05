"""saetrain's own format: all parameters and buffers of any coder by name, its settings, and its metadata."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from saetrain.coders import CODERS, INFERENCE_CODERS, SparseCoder, architecture_name, find_coder_class
from saetrain.errors import SaetrainError
from saetrain.interop import saelens
from saetrain.interop.metadata import SaeMetadata
from saetrain.interop.schema import SAE_CONFIG_FILE, read_sae_config, read_tensors, require_entry, restore_coder
from saetrain.settings import Size

NAME = "saetrain"
MARKER_FILE = SAE_CONFIG_FILE
WEIGHTS_FILE = "saetrain.safetensors"
"""The parameters and buffers that SAELens' file does not contain in the same shape."""
FILES: tuple[str, ...] = (SAE_CONFIG_FILE, WEIGHTS_FILE, saelens.WEIGHTS_FILE)
FORMAT_VERSION = 1
"""Version of the entry ``saetrain`` in ``cfg.json``."""


def describe_coder(coder: SparseCoder) -> dict[str, Any]:
    """Return what a coder can be built from again: its architecture, sizes, and saved and recorded settings."""
    recorded = {name: getattr(coder, name) for name in coder.recorded_settings}
    return {
        "architecture": architecture_name(type(coder)),
        "d_in": coder.d_in,
        **({} if coder.is_sae else {"d_out": coder.d_out}),
        **({} if coder.is_sae or coder.d_in != coder.d_out else {"is_sae": False}),
        "d_sae": coder.num_latents,
        **{name: getattr(coder, name) for name in coder.saved_settings},
        **{name: value for name, value in recorded.items() if value is not None},
    }


def unsupported(coder: SparseCoder) -> str | None:
    """Return None, because this format holds every coder."""
    return None


def build_config(coder: SparseCoder, metadata: SaeMetadata) -> dict[str, Any]:
    """Return the entry ``saetrain``; its part ``coder`` is omitted if SAELens' keys contain the same."""
    own = describe_coder(coder)
    shared = {} if saelens.unsupported(coder) else saelens.build_config(coder, metadata)
    extra = {} if own.items() <= shared.items() else {"coder": own}
    return {"saetrain": {"format": FORMAT_VERSION, **extra, **dataclasses.asdict(metadata)}}


def build_tensors(coder: SparseCoder) -> dict[str, Tensor]:
    """Return the parameters and buffers that SAELens' file does not contain in the same shape."""
    shared = {} if saelens.unsupported(coder) else saelens.build_tensors(coder)
    return {
        name: value
        for name, value in coder.state_dict().items()
        if name not in shared or shared[name].shape != value.shape
    }


def read_sae(folder: Path) -> tuple[SparseCoder, SaeMetadata] | None:
    """Return (coder of raw activations, metadata), or None if ``folder`` has no ``cfg.json`` that saetrain wrote.

    A file never causes an import: the class must be one of saetrain, or its module must have been imported.
    Raises SaetrainError if the SAE is damaged, or if its architecture is unknown.
    """
    path = folder / SAE_CONFIG_FILE
    config = read_sae_config(folder) if path.exists() else {}
    entry = config.get("saetrain")
    if entry is None:
        return None
    if entry.get("format") != FORMAT_VERSION:
        raise SaetrainError(
            f"{path}: was not written by this version of saetrain (no 'saetrain' entry of format {FORMAT_VERSION})"
        )
    saved = require_entry(path, {"coder": config, **entry}, "coder", dict)
    coder_class = _find_saved_class(path, saved.get("architecture"))
    d_in, num_latents = (require_entry(path, saved, key, Size) for key in ("d_in", "d_sae"))
    sizes = (d_in, require_entry(path, {"d_out": d_in, **saved}, "d_out", Size), num_latents)
    weights, weights_path = _read_weights(folder, config)
    coder = restore_coder(coder_class, saved, weights, sizes, config_path=path, weights_path=weights_path)
    return coder, SaeMetadata.from_entry(path, "saetrain", entry)


def _find_saved_class(path: Path, name: Any) -> type[SparseCoder]:
    """Return the class that ``cfg.json`` names; raise SaetrainError if there is none."""
    known = CODERS | INFERENCE_CODERS
    # A damaged file may contain a name that can't be hashed.
    if isinstance(name, str) and name in known:
        return known[name]
    if not (isinstance(name, str) and ":" in name):
        raise SaetrainError(f"{path}: architecture is {name!r}; this version supports {', '.join(known)}")
    return find_coder_class(name, may_import=False)


def _read_weights(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], Path]:
    """Return the tensors of SAELens' file and of our own, and the file that errors name."""
    shared_path, own_path = folder / saelens.WEIGHTS_FILE, folder / WEIGHTS_FILE
    # Without SAELens' keys, all tensors are in one file: ours, or SAELens' if an earlier version wrote it.
    if "architecture" not in config and own_path.exists():
        return read_tensors(own_path), own_path
    shared = read_tensors(shared_path)
    return (shared | read_tensors(own_path) if own_path.exists() else shared), shared_path
