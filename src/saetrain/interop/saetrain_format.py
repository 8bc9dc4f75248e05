"""saetrain's own format: all parameters and buffers of any coder by name, its settings, and its metadata."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saetrain.coders import CODERS, SparseCoder, architecture_name, find_coder_class
from saetrain.errors import SaetrainError
from saetrain.interop import saelens
from saetrain.interop.metadata import SaeMetadata
from saetrain.interop.saelens import WEIGHTS_FILE
from saetrain.interop.saelens import write_weights as write_weights
from saetrain.interop.schema import SAE_CONFIG_FILE, PositiveInt, read_tensors, require_entry, restore_coder

NAME = "saetrain"
FORMAT_VERSION = 1
"""Version of the entry ``saetrain`` in ``cfg.json``."""


def describe_coder(coder: SparseCoder) -> dict[str, Any]:
    """Return what a coder can be built from again: its architecture, sizes and saved settings."""
    return {
        "architecture": architecture_name(type(coder)),
        "d_in": coder.d_in,
        **({} if coder.is_sae else {"d_out": coder.d_out}),
        **({} if coder.is_sae or coder.d_in != coder.d_out else {"is_sae": False}),
        "d_sae": coder.num_latents,
        **{name: getattr(coder, name) for name in coder.saved_settings},
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


def read_sae(folder: Path, config: Mapping[str, Any]) -> tuple[SparseCoder, SaeMetadata] | None:
    """Return (coder of raw activations, metadata), or None if another program wrote ``cfg.json``.

    A file never causes an import: the class must be in CODERS, or its module must have been imported.
    Raises SaetrainError if the SAE is damaged, or if its architecture is unknown.
    """
    path, entry = folder / SAE_CONFIG_FILE, config.get("saetrain")
    if entry is None:
        return None
    if entry.get("format") != FORMAT_VERSION:
        raise SaetrainError(
            f"{path}: was not written by this version of saetrain (no 'saetrain' entry of format {FORMAT_VERSION})"
        )
    saved = require_entry(path, {"coder": config, **entry}, "coder", dict)
    name = saved.get("architecture")
    # Names without a colon are those of CODERS, and a damaged file may contain a name that can't be hashed.
    if name not in list(CODERS) and not (isinstance(name, str) and ":" in name):
        raise SaetrainError(f"{path}: architecture is {name!r}; this version supports {', '.join(CODERS)}")
    coder_class = find_coder_class(name, may_import=False)
    d_in, num_latents = (require_entry(path, saved, key, PositiveInt) for key in ("d_in", "d_sae"))
    sizes = (d_in, require_entry(path, {"d_out": d_in, **saved}, "d_out", PositiveInt), num_latents)
    weights = read_tensors(folder / WEIGHTS_FILE)
    coder = restore_coder(folder, WEIGHTS_FILE, coder_class, saved, weights, sizes)
    return coder, SaeMetadata.from_entry(path, "saetrain", entry)
