"""Search for the pre-activations near and above a threshold per latent by the C++ kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from saetrain.ops.native.bindings import load_library

GROWTH = 1.25
"""Factor by which more pairs fit than were found, so that the memory grows rarely."""


class ThresholdSearch:
    """Search for the pairs that a step of JumpReLU needs, in micro-batches of ``tokens``.

    ``values`` fp32, ``indices`` int32 and ``offsets`` (N + 1,) int64 are ragged codes. The pairs of token n up to
    ``active_stops[n]``, (N,) int64, are above their threshold; the others have the value 0. Both are in the order of
    the latents. ``values`` and ``indices`` are replaced by larger ones when the pairs do not fit.
    """

    def __init__(self, tokens: int, expected_l0: int) -> None:
        size = tokens * expected_l0
        self.values, self.indices = torch.empty(size), torch.empty(size, dtype=torch.int32)
        self.offsets = torch.zeros(tokens + 1, dtype=torch.long)
        self.active_stops = torch.zeros(tokens, dtype=torch.long)

    def run(
        self, x_ND: Tensor, W_enc_FD: Tensor, b_enc_F: Tensor, pre_CF: Tensor, floor_F: Tensor, threshold_F: Tensor
    ) -> None:
        """Find the pre-activations ``x W_encᵀ + b_enc`` that reach ``floor_F``, which is at most ``threshold_F``.

        ``pre_CF`` is a buffer for the pre-activations of C tokens.
        """
        library, is_bf16 = load_library(), x_ND.dtype == torch.bfloat16
        collect = library.saetrain_collect_above_bf16 if is_bf16 else library.saetrain_collect_above_f32
        used, start = 0, 0
        for chunk in x_ND.split(len(pre_CF)):
            out = torch.mm(chunk, W_enc_FD.T, out=pre_CF[: len(chunk)])
            inputs = (out.data_ptr(), b_enc_F.data_ptr(), floor_F.data_ptr(), threshold_F.data_ptr(), *out.shape, used)
            stops = self.offsets[start + 1 :].data_ptr(), self.active_stops[start:].data_ptr()
            while True:
                size, pairs = len(self.values), (self.values.data_ptr(), self.indices.data_ptr())
                total = collect(*inputs, size, *stops, *pairs, torch.get_num_threads())
                if total <= size:
                    break
                self._grow(int(GROWTH * total), used)
            used, start = total, start + len(chunk)

    def _grow(self, size: int, used: int) -> None:
        values, indices = self.values, self.indices
        self.values, self.indices = torch.empty(size), torch.empty(size, dtype=torch.int32)
        self.values[:used], self.indices[:used] = values[:used], indices[:used]
