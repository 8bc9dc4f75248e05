"""Types that pass between stages: token sequences, codes, coder outputs and the context of a step."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from enum import IntFlag
from typing import Any, Protocol

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


class Affine(Protocol):
    """The map x' = ((x - mean) / scale) axes."""

    @property
    def mean(self) -> Tensor:
        """Mean of the raw activations, (D,)."""

    @property
    def scale(self) -> float:
        """Divisor of all dimensions."""

    @property
    def axes(self) -> Tensor:
        """Orthonormal columns, (D, D)."""


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
    """Codes of N tokens over F latents, in one of three layouts. A latent is active on a token if its value is not 0.

    Sparse: ``values`` (N, K) fp32 and ``indices`` (N, K) int64. An entry with value 0 is inactive, whatever its index.
    Ragged: ``values`` (P,), ``indices`` (P,), and ``offsets`` (N + 1,) int64; token n has the pairs ``offsets[n]`` to
    ``offsets[n + 1]``. Dense: ``values`` (N, F); ``indices`` is None. ``cache`` holds results that several products
    over the same codes share.
    """

    values: Tensor
    indices: Tensor | None
    n_latents: int
    offsets: Tensor | None = None
    cache: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.values) if self.offsets is None else len(self.offsets) - 1

    def select_tokens(self, index: slice | Tensor) -> Codes:
        """Return the codes of the tokens that a slice or a tensor of positions selects."""
        if self.offsets is None:
            return Codes(self.values[index], None if self.indices is None else self.indices[index], self.n_latents)
        assert self.indices is not None
        tokens = torch.arange(len(self), device=self.offsets.device)[index]
        starts, lengths = self.offsets[:-1][tokens], self.offsets.diff()[tokens]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        pairs = torch.arange(int(offsets[-1]), device=offsets.device)
        pairs += (starts - offsets[:-1]).repeat_interleave(lengths)
        return Codes(self.values[pairs], self.indices[pairs], self.n_latents, offsets)

    def to_dense(self) -> Tensor:
        """Return the codes as a dense tensor (N, F)."""
        if self.indices is None:
            return self.values
        out = self.values.new_zeros(len(self), self.n_latents)
        if self.offsets is None:
            return out.scatter_(1, self.indices, self.values)
        out[self.token_of_pair(), self.indices] = self.values
        return out

    def token_of_pair(self) -> Tensor:
        """Return the token of each pair of ragged codes, (P,) int64."""
        assert self.offsets is not None
        return torch.arange(len(self), device=self.offsets.device).repeat_interleave(self.offsets.diff())

    def l0_per_token(self) -> Tensor:
        """Return the number of active latents per token, (N,) int64."""
        active = self.values != 0
        if self.offsets is None:
            return active.sum(dim=1)
        counts = torch.zeros(len(self), dtype=torch.long, device=active.device)
        return counts.scatter_add_(0, self.token_of_pair(), active.long())

    def firing_counts(self) -> Tensor:
        """Return the number of tokens on which each latent is active, (F,) int64."""
        active = (self.values != 0).long()
        if self.indices is None:
            return active.sum(dim=0)
        counts = torch.zeros(self.n_latents, dtype=torch.long, device=active.device)
        return counts.scatter_add_(0, self.indices.reshape(-1), active.reshape(-1))


@dataclass(frozen=True)
class Encoded:
    """Result of a coder's training forward pass.

    ``extras``: tensors that the coder's losses need besides the codes, such as pre-activations. ``sums``: sums over
    the tokens, which are added up over micro-batches and ranks and passed to :meth:`SparseCoder.after_step`.
    """

    codes: Codes
    extras: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StepContext:
    """State of the run that a loss may use.

    The divisors of the loss terms are the same on every rank and in every micro-batch, so that the gradient does not
    depend on how the global batch is split.
    """

    step: int
    """Number of the step, from 0."""
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
    total_steps: int = 0
    """Optimizer steps of the whole run."""
