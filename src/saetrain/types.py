"""The few types that pass between stages: token sequences, codes, and what an objective may know of the run."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from enum import IntFlag
from typing import Any

import numpy as np
import torch
from torch import Tensor


def shown_default(text: str, metavar: str) -> Any:
    """Annotation for a setting whose unset value is worked out later: what ``--help`` shows in its place."""
    # The step itself needs no command line: it is timed where nothing but torch is installed.
    if importlib.util.find_spec("tyro") is None:
        return text
    import tyro

    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {text})")


Cursor = tuple[int, ...]
"""Where a virtual shard of the text stands; opaque to all but the source that gave it out."""

DATASET_ROW_BITS = 40
"""Where several data sets are mixed, row r of data set i is document ``(i << PART_BITS) + r``."""


class TokenKind(IntFlag):
    """What a position of a sequence is; plain text is 0 and always trained on."""

    TEXT = 0
    SPECIAL = 1
    """Put there by the tokenizer or by packing (CLS, SEP, BOS, EOS), never by the text itself."""
    FIRST = 2
    """Position 0 of a causal model, which attends to nothing but itself and serves as an attention sink."""


@dataclass(frozen=True)
class TokenSequence:
    """One row of the model's input, without padding.

    ``ids`` (S,) int32 token ids; ``kind`` (S,) uint8 flags of :class:`TokenKind`; ``doc`` (S,) int64 row of the data
    set that each token came from (see PART_BITS).
    """

    ids: np.ndarray
    kind: np.ndarray
    doc: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Codes:
    """A sparse or dense code of N tokens.

    Sparse: ``values`` (N, K) fp32 >= 0 and ``indices`` (N, K) int64; an entry with value 0 is inactive wherever
    its index points. Dense: ``values`` (N, F) and ``indices`` None.
    """

    values: Tensor
    indices: Tensor | None
    n_latents: int

    def select_tokens(self, index: slice | Tensor) -> Codes:
        """The code of some of the tokens, by a slice or by their numbers."""
        return Codes(self.values[index], None if self.indices is None else self.indices[index], self.n_latents)

    def to_dense(self) -> Tensor:
        """The code as (N, F)."""
        if self.indices is None:
            return self.values
        out = self.values.new_zeros(self.values.shape[0], self.n_latents)
        return out.scatter_(1, self.indices, self.values)

    def l0_per_token(self) -> Tensor:
        """Active latents of each token, (N,) int64."""
        return (self.values > 0).sum(dim=1)

    def firing_counts(self) -> Tensor:
        """Tokens on which each latent is active, (F,) int64."""
        active = (self.values > 0).long()
        if self.indices is None:
            return active.sum(dim=0)
        counts = torch.zeros(self.n_latents, dtype=torch.long, device=active.device)
        return counts.scatter_add_(0, self.indices.reshape(-1), active.reshape(-1))


@dataclass(frozen=True)
class StepContext:
    """All that an objective may know about the run.

    The normalisers come from outside and are the same on every rank and in every micro-step, so that splitting
    a batch changes no gradient.
    """

    step: int
    n_tokens: int
    """Tokens of the whole optimizer step, over micro-steps and ranks: what sums are divided by."""
    dead_mask: Tensor | None
    """(F,) bool, latents that have not fired within the window; None when there are none."""
    data_variance: Tensor
    """Mean squared distance of a token from the mean, summed over the width; fixed before training."""
    residual_variance: Tensor
    """The same of the residual, measured on the previous optimizer step."""
    max_n_dead: int | None = None
    """No fewer than are dead, where the host is not to ask the device how many are."""


@dataclass
class CoderOutput:
    """What one forward of a coder gives: the code, the reconstruction (N, D), and named, weighted loss terms."""

    codes: Codes
    reconstruction: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)

    def total_loss(self) -> Tensor:
        """The sum of the terms: what is differentiated."""
        return torch.stack(list(self.losses.values())).sum()
