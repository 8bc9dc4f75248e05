"""How alike the latents' decoder directions are, beside what random directions give."""

from __future__ import annotations

from torch import Tensor

from saetrain.metrics import decoder_redundancy, random_redundancy


def geometry_metrics(W_dec_FD: Tensor) -> dict[str, float]:
    """``decoder_redundancy_top100`` (mean of the 100 largest cosines between two latents) and its random baseline."""
    num_latents, d_in = W_dec_FD.shape
    return {
        "decoder_redundancy_top100": decoder_redundancy(W_dec_FD),
        "decoder_redundancy_top100_random": random_redundancy(d_in, num_latents),
    }
