"""Triton's kernels against plain PyTorch: on the GPU, or by its interpreter where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from saetrain.ops.triton import launch as triton_launch
from tests.unit.ops.conftest import DEVICE


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def topk_of(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """By sorting: the larger first, of equals the lower index, then in the order of the indices."""
    order = torch.sort(pre, dim=1, descending=True, stable=True).indices[:, :k]
    indices = order.sort(dim=1).values
    return pre.gather(1, indices).relu(), indices


def product(pre: Tensor) -> tuple[Tensor, Tensor]:
    """Factors whose product is ``pre`` itself."""
    return pre, torch.eye(pre.shape[1], dtype=pre.dtype, device=pre.device)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "latents", "k"), [(5, 77, 1), (3, 77, 77), (4, 1300, 5), (3, 600, 100), (1, 1, 1)])
@pytest.mark.parametrize("block", [32, 1024])
def test_the_k_largest_in_the_order_of_their_latents(
    block: int, rows: int, latents: int, k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``block``: small, many latents share a group."""
    monkeypatch.setattr(triton_launch, "BLOCK", block)
    pre, bias = numbers(rows, latents).to(dtype), 0.3 * numbers(latents, seed=1)
    values, indices = triton_launch.encode_topk(*product(pre), bias, k)
    expected, wanted = topk_of(pre.float() + bias, k)
    assert torch.equal(indices.long(), wanted)
    assert torch.equal(values, expected)


@pytest.mark.parametrize("k", [1, 7, 40])
def test_of_equals_the_first_are_taken(k: int) -> None:
    pre = numbers(6, 300).round()
    values, indices = triton_launch.encode_topk(*product(pre), pre.new_zeros(300), k)
    expected, wanted = topk_of(pre, k)
    assert torch.equal(indices.long(), wanted)
    assert torch.equal(values, expected)


def test_more_candidates_than_there_is_room_for() -> None:
    """Rows of equals: every entry reaches the bound, and the row itself is searched."""
    pre = torch.ones(3, 1100, device=DEVICE)
    pre[1, 1000], pre[2, 5:7] = 2.0, -1.0
    values, indices = triton_launch.encode_topk(*product(pre), pre.new_zeros(1100), 4)
    assert indices.tolist() == [[0, 1, 2, 3], [0, 1, 2, 1000], [0, 1, 2, 3]]
    assert values.tolist() == [[1.0] * 4, [1.0, 1.0, 1.0, 2.0], [1.0] * 4]


@pytest.mark.slow
def test_rows_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "CHUNK_BYTES", 4 * 60 * 20)
    pre = numbers(45, 60)
    values, indices = triton_launch.encode_topk(*product(pre), pre.new_zeros(60), 3)
    expected, wanted = topk_of(pre, 3)
    assert torch.equal(indices.long(), wanted)
    assert torch.equal(values, expected)


def test_what_is_not_a_number_is_handed_on() -> None:
    """So that the loss shows it."""
    pre = numbers(2, 50)
    pre[0, 3] = float("nan")
    values, _ = triton_launch.encode_topk(*product(pre), pre.new_zeros(50), 4)
    assert values[0].isnan().any()
    assert values[1].isfinite().all()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("tokens", "width", "latents", "k"), [(5, 33, 77, 7), (3, 1, 4, 4), (2, 1500, 20, 3)])
def test_residual_and_slopes(tokens: int, width: int, latents: int, k: int, half: bool) -> None:
    x, W = numbers(tokens, width), numbers(latents, width, seed=2)
    W = W.bfloat16() if half else W
    values = numbers(tokens, k, seed=3).relu()
    indices = torch.stack([torch.randperm(latents)[:k] for _ in range(tokens)]).int().to(DEVICE)
    scale = torch.tensor(0.7, device=DEVICE)
    residual, copy, slopes, norms = triton_launch.compute_residuals(x, W, values, indices, scale)
    expected = x - torch.einsum("nk,nkd->nd", values, W.float()[indices.long()])
    torch.testing.assert_close(residual, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(copy, residual.to(W.dtype))
    torch.testing.assert_close(norms, residual.norm(dim=1))
    wanted = -0.7 * torch.einsum("nd,nkd->nk", residual, W.float()[indices.long()]) * (values > 0)
    torch.testing.assert_close(slopes, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("segment", [2, 3, 256])
def test_pairs_lie_latent_by_latent_and_in_segments(segment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "SEGMENT_PAIRS", segment)
    tokens, latents, k = 9, 6, 3
    indices = torch.stack([torch.randperm(latents)[:k] for _ in range(tokens)]).int()
    indices[:, 0] = 2
    values = numbers(tokens, k).cpu().relu() + 0.0
    pairs = triton_launch.sort_pairs(*(t.to(DEVICE) for t in (values, indices, -values)), latents)
    starts = pairs.starts.tolist()
    for latent in range(latents):
        own = [(n, float(values[n, j])) for n in range(tokens) for j in range(k)
               if indices[n, j] == latent and values[n, j] > 0]  # fmt: skip
        found = slice(starts[latent], starts[latent + 1])
        assert list(zip(pairs.token[found].tolist(), pairs.value[found].tolist(), strict=True)) == own
        assert torch.equal(pairs.grad_pre[found], -pairs.value[found])
        pieces = [i for i, owner in enumerate(pairs.segment_latent.tolist()) if owner == latent]
        assert len(pieces) == (-(-len(own) // segment) if len(own) > segment else 0)
        assert pieces == list(range(int(pairs.segment_starts[latent]), int(pairs.segment_starts[latent + 1])))
        assert [int(pairs.segment_first[i]) for i in pieces] == [
            starts[latent] + segment * i for i in range(len(pieces))
        ]


@pytest.mark.parametrize("segment", [2, 256])
def test_rows_of_segments_and_bounds(segment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "SEGMENT_PAIRS", segment)
    tokens, width, latents, k = 12, 9, 5, 2
    x, residual, slopes = numbers(tokens, width), numbers(tokens, width, seed=1), numbers(tokens, k, seed=2)
    values = numbers(tokens, k, seed=3).abs()
    indices = torch.stack([torch.randperm(latents)[:k] for _ in range(tokens)]).int().to(DEVICE)
    scale = torch.tensor(0.5, device=DEVICE)
    pairs = triton_launch.sort_pairs(values, indices, slopes, latents)
    bias, squares = triton_launch.bound_latent_norms(pairs, x.norm(dim=1), residual.norm(dim=1), scale)
    enc, dec = triton_launch.sum_segments(pairs, x, residual, scale)
    for latent in range(latents):
        mine = indices == latent
        value, slope = (values * mine).sum(dim=1), (slopes * mine).sum(dim=1)
        torch.testing.assert_close(bias[latent], slope.sum(), rtol=1e-4, atol=1e-5)
        rows = {"enc": slope @ x, "dec": -0.5 * value @ residual}
        assert squares[latent] * 1.0001 >= sum(row.square().sum() for row in rows.values()) + bias[latent] ** 2
        first, last = int(pairs.segment_starts[latent]), int(pairs.segment_starts[latent + 1])
        if last > first:
            torch.testing.assert_close(enc[first:last].sum(dim=0), rows["enc"], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(dec[first:last].sum(dim=0), rows["dec"], rtol=1e-4, atol=1e-5)
    assert (int(pairs.segment_starts[-1]) > 0) == (segment == 2)
