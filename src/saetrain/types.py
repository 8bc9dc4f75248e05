"""Types that pass between stages: token sequences, codes, coder outputs and the context of a step."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from enum import IntFlag
from typing import Any

import numpy as np
import torch
from torch import Tensor


def shown_default(text: str, metavar: str) -> Any:
    """Return an annotation that makes ``--help`` show ``text`` as the default of a setting that is computed later."""
    # The benchmarks of the training step run where only torch is installed.
    if importlib.util.find_spec("tyro") is None:
        return text
    import tyro

    return tyro.conf.arg(metavar=metavar, help_behavior_hint=f"(default: {text})")


Cursor = tuple[int, ...]
"""Position in a virtual shard of the text; only the source that created it interprets it."""

DATASET_ROW_BITS = 40
"""If several data sets are mixed, row r of data set i is document ``(i << DATASET_ROW_BITS) + r``."""


class TokenKind(IntFlag):
    """Kind of a position of a sequence, as flags; plain text is 0 and is always trained on."""

    TEXT = 0
    SPECIAL = 1
    """Token that the tokenizer or packing inserted (CLS, SEP, BOS, EOS), never the text itself."""
    FIRST = 2
    """Position 0 of a causal model, which attends only to itself and serves as an attention sink."""


@dataclass(frozen=True)
class TokenSequence:
    """One row of the model's input, without padding.

    ``ids`` (S,) are int32 token ids, ``kind`` (S,) are uint8 flags of :class:`TokenKind`, and ``doc`` (S,) is the int64
    row of the data set that each token comes from (see DATASET_ROW_BITS).
    """

    ids: np.ndarray
    kind: np.ndarray
    doc: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Codes:
    """Sparse or dense codes of N tokens.

    Sparse codes have ``values`` (N, K) fp32 and ``indices`` (N, K) int64. An entry with value 0 is inactive,
    whatever its index. Dense codes have ``values`` (N, F), and ``indices`` is None.
    """

    values: Tensor
    indices: Tensor | None
    n_latents: int

    def select_tokens(self, index: slice | Tensor) -> Codes:
        """Return the codes of the tokens that a slice or a tensor of positions selects."""
        return Codes(self.values[index], None if self.indices is None else self.indices[index], self.n_latents)

    def to_dense(self) -> Tensor:
        """Return the codes as a dense tensor (N, F)."""
        if self.indices is None:
            return self.values
        out = self.values.new_zeros(self.values.shape[0], self.n_latents)
        return out.scatter_(1, self.indices, self.values)

    def l0_per_token(self) -> Tensor:
        """Return the number of active latents per token, (N,) int64."""
        return (self.values != 0).sum(dim=1)

    def firing_counts(self) -> Tensor:
        """Return the number of tokens on which each latent fires, (F,) int64."""
        active = (self.values != 0).long()
        if self.indices is None:
            return active.sum(dim=0)
        counts = torch.zeros(self.n_latents, dtype=torch.long, device=active.device)
        return counts.scatter_add_(0, self.indices.reshape(-1), active.reshape(-1))


@dataclass(frozen=True)
class StepContext:
    """State of the run that a loss may use.

    The divisors of the loss terms are the same on every rank and in every micro-batch, so that the gradient does not
    depend on how the global batch is split.
    """

    step: int
    n_tokens: int
    """Tokens of the global batch, by which sums over tokens are divided."""
    dead_mask: Tensor | None
    """(F,) bool, latents that have not fired within the dead window; None if there are none."""
    data_variance: Tensor
    """Variance of the activations, summed over the width; fixed before training."""
    residual_variance: Tensor
    """Variance of the residual, summed over the width, from the previous optimizer step."""
    max_n_dead: int | None = None
    """Upper bound of the number of dead latents, if the host must not synchronize with the device; else None."""


@dataclass
class CoderOutput:
    """Output of one forward pass of a coder: codes, reconstruction (N, D), and named, weighted loss terms."""

    codes: Codes
    reconstruction: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)

    def total_loss(self) -> Tensor:
        """Return the sum of the loss terms, a scalar."""
        return torch.stack(list(self.losses.values())).sum()
