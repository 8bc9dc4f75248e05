"""``saetrain.load``: wrong inputs are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from saetrain.coders.topk import TopK
from saetrain.errors import SaetrainError
from saetrain.interop.metadata import SaeMetadata
from saetrain.sae import SAE


@pytest.mark.parametrize(
    ("activations", "found"),
    [([1, 2], "found a list"), (torch.zeros(4), r"found \(4,\)"), (torch.zeros(2, 5), r"found \(2, 5\)")],
)
def test_encode_names_the_expected_shape(activations: torch.Tensor, found: str) -> None:
    sae = SAE(TopK(4, 8, 2, 0.0, 42), SaeMetadata(hookpoint="h.0", model="gpt2"), Path("sae"))
    with pytest.raises(SaetrainError, match=r"expected a tensor of activations of shape \(N, 4\), " + found):
        sae.encode(activations)
