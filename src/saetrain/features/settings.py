"""Settings of the collection of features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from saetrain.settings import DEFAULT_LOSS_TOKENS, MAX_SIZE, Range, Settings, Total
from saetrain.types import shown_default

DEFAULT_FEATURE_TOKENS = 200_000
MAX_FEATURE_TOKENS = 1 << 30
"""Rows of the token stream are int32."""


@dataclass(frozen=True, kw_only=True)
class FeatureSettings(Settings):
    """Features: what each latent fires on, and what it does."""

    feature_tokens: Annotated[
        Annotated[int, Range(0, MAX_FEATURE_TOKENS)] | None,
        shown_default(f"{DEFAULT_FEATURE_TOKENS}, at most the tokens that the SAE was trained on", "INT"),
    ] = None
    """Tokens on which the features of all latents are collected at the end (0: none)."""
    ablate_latents: Annotated[int, Range(0, MAX_SIZE)] = 0
    """Latents per SAE whose effect on the model's loss is measured by ablation (one forward pass each)."""
    ablate_tokens: Annotated[
        Total | None,
        shown_default(f"{DEFAULT_LOSS_TOKENS['cpu']} on a CPU, {DEFAULT_LOSS_TOKENS['cuda']} on a GPU", "INT"),
    ] = None
    """Tokens on which each of these latents is ablated, at most --feature_tokens; more give narrower intervals."""
    distinct_documents: bool = True
    """Choose the strongest contexts of a latent from different documents first."""
