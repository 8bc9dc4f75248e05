"""Masking for masked language models: a fixed share of positions, chosen by a hash of sequence and position."""

from __future__ import annotations

import numpy as np
import xxhash

from saetrain.types import TokenKind, TokenSequence

MASKED_SHARE = 0.15
"""Share of masked tokens (Devlin et al. 2018, arXiv 1810.04805 §3.1). All of them are replaced by the mask token; BERT
replaces some by random tokens or leaves them."""


def select_masked_positions(sequence: TokenSequence, seed: int, share: float = MASKED_SHARE) -> np.ndarray:
    """Return (S,) bool: the positions to mask, never a special token.

    The choice depends on the sequence and ``seed`` only, not on the batch.
    """
    key = xxhash.xxh3_64(sequence.ids.tobytes(), seed).intdigest()
    position = np.arange(len(sequence), dtype=np.uint64)
    drawn = mix_bits(sequence.doc.astype(np.uint64) ^ mix_bits(position + np.uint64(key)))
    return np.asarray((drawn < np.uint64(int(share * 2**64))) & (sequence.kind == TokenKind.TEXT))


def mix_bits(values: np.ndarray) -> np.ndarray:
    """Hash each uint64 to a uint64 with the finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))
