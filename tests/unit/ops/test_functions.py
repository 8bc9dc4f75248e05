"""Reconstructions are fp32, whatever the layout of the code and the dtype of the products."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from saetrain.ops import decode_codes, functions, linear_above, linear_topk
from saetrain.types import Codes


@pytest.mark.parametrize("layout", ["dense", "sparse", "ragged"])
def test_a_reconstruction_under_autocast_is_fp32(layout: str) -> None:
    indices = torch.tensor([[0, 2], [1, 3]])
    codes = Codes(torch.rand(2, 2), indices, 4)
    if layout == "dense":
        codes = Codes(codes.to_dense(), None, 4)
    if layout == "ragged":
        codes = Codes(codes.values.flatten(), indices.flatten(), 4, torch.tensor([0, 2, 4]))
    weight = torch.randn(4, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = decode_codes(codes, weight)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, codes.to_dense() @ weight, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("encode", [partial(linear_topk, k=8), partial(linear_above, floor=torch.tensor(1.0))])
def test_chunks_of_plain_products_equal_one_product(encode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(*shape, generator=generator) for shape in ((100, 16), (64, 16), (64,)))
    with torch.no_grad():
        whole = encode(x, W, b).to_dense()
        monkeypatch.setattr(functions, "MAX_PLAIN_ENTRIES", 7 * 64)
        torch.testing.assert_close(encode(x, W, b).to_dense(), whole)
