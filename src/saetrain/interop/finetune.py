"""Fine-tuning: initialize a coder from a saved SAE of saetrain, SAELens or sparsify."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saetrain.coders.topk import TopK
from saetrain.errors import SaetrainError
from saetrain.interop import saelens
from saetrain.interop.load import read_weights

NORM_SPREAD_TOLERANCE = 1e-3
"""Relative spread of decoder norms that is treated as rounding; larger if the dtype of the file rounds more."""


def load_for_finetune(path: str, hookpoint: str, coder: TopK, model_sha256: str | None = None) -> str | None:
    """Copy the weights of the SAE in ``path`` (or in ``path/hookpoint``) into ``coder``, for raw activations.

    Returns:
        A warning if the SAE was trained on a model with other weights than ``model_sha256``, else None.

    Raises:
        SaetrainError: if there is no SAE, if its architecture, hookpoint, k or size differs from that of ``coder``,
            or if its decoder can't be normalized without changing its codes.
    """
    folder = Path(path)
    if not (folder / "cfg.json").exists():
        available = sorted(path.parent.name for path in folder.glob("*/cfg.json"))
        if available and hookpoint not in available:
            raise SaetrainError(f"--finetune {folder}: contains no SAE of {hookpoint}, only of {', '.join(available)}")
        folder = folder / hookpoint if available else folder
    try:
        config, weights = read_weights(folder)
    except SaetrainError as error:
        raise SaetrainError(f"--finetune {error}") from error
    _check_hookpoint(folder, config, hookpoint)
    k = config.get("k")
    if k != coder.k:
        raise SaetrainError(f"--finetune {folder}: its k is {k}, --k is {coder.k}; give --k {k}")
    _check_shapes(folder, weights, coder)
    tolerance = max(NORM_SPREAD_TOLERANCE, 4 * torch.finfo(weights["W_dec"].dtype).eps)
    weights = {name: value.float() for name, value in weights.items()}
    _normalize_decoder(folder, weights, tolerance, ranked_by_norm=bool(config.get("rescale_acts_by_decoder_norm")))
    with torch.no_grad():
        for name, parameter in coder.named_parameters():
            parameter.copy_(weights[name])
    trained_on = (config.get("saetrain") or {}).get("model_weights_sha256")
    if trained_on and model_sha256 and trained_on != model_sha256:
        return f"--finetune {folder}: was trained on a model with other weights (SHA-256 {trained_on[:12]}…)"
    return None


def _check_hookpoint(folder: Path, config: dict[str, Any], hookpoint: str) -> None:
    """Raise SaetrainError if the SAE's metadata names another hookpoint."""
    metadata = config.get("metadata") or {}
    own_hookpoint, hf_hookpoint = (config.get("saetrain") or {}).get("hookpoint"), metadata.get("hf_hook_name")
    saved_hookpoint = own_hookpoint or hf_hookpoint
    if (
        saved_hookpoint
        and saved_hookpoint != hookpoint
        and (own_hookpoint or saelens.resolve_module_name(saved_hookpoint, [hookpoint]) is None)
    ):
        raise SaetrainError(
            f"--finetune {folder}: it is an SAE of {saved_hookpoint}, the run trains {hookpoint}; give a folder with "
            "one subfolder per hookpoint, or select the SAE's hookpoint with --layers or --hookpoints"
        )


def _check_shapes(folder: Path, weights: dict[str, Tensor], coder: TopK) -> None:
    num_latents, d_in = weights["W_dec"].shape
    if d_in != coder.d_in:
        raise SaetrainError(
            f"--finetune {folder}: it takes activations of width {d_in}, the hookpoint has width {coder.d_in}; give an "
            "SAE of this model and hookpoint, not of another model"
        )
    if num_latents != coder.num_latents:
        raise SaetrainError(
            f"--finetune {folder}: it has {num_latents} latents, the settings ask for {coder.num_latents}; "
            f"give --num_latents {num_latents}"
        )


def _normalize_decoder(folder: Path, weights: dict[str, Tensor], tolerance: float, *, ranked_by_norm: bool) -> None:
    """Move the norms of the decoder rows into the encoder, in place, so that all rows have unit norm.

    The k largest latents of every token stay the same if all norms are equal, or if the SAE ranks latents by value
    times norm (``ranked_by_norm``). Otherwise a SaetrainError is raised.
    """
    norms = weights["W_dec"].norm(dim=1)
    if bool((norms <= 0).any()):
        raise SaetrainError(f"--finetune {folder}: {int((norms <= 0).sum())} of its decoder rows are zero")
    spread = float((norms.max() - norms.min()) / norms.mean())
    if not ranked_by_norm:
        if spread > tolerance:
            raise SaetrainError(
                f"--finetune {folder}: its decoder rows have norms from {norms.min():.3g} to {norms.max():.3g}; "
                "scaling them to 1 would change which latents are the k largest, so it can't be fine-tuned"
            )
        norms = norms.mean().expand_as(norms)
    weights["W_enc"] *= norms
    weights["b_enc"] *= norms
    weights["W_dec"] /= weights["W_dec"].norm(dim=1, keepdim=True)
