"""Decoder geometry: cosines between the directions of latents, next to those of random directions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from saetrain.metrics import (
    expected_random_duplicates,
    expected_random_max_cosine,
    expected_random_redundancy,
    top_and_max_decoder_cosines,
)

BASELINE_SEED = 0
LATENTS_PER_BLOCK = 4096
NEAR_DUPLICATE_COSINE = 0.9
"""Cosine between the decoder rows of two latents above which they count as near duplicates."""


@torch.no_grad()
def geometry_metrics(W_enc_DF: Tensor, W_dec_FD: Tensor) -> dict[str, tuple[float, float]]:
    """Return {metric: (value, expected value for random directions)} of the cosines between latents.

    The cosine between encoder and decoder is nan if their widths D differ.
    """
    num_latents, d_out = W_dec_FD.shape
    top_cosines, max_cosines = top_and_max_decoder_cosines(W_dec_FD)
    max_cosine = float(max_cosines.mean()) if num_latents > 1 else math.nan
    duplicates = float((max_cosines > NEAR_DUPLICATE_COSINE).double().mean())
    out = {
        "decoder_redundancy_top100": (float(top_cosines.mean()), expected_random_redundancy(d_out, num_latents)),
        "decoder_max_cosine": (max_cosine, expected_random_max_cosine(d_out, num_latents)),
        "decoder_near_duplicates": (
            duplicates,
            expected_random_duplicates(d_out, num_latents, NEAR_DUPLICATE_COSINE),
        ),
        "encoder_decoder_cosine": (math.nan, math.nan),
    }
    if len(W_enc_DF) == d_out:
        encoder_cosine = float(torch.cosine_similarity(W_enc_DF.T, W_dec_FD, dim=1).mean())
        out["encoder_decoder_cosine"] = encoder_cosine, _random_encoder_cosine(W_enc_DF)
    return out


def _random_encoder_cosine(W_enc_DF: Tensor) -> float:
    """Return the mean cosine between encoder columns and random directions, drawn in blocks to bound memory."""
    generator = torch.Generator().manual_seed(BASELINE_SEED)
    cosine_sum, (d_in, num_latents) = 0.0, W_enc_DF.shape
    for start in range(0, num_latents, LATENTS_PER_BLOCK):
        block = W_enc_DF[:, start : start + LATENTS_PER_BLOCK].T
        directions = torch.randn(len(block), d_in, generator=generator).to(block.device)
        cosine_sum += float(torch.cosine_similarity(block, directions, dim=1).sum())
    return cosine_sum / num_latents
