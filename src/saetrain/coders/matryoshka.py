"""Matryoshka BatchTopK SAE: Bussmann et al., Learning multi-level features with Matryoshka SAEs, arXiv 2503.17547."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from saetrain.coders.batchtopk import BatchTopK, BatchTopKSettings
from saetrain.errors import SaetrainError
from saetrain.losses import squared_error
from saetrain.ops import count_offsets, decode_codes
from saetrain.settings import Range
from saetrain.types import Codes, Encoded, StepContext

PREFIXES = "prefixes"
"""Key of the training code's cache for the reconstructions of the prefixes, which :meth:`Matryoshka.decode` adds."""


ROUNDING = 1e-6
"""Excess over a whole number of latents that is a rounding error of the product, such as 0.07 x 100."""


@dataclass(frozen=True, kw_only=True)
class MatryoshkaSettings(BatchTopKSettings):
    """SAE: size and sparsity."""

    prefixes: tuple[Annotated[float, Range(0, 1, above=True)], ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    """Shares of the latents that reconstruct on their own: increasing, the last one 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        increases = all(low < high for low, high in zip(self.prefixes, self.prefixes[1:], strict=False))
        if not self.prefixes or self.prefixes[-1] != 1 or not increases:
            shown = " ".join(f"{share:g}" for share in self.prefixes)
            raise SaetrainError(f"--prefixes {shown}: must increase and end with 1, for example 0.25 0.5 1")

    def resolve_prefixes(self, num_latents: int) -> tuple[int, ...]:
        """Return the number of latents of each prefix; raises SaetrainError if two are equal."""
        sizes = tuple(math.ceil(share * num_latents - ROUNDING) for share in self.prefixes)
        if len(set(sizes)) < len(sizes):
            raise SaetrainError(
                f"--prefixes: of {num_latents} latents, two prefixes have {min(sizes)}; pass fewer shares"
            )
        return sizes


class Matryoshka(BatchTopK):
    """BatchTopK coder whose first latents also reconstruct without the later ones, so that they are more general.

    Loss: Σ over prefixes m of the FVU of x̂_m = Σ_{i < m} f_i W_dec[i] + b_dec (arXiv 2503.17547 §3; SAELens' sum), with
    the code f of BatchTopK. ``recon`` is the last prefix, the whole reconstruction; ``nested`` is the sum of the
    others. Adam does not notice that it is a sum and not a mean; clipping (--max_grad_norm) sees a larger gradient.
    """

    Settings = MatryoshkaSettings

    def __init__(
        self,
        d_in: int,
        num_latents: int,
        k: int,
        prefix_sizes: Sequence[int],
        auxk_alpha: float = 0.0,
        seed: int = 0,
        d_out: int | None = None,
    ) -> None:
        super().__init__(d_in, num_latents, k, auxk_alpha, seed, d_out)
        assert prefix_sizes[-1] == num_latents, prefix_sizes
        self.prefix_sizes = tuple(prefix_sizes)

    @classmethod
    def build(cls, settings: Any, d_in: int, d_out: int | None = None, *, seed: int = 0) -> Matryoshka:
        """Return a coder with initial weights."""
        num_latents = settings.resolve_num_latents(d_in)
        sizes = settings.resolve_prefixes(num_latents)
        return cls(d_in, num_latents, settings.k, sizes, settings.auxk_alpha, seed, d_out)

    def encode_train(self, x_ND: Tensor, ctx: StepContext) -> Encoded:
        """Return the code of BatchTopK, which :meth:`decode` decodes prefix by prefix."""
        encoded = super().encode_train(x_ND, ctx)
        codes = encoded.codes
        # A cache of its own, because the products keep theirs as long as the graph that the prefixes are part of.
        nested = Codes(codes.values, codes.indices, codes.n_latents, codes.offsets, {PREFIXES: None})
        return Encoded(nested, encoded.extras, encoded.sums)

    def decode(self, codes: Codes, x_ND: Tensor | None = None) -> Tensor:
        """Return the whole reconstruction; of a training code, add those of the prefixes to the cache."""
        if PREFIXES not in codes.cache:
            return super().decode(codes, x_ND)
        prefixes_PND = self._decode_prefixes(codes)
        codes.cache[PREFIXES] = prefixes_PND
        return prefixes_PND[-1]

    def _decode_prefixes(self, codes: Codes) -> Tensor:
        """Return the reconstructions of all prefixes, (number, N, D_out): the running sum over segments of latents."""
        assert codes.indices is not None
        tokens, segments = len(codes), len(self.prefix_sizes)
        ends = torch.tensor(self.prefix_sizes, device=codes.indices.device)
        row_P = torch.bucketize(codes.indices, ends, right=True) * tokens + codes.token_of_pair()
        order = row_P.argsort(stable=True)
        offsets = count_offsets(row_P, segments * tokens)
        by_segment = Codes(codes.values[order], codes.indices[order], codes.n_latents, offsets)
        decoded = decode_codes(by_segment, self.W_dec).view(segments, tokens, self.d_out)
        return decoded.cumsum(dim=0) + self.b_dec

    def losses(self, y_ND: Tensor, encoded: Encoded, y_hat_ND: Tensor, ctx: StepContext) -> dict[str, Tensor]:
        """Return the terms of BatchTopK, and ``nested``: the sum of the FVU of all prefixes but the whole."""
        terms = super().losses(y_ND, encoded, y_hat_ND, ctx)
        inner_PND = encoded.codes.cache[PREFIXES][:-1]
        error = squared_error(y_ND.expand_as(inner_PND), inner_PND)
        return {**terms, "nested": error / (ctx.n_tokens * ctx.data_variance)}
