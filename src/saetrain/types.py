"""Types that pass between stages: token sequences, codes, coder outputs and the context of a step."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
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


@dataclass(frozen=True)
class Site:
    """Hookpoints whose activations a coder reads (``inputs``) and reconstructs (``outputs``); an SAE has the same.

    A hookpoint is the name of a module, which stands for its output, or the name and INPUT_SUFFIX for its input.
    Activations of several hookpoints are concatenated along the width.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @classmethod
    def of_sae(cls, hookpoint: str) -> Site:
        """Return the site of an SAE."""
        return cls((hookpoint,), (hookpoint,))

    @property
    def name(self) -> str:
        """Name of the site in a run: its outputs."""
        return self.y_name

    @property
    def x_name(self) -> str:
        """Name of the concatenated inputs."""
        return "+".join(self.inputs)

    @property
    def y_name(self) -> str:
        """Name of the concatenated outputs."""
        return "+".join(self.outputs)

    @property
    def is_sae(self) -> bool:
        """Whether the coder reconstructs its own input."""
        return self.inputs == self.outputs

    @property
    def hookpoints(self) -> tuple[str, ...]:
        """All hookpoints, each once."""
        return tuple(dict.fromkeys((*self.inputs, *self.outputs)))

    def select_xy(self, activations: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the coder's input (…, D_in) and what it reconstructs (…, D_out), one tensor for an SAE."""
        x, y = (
            activations[names[0]] if len(names) == 1 else torch.cat([activations[name] for name in names], dim=-1)
            for names in (self.inputs, self.outputs)
        )
        return x, (x if self.is_sae else y)

    def sum_widths(self, by_hookpoint: Mapping[str, int]) -> tuple[int, int]:
        """Return (D_in, D_out), given {hookpoint: D}."""
        return sum(by_hookpoint[name] for name in self.inputs), sum(by_hookpoint[name] for name in self.outputs)


INPUT_SUFFIX = ":in"
"""Ending of the name of a hookpoint that stands for the input of a module."""


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


ModelBatch = list[TokenSequence]
"""Sequences that go through the model together; the bits of their activations may depend on one another."""


def group_by_length(lengths: np.ndarray | list[int], tokens: int) -> list[np.ndarray]:
    """Group sequences of similar length: each group has at most ``tokens`` padded tokens, or one sequence.

    Return the numbers of the sequences in each group, int64; the longest sequences come first.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    order, start, groups = np.argsort(-lengths, kind="stable"), 0, []
    while start < len(order):
        stop = start + max(1, tokens // max(1, int(lengths[order[start]])))
        groups.append(order[start:stop])
        start = stop
    return groups


def batch_by_length(sequences: list[TokenSequence], tokens: int) -> list[ModelBatch]:
    """Return the groups of :func:`group_by_length`."""
    groups = group_by_length([len(sequence) for sequence in sequences], tokens)
    return [[sequences[number] for number in group] for group in groups]


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

    def active_pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (token, latent, value) of the P active pairs, in the order of the tokens: int64, int64, fp32."""
        active = self.values != 0
        if self.offsets is not None:
            assert self.indices is not None
            return self.token_of_pair()[active], self.indices[active], self.values[active].float()
        pair = active.flatten().nonzero().squeeze(1)
        columns = active.shape[1]
        latent = pair % columns if self.indices is None else self.indices.flatten()[pair]
        return pair.div(columns, rounding_mode="floor"), latent, self.values.flatten()[pair].float()

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
class TokenGroups:
    """Groups of consecutive tokens of the sample order, in which a coder may select latents together.

    A micro-batch holds ``n_groups`` whole groups of ``group_tokens``. Its rows may be in any order and on several
    ranks. ``position_N`` (N,) int64: position of each row in the sample order, from the start of the micro-batch.
    ``sum_over_ranks`` adds an int64 tensor in place over the ranks that hold the other rows, if ``is_shared``.
    ``is_first_rank``: whether this rank counts what these ranks know in common.
    """

    position_N: Tensor
    group_tokens: int
    n_groups: int
    sum_over_ranks: Callable[[Tensor], object] = lambda tensor: None
    is_first_rank: bool = True
    is_shared: bool = False

    @classmethod
    def of_micro_batch(cls, x_ND: Tensor) -> TokenGroups:
        """Return the whole micro-batch as one group."""
        return cls(torch.arange(len(x_ND), device=x_ND.device), len(x_ND), 1)

    @property
    def group_N(self) -> Tensor:
        """Number of each row's group, (N,) int64."""
        return self.position_N.div(self.group_tokens, rounding_mode="floor")

    def sort_rows(self, x_ND: Tensor) -> tuple[TokenGroups, Tensor]:
        """Return the groups and the rows in the sample order."""
        if bool((self.position_N.diff() > 0).all()):
            return self, x_ND
        order_N = self.position_N.argsort()
        return replace(self, position_N=self.position_N[order_N]), x_ND[order_N]

    def count_tokens(self) -> Tensor:
        """Return the number of tokens of each group over all ranks, (G,) int64."""
        counts = self.position_N.new_zeros(self.n_groups)
        counts.scatter_add_(0, self.group_N, torch.ones_like(self.position_N))
        self.sum_over_ranks(counts)
        return counts


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
    groups: TokenGroups | None = None
    """Groups of the micro-batch's tokens, for coders whose settings are :class:`GroupSettings`; None: one group."""
