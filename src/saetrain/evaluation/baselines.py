"""Baselines for the metrics of a coder: the mean, PCA with as many numbers per token, and a random decoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saetrain.types import Codes

RANDOM_DECODER, PCA_RECONSTRUCTION, MEAN_RECONSTRUCTION = "random_decoder", "pca", "mean"
"""Names of the baselines."""
MAX_GATHERED_ELEMENTS = 1 << 24
"""Largest number of decoder elements that least squares gathers at once; bounds its memory."""
RIDGE = 1e-5
"""Added to the diagonal of the Gram matrix, because about D selected directions may be nearly dependent."""


class RunningMoments:
    """Running mean and covariance of activations (N, D), in fp64."""

    def __init__(self, d_in: int, device: torch.device) -> None:
        self._sum = torch.zeros(d_in, dtype=torch.float64, device=device)
        self._products = torch.zeros(d_in, d_in, dtype=torch.float64, device=device)
        self.n_tokens = 0

    def add(self, x_ND: Tensor) -> None:
        """Add a batch of activations (N, D)."""
        x = x_ND.double()
        self._sum += x.sum(dim=0)
        self._products.addmm_(x.T, x)
        self.n_tokens += len(x)

    def compute_mean(self) -> Tensor:
        """Return the mean, (D,) in fp32."""
        return (self._sum / self.n_tokens).float()

    def principal_directions(self, rank: int) -> Tensor:
        """Return the orthonormal directions of largest variance, (D, min(rank, D)) in fp32."""
        mean = self._sum / self.n_tokens
        covariance = self._products / self.n_tokens - torch.outer(mean, mean)
        _, vectors = torch.linalg.eigh(covariance)
        return vectors[:, -min(rank, len(mean)) :].float()


@dataclass(frozen=True)
class PCA:
    """PCA as an autoencoder: x̂ = m + V Vᵀ (x - m), with ``mean`` m (D,) and ``basis`` V (D, rank)."""

    mean: Tensor
    basis: Tensor

    def __call__(self, x_ND: Tensor) -> Tensor:
        """Return the reconstruction of ``x_ND``, (N, D)."""
        return self.mean + (x_ND - self.mean) @ self.basis @ self.basis.T


@dataclass(frozen=True)
class RandomDecoder:
    """An untrained SAE: select the l0 directions with the largest inner product with x - m, then fit least squares.

    ``mean`` m has shape (D,), ``directions`` has shape (F, D) and rows of unit norm.
    """

    mean: Tensor
    directions: Tensor
    l0: int

    @staticmethod
    def from_seed(mean: Tensor, num_latents: int, l0: int, seed: int) -> RandomDecoder:
        """Draw ``num_latents`` directions from ``seed``, uniformly on the unit sphere."""
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(num_latents, len(mean), generator=generator)
        return RandomDecoder(mean, torch.nn.functional.normalize(directions, dim=1).to(mean.device), l0)

    def encode(self, x_ND: Tensor) -> Codes:
        """Return the selected directions per token, with their inner products (negative ones as 0)."""
        values, indices = ((x_ND - self.mean) @ self.directions.T).topk(self.l0, dim=1)
        return Codes(values.relu(), indices, len(self.directions))

    def decode(self, codes: Codes, x_ND: Tensor) -> Tensor:
        """Return the least-squares reconstruction of ``x_ND`` from the directions that ``codes`` select, (N, D)."""
        assert codes.indices is not None, "the codes of a random decoder are sparse"
        chunk_tokens = max(1, MAX_GATHERED_ELEMENTS // (self.l0 * len(self.mean)))
        chunks = zip(codes.indices.split(chunk_tokens), (x_ND - self.mean).split(chunk_tokens), strict=True)
        return torch.cat([self.mean + self._fit_least_squares(indices, x) for indices, x in chunks])

    def _fit_least_squares(self, indices: Tensor, x: Tensor) -> Tensor:
        rows = self.directions[indices]
        if rows.shape[1] > rows.shape[2]:
            # With l0 > D the l0 x l0 Gram matrix is singular, so the D x D one is solved instead.
            gram = rows.transpose(1, 2) @ rows
            return x - RIDGE * _solve_ridge(gram, x.unsqueeze(2)).squeeze(2)
        weights = _solve_ridge(rows @ rows.transpose(1, 2), rows @ x.unsqueeze(2))
        return (rows.transpose(1, 2) @ weights).squeeze(2)

    def __call__(self, x_ND: Tensor) -> Tensor:
        """Return the reconstruction of ``x_ND``, (N, D)."""
        return self.decode(self.encode(x_ND), x_ND)


@dataclass(frozen=True)
class Baselines:
    """The baselines of a coder; ``mean`` (D,) is the mean of the training tokens."""

    mean: Tensor
    pca: PCA
    random_decoder: RandomDecoder

    @staticmethod
    def from_moments(moments: RunningMoments, num_latents: int, l0: float, seed: int) -> Baselines:
        """Build the baselines of a coder with ``num_latents`` latents, of which ``l0`` are active per token."""
        mean, n_active = moments.compute_mean(), min(max(1, round(l0)), num_latents)
        random_decoder = RandomDecoder.from_seed(mean, num_latents, n_active, seed)
        return Baselines(mean, PCA(mean, moments.principal_directions(n_active)), random_decoder)


def _solve_ridge(gram: Tensor, right_side: Tensor) -> Tensor:
    """Return (gram + RIDGE I)⁻¹ right_side; ``gram`` is modified in place."""
    gram.diagonal(dim1=1, dim2=2).add_(RIDGE)
    return torch.cholesky_solve(right_side, torch.linalg.cholesky(gram))
