"""Comparison of an SAE in two libraries on the same activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saetrain.coders import SparseCoder

MAX_DIFFERENCE = 1e-5
"""Largest difference of codes and outputs, relative to the root mean square of the activations."""
MIN_SAME_SHARE = 0.999
"""Smallest share of the tokens on which the same latents fire. A pre-activation next to a threshold may round to either
side of it; on other tokens codes and outputs must be equal."""


@dataclass(frozen=True)
class Agreement:
    """Share of the tokens on which the same latents fire, largest differences there, and the L0 in both libraries."""

    same: float
    code: float
    output: float
    l0_ours: float
    l0_theirs: float

    def check(self) -> None:
        """Fail unless the SAE computes the same in both libraries."""
        print(self)
        assert self.same >= MIN_SAME_SHARE, self
        assert max(self.code, self.output) <= MAX_DIFFERENCE, self
        assert self.l0_ours > 0, self
        assert abs(self.l0_ours - self.l0_theirs) <= (1 - MIN_SAME_SHARE) * self.l0_ours, self


@torch.no_grad()
def compare_outputs(coder: SparseCoder, code_NF: Tensor, output_ND: Tensor, x_ND: Tensor) -> Agreement:
    """Compare a coder with another library's code and output of the same activations."""
    own = coder.encode(x_ND)
    rms, own_NF = x_ND.square().mean().sqrt(), own.to_dense()
    same_N = ((own_NF != 0) == (code_NF != 0)).all(dim=1)
    return Agreement(
        float(same_N.float().mean()),
        float((own_NF - code_NF)[same_N].abs().max() / rms),
        float((coder.decode(own) - output_ND)[same_N].abs().max() / rms),
        float((own_NF != 0).sum() / len(x_ND)),
        float((code_NF != 0).sum() / len(x_ND)),
    )
