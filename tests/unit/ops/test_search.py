"""The searches for the largest entries: the values of torch.topk, whatever the shape, the ties and the signs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saetrain.ops import sparse
from saetrain.ops.native import bindings as native


def search(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, k: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The native one, ``rows`` tokens at a time."""
    pre = torch.empty(rows, len(W), dtype=x.dtype)
    values, indices = torch.empty(len(x), k), torch.empty(len(x), k, dtype=torch.int32)
    native.encode_topk(x, W, b, pre, values, indices)
    return values, indices.long()


shapes = st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 900), st.integers(1, 40), st.integers(0, 99))


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_values_are_those_of_topk(shape: tuple[int, int, int, int, int]) -> None:
    tokens, width, latents, k, seed = shape
    k = min(k, latents)
    generator = torch.Generator().manual_seed(seed)
    # Small whole numbers make many ties, and every sum exact.
    x = torch.randint(-3, 4, (tokens, width), generator=generator).float()
    W = torch.randint(-3, 4, (latents, width), generator=generator).float()
    b = torch.randint(-2, 3, (latents,), generator=generator).float()
    pre = x @ W.T + b
    expected = pre.topk(k, dim=1).values.relu()
    for values, indices in (
        search(x, W, b, k, rows=7),
        search(x.bfloat16(), W.bfloat16(), b, k, rows=7),
        sparse.encode_topk(x, W, b, k),
        sparse.encode_topk(x.bfloat16(), W.bfloat16(), b, k),
    ):
        assert torch.equal(values.sort(dim=1).values, expected.sort(dim=1).values)
        assert torch.equal(pre.gather(1, indices).relu(), values)
        assert all(len(set(row)) == k for row in indices.tolist()), "an index twice"


@pytest.mark.parametrize("latents", [32, 33, 1000, 6144])
@pytest.mark.parametrize("k", [1, 2, 30, 32])
def test_two_stages_find_what_one_finds(latents: int, k: int) -> None:
    pre = torch.randn(50, latents, generator=torch.Generator().manual_seed(latents))
    values, indices = sparse.topk_two_stage(pre, k)
    assert torch.equal(values.sort(dim=1).values, pre.topk(k, dim=1).values.sort(dim=1).values)
    assert torch.equal(pre.gather(1, indices), values)


def test_group_sizes_leave_enough_groups() -> None:
    for latents in (1, 31, 200, 1000, 6144, 98304):
        for k in (1, 7, 32, 192):
            assert sparse.group_size(latents, k) == 1 or latents // sparse.group_size(latents, k) >= k


def test_native_search_takes_the_lower_index_among_equals() -> None:
    x, W, b = torch.ones(1, 1), torch.ones(50, 1), torch.zeros(50)
    values, indices = search(x, W, b, 3, rows=1)
    assert values.tolist() == [[1.0, 1.0, 1.0]]
    assert sorted(indices[0].tolist()) == [0, 1, 2]


def test_the_eigenvalue_is_never_too_small() -> None:
    for seed in range(5):
        rows = torch.randn(300, 40, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.01, 3, 40)
        exact = float(torch.linalg.eigvalsh((rows.T @ rows).double())[-1])
        for dtype in (torch.float32, torch.bfloat16):
            found = native.bound_largest_eigenvalue(rows.to(dtype))
            assert exact <= found < 3 * exact
