"""Random SAEs on small models, and what ``saetrain explore`` answers about them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from saetrain.coders.topk import TopK
from saetrain.config import EvaluateConfig
from saetrain.explore.prompt import PromptModel
from saetrain.interop.formats import save_sae
from saetrain.interop.metadata import SaeMetadata
from saetrain.runs.evaluate.load_saes import load_saes
from saetrain.runs.evaluate.setup import build_eval_context

D, F, K = 32, 96, 6


def write_random_saes(run: Path, model: str, hookpoints: Sequence[str], causal: bool, **metadata: Any) -> None:
    """Write SAEs with random weights at hookpoints of ``model`` to ``run/sae``."""
    for number, name in enumerate(hookpoints):
        coder = TopK(D, F, K, seed=number)
        torch.manual_seed(number)
        coder.b_dec.data.normal_(std=0.1)
        described = {"ctx_len": 32, "exclude_special_tokens": True, "exclude_sinks": causal, **metadata}
        save_sae(run / "sae" / name, coder, SaeMetadata(model=model, hookpoint=name, causal=causal, **described))


def build_prompt_model(run: Path, model: str, hookpoints: Sequence[str], causal: bool, **metadata: Any) -> PromptModel:
    """Write random SAEs, and return the model that answers about them."""
    write_random_saes(run, model, hookpoints, causal, **metadata)
    return open_prompt_model(run)


def open_prompt_model(run: Path) -> PromptModel:
    """Return the model that answers about the SAEs in ``run``."""
    config = EvaluateConfig(path=str(run))
    return PromptModel(build_eval_context(config, load_saes(str(run)), None))
