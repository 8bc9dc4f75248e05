"""Which tokens a masked language model has to guess: a fixed share, chosen by a hash of the document and position."""

from __future__ import annotations

import numpy as np
import xxhash

from saetrain.types import TokenKind, TokenSequence

MASKED_SHARE = 0.15
"""Devlin et al., BERT (arXiv 1810.04805 §3.1). All are replaced by the mask token, none by a random or its own one."""


def select_masked_positions(sequence: TokenSequence, seed: int, share: float = MASKED_SHARE) -> np.ndarray:
    """(S,) bool. The same for a sequence whatever it is batched with; never a special token."""
    key = xxhash.xxh3_64(sequence.ids.tobytes(), seed).intdigest()
    position = np.arange(len(sequence), dtype=np.uint64)
    drawn = mix_bits(sequence.doc.astype(np.uint64) ^ mix_bits(position + np.uint64(key)))
    return np.asarray((drawn < np.uint64(int(share * 2**64))) & (sequence.kind == TokenKind.TEXT))


def mix_bits(values: np.ndarray) -> np.ndarray:
    """A well mixed uint64 of each uint64: the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))
