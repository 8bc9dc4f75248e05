"""The folder of one SAE: a ``cfg.json`` for saetrain, SAELens and sparsify, and the weights in both layouts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from saetrain.atomic_io import atomic_replace, write_json
from saetrain.coders import CODERS
from saetrain.coders.topk import TopK
from saetrain.errors import SaetrainError
from saetrain.interop import saelens, sparsify
from saetrain.interop.schema import require_entry_types, require_tensor_shapes

CONFIG_FILE = "cfg.json"
FORMAT_VERSION = 1
"""Version of saetrain's own entry in ``cfg.json``."""


def save_sae(folder: Path, coder: TopK, metadata: Mapping[str, Any], with_sparsify: bool = True) -> None:
    """Write a coder of raw activations to ``folder``, with ``metadata`` on its model, hookpoint and token policy.

    ``cfg.json`` is written last, so a folder that contains one is complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    # A save that was killed leaves temporary files.
    for left_over in (*folder.glob(".tmp*"), *folder.glob(".*.tmp")):
        left_over.unlink()
    with atomic_replace(folder / saelens.WEIGHTS_FILE) as path:
        save_file(saelens.export_tensors(coder), path)
    if with_sparsify:
        with atomic_replace(folder / sparsify.WEIGHTS_FILE) as path:
            save_file(sparsify.export_tensors(coder), path)
    else:
        (folder / sparsify.WEIGHTS_FILE).unlink(missing_ok=True)
    config = {
        **sparsify.build_config(coder),
        **saelens.build_config(coder, metadata),
        "saetrain": {"format": FORMAT_VERSION, **metadata},
    }
    write_json(folder / CONFIG_FILE, config)


def load_sae(folder: Path) -> tuple[TopK, dict[str, Any]]:
    """Return (coder of raw activations, metadata) as they were given to :func:`save_sae`.

    Raises:
        SaetrainError: if ``folder`` contains no SAE in our format, or if a file is missing or damaged.
    """
    config = read_sae_config(folder)
    metadata = config.get("saetrain")
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT_VERSION:
        raise SaetrainError(
            f"{folder / CONFIG_FILE}: was not written by this version of saetrain "
            f"(no 'saetrain' entry of format {FORMAT_VERSION})"
        )
    for key in ("architecture", "d_in", "d_sae", "k"):
        if config.get(key) is None:
            raise SaetrainError(f"{folder / CONFIG_FILE}: has no key '{key}'")
    if config["architecture"] not in list(CODERS):
        raise SaetrainError(
            f"{folder / CONFIG_FILE}: architecture is {config['architecture']!r}; "
            f"this version supports {', '.join(CODERS)}"
        )
    d_in, num_latents, k = config["d_in"], config["d_sae"], config["k"]
    require_valid_k(folder / CONFIG_FILE, k, num_latents)
    path = folder / saelens.WEIGHTS_FILE
    try:
        weights = load_file(path)
        require_tensor_shapes(weights, saelens.DIM_LETTERS, num_latents, d_in)
    except FileNotFoundError as error:
        raise SaetrainError(f"{path}: is missing") from error
    except SafetensorError as error:
        raise SaetrainError(f"{path}: is damaged or truncated: {error}") from error
    except ValueError as error:
        raise SaetrainError(f"{path}: {error}") from error
    coder = CODERS[config["architecture"]](d_in, num_latents, k)
    with torch.no_grad():
        for name, parameter in coder.named_parameters():
            parameter.copy_(weights[name])
    return coder.requires_grad_(False), metadata


def require_valid_k(path: Path, k: int, num_latents: int) -> None:
    """Raise SaetrainError if k exceeds the number of latents."""
    if k > num_latents:
        raise SaetrainError(f"{path}: k is {k}, more than the {num_latents} latents")


def read_sae_config(folder: Path) -> dict[str, Any]:
    """Return the contents of ``cfg.json`` in ``folder``; raise SaetrainError if it is missing or invalid."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        inner_folders = sorted(str(found.parent) for found in folder.glob(f"**/{CONFIG_FILE}"))[:3]
        hint = f"; SAEs were found in {', '.join(inner_folders)}" if inner_folders else ""
        raise SaetrainError(f"{folder}: contains no SAE (no {CONFIG_FILE}){hint}") from error
    except OSError as error:
        raise SaetrainError(f"{path}: can't be read: {error.strerror}") from error
    except ValueError as error:
        raise SaetrainError(f"{path}: is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise SaetrainError(f"{path}: must be a JSON object")
    require_entry_types(path, config)
    return config
