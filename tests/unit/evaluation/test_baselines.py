"""The nulls against textbook algebra on whole arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saetrain.evaluation.baselines import PCA, RandomDecoder, RunningMoments


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    """Correlated tokens with a mean far from zero."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(24, 24, generator=generator) * torch.linspace(3, 0.1, 24)
    return torch.randn(500, 24, generator=generator) @ mix.T + 20


def moments(x: torch.Tensor, batches: int) -> RunningMoments:
    out = RunningMoments(x.shape[1], x.device)
    for part in x.chunk(batches):
        out.add(part)
    return out


@pytest.mark.parametrize("rank", [1, 5, 24, 40])
def test_pca_equals_the_singular_value_decomposition(x: torch.Tensor, rank: int) -> None:
    found = moments(x, 7)
    mean = x.double().mean(dim=0)
    torch.testing.assert_close(found.compute_mean(), mean.float())
    _, _, directions = np.linalg.svd((x.double() - mean).numpy(), full_matrices=False)
    basis = torch.from_numpy(directions[:rank].T)
    by_svd = mean + (x.double() - mean) @ basis @ basis.T
    ours = PCA(found.compute_mean(), found.principal_directions(rank))(x)
    torch.testing.assert_close(ours, by_svd.float(), atol=1e-3, rtol=1e-4)
    low_rank = torch.pca_lowrank(x.double(), q=24, niter=10)[2][:, :rank]
    by_library = mean + (x.double() - mean) @ low_rank @ low_rank.T
    torch.testing.assert_close(ours, by_library.float(), atol=1e-3, rtol=1e-4)
    if rank < 24:
        assert (ours - x).norm() > 0.01 * (x - mean).norm()


def test_moments_do_not_depend_on_the_batches(x: torch.Tensor) -> None:
    one, many = moments(x, 1), moments(x, 100)
    torch.testing.assert_close(one.compute_mean(), many.compute_mean())
    projectors = [m.principal_directions(6) @ m.principal_directions(6).T for m in (one, many)]
    torch.testing.assert_close(*projectors, atol=1e-6, rtol=1e-5)


def test_a_random_decoder_equals_least_squares_on_its_support(x: torch.Tensor) -> None:
    decoder = RandomDecoder.from_seed(x.mean(dim=0), 200, 6, seed=1)
    codes = decoder.encode(x)
    ours = decoder(x)
    assert codes.indices is not None
    for token in range(0, len(x), 25):
        centred = (x[token].double() - decoder.mean.double()).numpy()
        inner = decoder.directions.double().numpy() @ centred
        support = np.argsort(-inner)[:6]
        assert set(support) == set(codes.indices[token].tolist())
        weights, *_ = np.linalg.lstsq(decoder.directions[support].double().numpy().T, centred, rcond=None)
        by_hand = decoder.mean.double().numpy() + decoder.directions[support].double().numpy().T @ weights
        np.testing.assert_allclose(ours[token].numpy(), by_hand, atol=1e-3 * np.abs(centred).max())
        assert codes.values[token].tolist() == pytest.approx(np.maximum(np.sort(inner)[::-1][:6], 0), rel=1e-4)
    assert (ours - x).norm() < (decoder.mean - x).norm()


def test_its_directions_are_uniform_of_unit_norm_and_the_seeds(x: torch.Tensor) -> None:
    decoder = RandomDecoder.from_seed(x.mean(dim=0), 5000, 6, seed=1)
    torch.testing.assert_close(decoder.directions.norm(dim=1), torch.ones(5000))
    assert float(decoder.directions.mean(dim=0).norm()) < 0.05
    assert torch.equal(decoder.directions, RandomDecoder.from_seed(x.mean(dim=0), 5000, 6, seed=1).directions)
    assert not torch.equal(decoder.directions, RandomDecoder.from_seed(x.mean(dim=0), 5000, 6, seed=2).directions)


@pytest.mark.parametrize(
    ("d_in", "num_latents", "l0"),
    [(24, 200, 24), (24, 200, 25), (24, 24, 24), (24, 4096, 2000), (4, 4096, 2048), (2, 64, 64), (1, 8, 3), (1, 1, 1)],
)
def test_as_many_directions_as_dimensions_rebuild_everything(
    x: torch.Tensor, d_in: int, num_latents: int, l0: int
) -> None:
    part = x[:60, :d_in].contiguous()
    decoder = RandomDecoder.from_seed(part.mean(dim=0), num_latents, l0, seed=0)
    ours = decoder(part)
    assert torch.isfinite(ours).all()
    spread = (part - decoder.mean).norm()
    # As many random directions as dimensions may be nearly dependent, and the ridge then keeps something back.
    assert float((ours - part).norm() / spread) < (0.2 if l0 == d_in else 0.01)


def test_no_token_gives_no_reconstruction(x: torch.Tensor) -> None:
    assert RandomDecoder.from_seed(x.mean(dim=0), 50, 6, seed=0)(x[:0]).shape == (0, 24)
    assert RandomDecoder.from_seed(x.mean(dim=0), 50, 30, seed=0)(x[:0]).shape == (0, 24)


def test_pieces_change_nothing(x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = RandomDecoder.from_seed(x.mean(dim=0), 100, 6, seed=0)
    whole = decoder(x)
    monkeypatch.setattr("saetrain.evaluation.baselines.MAX_GATHERED_ELEMENTS", 1000)
    torch.testing.assert_close(decoder(x), whole)
