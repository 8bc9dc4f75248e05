"""The directory of one SAE: one ``cfg.json`` with SAELens' keys, sparsify's and ours; the weights in both layouts."""

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
"""Version of our own part of ``cfg.json``."""


def save_sae(folder: Path, coder: TopK, metadata: Mapping[str, Any], with_sparsify: bool = True) -> None:
    """Write a coder of raw activations to ``folder``; ``about`` says all that a reader needs to use it rightly.

    ``cfg.json`` is written last, so that a folder that has one is whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    # A save that was killed leaves what it had not yet renamed.
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
    """(a coder of raw activations, what :func:`save_sae` was told about it).

    Raises SaetrainError when ``folder`` holds no SAE of ours or its files are broken.
    """
    config = read_sae_config(folder)
    metadata = config.get("saetrain")
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT_VERSION:
        raise SaetrainError(
            f"{folder / CONFIG_FILE}: was not written by this version of saetrain (no 'saetrain' entry of format {FORMAT_VERSION})"
        )
    for key in ("architecture", "d_in", "d_sae", "k"):
        if config.get(key) is None:
            raise SaetrainError(f"{folder / CONFIG_FILE}: has no key '{key}'")
    if config["architecture"] not in list(CODERS):
        raise SaetrainError(
            f"{folder / CONFIG_FILE}: architecture is {config['architecture']!r}; this version knows {', '.join(CODERS)}"
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
        raise SaetrainError(f"{path}: is broken or cut short: {error}") from error
    except ValueError as error:
        raise SaetrainError(f"{path}: {error}") from error
    coder = CODERS[config["architecture"]](d_in, num_latents, k)
    with torch.no_grad():
        for name, parameter in coder.named_parameters():
            parameter.copy_(weights[name])
    return coder.requires_grad_(False), metadata


def require_valid_k(path: Path, k: int, num_latents: int) -> None:
    """SaetrainError for more active latents than there are."""
    if k > num_latents:
        raise SaetrainError(f"{path}: k is {k}, more than the {num_latents} latents")


def read_sae_config(folder: Path) -> dict[str, Any]:
    """``cfg.json`` of ``folder``; SaetrainError when there is none or it is broken."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        inner_folders = sorted(str(found.parent) for found in folder.glob(f"**/{CONFIG_FILE}"))[:3]
        hint = f"; there are some in {', '.join(inner_folders)}" if inner_folders else ""
        raise SaetrainError(f"{folder}: holds no SAE (no {CONFIG_FILE}){hint}") from error
    except OSError as error:
        raise SaetrainError(f"{path}: can't be read: {error.strerror}") from error
    except ValueError as error:
        raise SaetrainError(f"{path}: is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise SaetrainError(f"{path}: should be a JSON object")
    require_entry_types(path, config)
    return config
