"""Fine-tuning: initialize a coder from a saved SAE in any of the formats."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from saetrain.activations.hookpoints import resolve_module_name
from saetrain.coders import INFERENCE_CODERS, SparseCoder
from saetrain.errors import SaetrainError
from saetrain.interop.formats import ONLY_SAE, find_sae_folders, load_sae
from saetrain.interop.saetrain_format import describe_coder

NORM_SPREAD_TOLERANCE = 1e-3
"""Relative spread of decoder norms that is treated as rounding; larger if the weights were rounded to fewer bits."""


def initialize_from_sae(
    coder: SparseCoder, path: str, hookpoint: str, module_names: Collection[str], model_sha256: str | None = None
) -> str | None:
    """Copy the weights of the SAE in ``path`` (or in ``path/hookpoint``) into ``coder``, for raw activations.

    ``module_names``: the model's modules, one of which is ``hookpoint``.

    Returns:
        A warning if the SAE was trained on a model with other weights than ``model_sha256``, else None.

    Raises:
        SaetrainError: if there is no SAE, if its hookpoint, architecture, size or settings differ from those of
            ``coder``, or if its decoder can't be normalized without changing its codes.
    """
    folder = Path(path)
    found = find_sae_folders(folder)
    if found and ONLY_SAE not in found:
        if hookpoint not in found:
            raise SaetrainError(f"--finetune {folder}: contains no SAE of {hookpoint}, only of {', '.join(found)}")
        folder = found[hookpoint]
    try:
        saved, metadata = load_sae(folder)
    except SaetrainError as error:
        raise SaetrainError(f"--finetune {error}") from error
    if metadata.hookpoint and resolve_module_name(metadata.hookpoint, module_names) != hookpoint:
        raise SaetrainError(
            f"--finetune {folder}: it is an SAE of {metadata.hookpoint}, the run trains {hookpoint}; give a folder "
            "with one subfolder per hookpoint, or select the SAE's hookpoint with --layers or --hookpoints"
        )
    _require_fit(folder, saved, coder)
    if coder.has_unit_norm_decoder:
        _normalize_decoder(folder, saved)
    own = coder.state_dict()
    for name, value in saved.state_dict().items():
        own[name].copy_(value)
    trained_on = metadata.model_weights_sha256
    if trained_on and model_sha256 and trained_on != model_sha256:
        return f"--finetune {folder}: was trained on a model with other weights (SHA-256 {trained_on[:12]}…)"
    return None


def _require_fit(folder: Path, saved: SparseCoder, coder: SparseCoder) -> None:
    """Raise SaetrainError if the saved coder has another architecture, size or setting than ``coder``."""
    found, wanted = _describe_fit(saved), _describe_fit(coder)
    for key in found | wanted:
        value, needed = found.get(key), wanted.get(key)
        if value == needed or key in coder.recorded_settings:
            continue
        if key == "is_sae":
            kinds = {True: "an SAE", False: "a coder of two different activations, such as a transcoder"}
            raise SaetrainError(
                f"--finetune {folder}: it is {kinds[saved.is_sae]}, but the run trains {kinds[coder.is_sae]}"
            )
        advice = f"give --{'num_latents' if key == 'd_sae' else key} {value}"
        if key == "architecture" and value in INFERENCE_CODERS:
            advice = "saetrain can't train it"
        elif key in ("d_in", "d_out"):
            advice = "give an SAE of this model and hookpoint, not of another model"
        raise SaetrainError(f"--finetune {folder}: its {key} is {value}, the run needs {needed}; {advice}")


def _describe_fit(coder: SparseCoder) -> dict[str, Any]:
    """Return what two coders must share, with the entries that a file omits if they follow from others."""
    described = describe_coder(coder)
    kind = {"architecture": described["architecture"], "is_sae": coder.is_sae, "d_in": coder.d_in}
    return {**kind, "d_out": coder.d_out, **described}


def _normalize_decoder(folder: Path, coder: SparseCoder) -> None:
    """Move the norms of the decoder rows into the encoder, so that all rows have unit norm.

    The active latents of every token stay the same: if latents compete, a SaetrainError is raised unless all norms are
    equal.
    """
    norms = coder.W_dec.norm(dim=1)
    if bool((norms <= 0).any()):
        raise SaetrainError(f"--finetune {folder}: {int((norms <= 0).sum())} of its decoder rows are zero")
    spread = float((norms.max() - norms.min()) / norms.mean())
    # The narrowest dtype that holds all values is the one to which they were probably rounded.
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    exact = (dtype for dtype in dtypes if torch.equal(coder.W_dec.to(dtype).float(), coder.W_dec))
    if coder.latents_compete and spread > max(NORM_SPREAD_TOLERANCE, 4 * torch.finfo(next(exact, torch.float32)).eps):
        raise SaetrainError(
            f"--finetune {folder}: its decoder rows have norms from {norms.min():.3g} to {norms.max():.3g}; "
            "scaling them to 1 would change which latents are active, so it can't be fine-tuned"
        )
    factor = norms.mean() if coder.latents_compete else norms
    coder.W_enc.mul_(factor)
    coder.scale_code_units_(factor)
    coder.W_dec.div_(norms.unsqueeze(1))
