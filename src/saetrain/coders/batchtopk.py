"""BatchTopK SAE: Bussmann, Leask, Nanda, BatchTopK sparse autoencoders, arXiv 2412.06410."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saetrain.coders.auxk import AuxKCoder, AuxKSettings
from saetrain.coders.base import GroupSettings
from saetrain.ops import linear_above, select_largest
from saetrain.types import Codes, Encoded, StepContext, TokenGroups

THRESHOLD_DECAY = 0.99
"""Weight of the earlier steps in the running average of the threshold."""
FLOOR_SHARE = 0.5
"""Share of the threshold below which a pre-activation is not searched, unless the search finds too few above it."""


@dataclass(frozen=True, kw_only=True)
class BatchTopKSettings(AuxKSettings, GroupSettings):
    """SAE: size and sparsity."""


class GroupSelector:
    """Selects the k·G largest of the pre-activations above a floor, in each group of G tokens.

    ``smallest_G``: the smallest selected entry of each group, fp32, or 0 if fewer than k·G entries are positive.
    ``wanted_G``: k times the tokens of each group, int64.
    """

    smallest_G: Tensor

    def __init__(self, groups: TokenGroups, k: int, num_latents: int) -> None:
        self._groups, self._num_latents = groups, num_latents
        self.wanted_G = k * groups.count_tokens()
        self._is_first_search = True

    def __call__(self, values_P: Tensor, latent_P: Tensor, token_P: Tensor) -> Tensor | None:
        """Return the entries to keep, (P,) bool; None after the first search if it may have missed some."""
        groups = self._groups
        group_P = groups.group_N[token_P]
        if self._is_first_search:
            self._is_first_search = False
            found_G = torch.zeros_like(self.wanted_G).scatter_add_(0, group_P, torch.ones_like(group_P))
            groups.sum_over_ranks(found_G)
            if bool((found_G < self.wanted_G).any()):
                return None
        # Ties are broken in the sample order, so that the selection does not depend on the order of the rows.
        order_P = (groups.position_N[token_P] % groups.group_tokens) * self._num_latents + latent_P
        max_order = groups.group_tokens * self._num_latents
        selection = select_largest(values_P, group_P, order_P, self.wanted_G, max_order, groups.sum_over_ranks)
        self.smallest_G = selection.smallest_G
        return selection.mask_P


class BatchTopK(AuxKCoder):
    """BatchTopK coder: z = W_enc (x - b_dec) + b_enc, x̂ = W_dec f + b_dec.

    Training: f = ReLU(z) for the k·G largest entries of a group of G consecutive tokens, else 0. The decoder has unit
    norms, so the entries need no weights. Inference: f = z·1[z > threshold], token by token.

    ``threshold`` is in the unit of the code. While training it is the running average over groups of the smallest entry
    that was kept, for evaluations; :meth:`calibrate` sets it at the end. It is fp32 because it is compared with fp32
    pre-activations; an average that rounds to 1e-7 of its value changes no code.
    """

    Settings = BatchTopKSettings
    lr_scale = 1.0
    saved_settings = ("k",)
    threshold: Tensor

    def __init__(
        self, d_in: int, num_latents: int, k: int, auxk_alpha: float = 0.0, seed: int = 0, d_out: int | None = None
    ) -> None:
        super().__init__(d_in, num_latents, seed, d_out)
        assert 1 <= k <= num_latents, (k, num_latents)
        self.k, self.auxk_alpha = k, auxk_alpha
        self.register_buffer("threshold", torch.zeros(()))

    @classmethod
    def build(cls, settings: Any, d_in: int, d_out: int | None = None, *, seed: int = 0) -> BatchTopK:
        """Return a coder with initial weights."""
        return cls(d_in, settings.resolve_num_latents(d_in), settings.k, settings.auxk_alpha, seed, d_out)

    def encode(self, x_ND: Tensor) -> Codes:
        """Return the pre-activations above the threshold."""
        return self._encode_above(x_ND, self.threshold)

    def encode_train(self, x_ND: Tensor, ctx: StepContext) -> Encoded:
        """Return the k·G largest positive pre-activations of each group.

        Sums: ``smallest`` kept entries, added up over ``groups``, the number of groups.
        """
        groups = ctx.groups or TokenGroups.of_micro_batch(x_ND)
        selector = GroupSelector(groups, self.k, self.num_latents)
        codes = self._encode_above(x_ND, FLOOR_SHARE * self.threshold, selector)
        # A group without tokens, such as one of padding, has no smallest entry.
        n_groups = (selector.wanted_G > 0).sum()
        return Encoded(codes, {"x": x_ND}, self.sum_thresholds(selector.smallest_G, n_groups, groups))

    @staticmethod
    def sum_thresholds(smallest_G: Tensor, n_groups: Tensor, groups: TokenGroups) -> dict[str, Tensor]:
        """Return the sums of :meth:`encode_train`: the smallest kept entries, and the number of groups with tokens."""
        sums = {"smallest": smallest_G.double().sum(), "groups": n_groups.double()}
        return {name: value * groups.is_first_rank for name, value in sums.items()}

    def _encode_above(self, x_ND: Tensor, floor: Tensor, keep: GroupSelector | None = None) -> Codes:
        assert x_ND.shape[1] == self.d_in, tuple(x_ND.shape)
        return linear_above(x_ND, self.W_enc.T, self.b_enc, floor, self.b_dec if self.is_sae else None, keep)

    def after_step(self, sums: Mapping[str, Tensor], ctx: StepContext) -> None:
        """Average the smallest kept entry over the groups of this step and earlier ones."""
        mean = (sums["smallest"] / sums["groups"].clamp_min(1)).to(self.threshold)
        self.threshold.lerp_(mean, max(1 - THRESHOLD_DECAY, 1 / (ctx.step + 1)))

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor], ctx: StepContext) -> None:
        """Set the threshold so that the mean L0 over the tokens of ``batches`` is k, except for ties."""
        batches = list(batches)
        wanted = self.k * sum(map(len, batches)) + 1
        for floor in (FLOOR_SHARE * self.threshold, torch.zeros_like(self.threshold)):
            values = torch.cat([self._encode_above(x_ND, floor).values for x_ND in batches])
            if len(values) >= wanted:
                self.threshold.copy_(values.kthvalue(len(values) - wanted + 1).values)
                return
        # All positive pre-activations are fewer than k per token.
        self.threshold.zero_()

    def scale_code_units_(self, factor: float | Tensor) -> None:
        """Multiply the biases and the threshold."""
        super().scale_code_units_(factor)
        self.threshold.mul_(factor)

    def expected_l0(self) -> int:
        """Return k, the mean L0."""
        return self.k
