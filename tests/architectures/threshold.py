"""Transcoder of a module with one threshold for all latents, an average over the steps, and ragged codes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from saetrain.coders import SparseCoder
from saetrain.types import INPUT_SUFFIX, Codes, Encoded, Site, StepContext

DECAY = 0.9
"""Weight of the earlier thresholds in the average."""


class Threshold(SparseCoder):
    """f = pre · (pre > threshold); training keeps the k largest per token, inference uses the threshold."""

    threshold: Tensor
    is_set: Tensor

    def __init__(self, d_in: int, num_latents: int, k: int, seed: int, d_out: int | None) -> None:
        super().__init__(d_in, num_latents, seed, d_out)
        self.k = k
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("is_set", torch.zeros((), dtype=torch.bool))

    @classmethod
    def build(cls, settings: Any, d_in: int, d_out: int | None = None, *, seed: int = 0) -> Threshold:
        return cls(d_in, settings.resolve_num_latents(d_in), settings.k, seed, d_out)

    @classmethod
    def build_sites(cls, hookpoints: Sequence[str]) -> list[Site]:
        return [Site((name + INPUT_SUFFIX,), (name,)) for name in hookpoints]

    saved_settings = ("k",)

    def encode(self, x_ND: Tensor) -> Codes:
        pre = torch.relu(self.pre_activations(x_ND))
        active = pre > self.threshold
        offsets = torch.cat([active.new_zeros(1, dtype=torch.long), active.sum(dim=1).cumsum(0)])
        return Codes(pre[active], active.nonzero()[:, 1], self.num_latents, offsets)

    def encode_train(self, x_ND: Tensor, ctx: StepContext) -> Encoded:
        values, indices = torch.relu(self.pre_activations(x_ND)).topk(self.k, dim=1, sorted=False)
        codes = Codes(values, indices, self.num_latents)
        smallest = values.detach().amin(dim=1)
        return Encoded(codes, sums={"smallest": smallest.sum(), "tokens": smallest.new_tensor(float(len(smallest)))})

    def after_step(self, sums: Mapping[str, Tensor], ctx: StepContext) -> None:
        mean = (sums["smallest"] / sums["tokens"]).to(self.threshold.dtype)
        self.threshold.copy_(torch.where(self.is_set, self.threshold.lerp(mean, 1 - DECAY), mean))
        self.is_set.fill_(True)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor], ctx: StepContext) -> None:
        pre = torch.cat([torch.relu(self.pre_activations(x_ND)).flatten() for x_ND in batches])
        n_kept = self.k * (len(pre) // self.num_latents)
        self.threshold.copy_(pre.kthvalue(max(1, len(pre) - n_kept)).values)

    def expected_l0(self) -> int:
        return self.k

    def scale_code_units_(self, factor: float) -> None:
        super().scale_code_units_(factor)
        self.threshold.mul_(factor)
