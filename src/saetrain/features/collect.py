"""Collect the features of several SAEs in one pass of the model over a text, with memory that does not grow with it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from saetrain.activations.extract import ActivationExtractor, TokenClass, TokenPolicy
from saetrain.coders.base import SparseCoder
from saetrain.distributed import record_progress
from saetrain.features.pairs import PairFile, TokenStream
from saetrain.metrics import total_variance
from saetrain.ops.sparse import multiply_pairs
from saetrain.types import ModelBatch, Site

CHUNK_TOKENS = 1024
"""Tokens encoded at once; bounds the memory of the pre-activations (N, F)."""


@dataclass(frozen=True)
class Target:
    """A coder of raw activations, and what it reads and reconstructs."""

    site: Site
    coder: SparseCoder


class LatentSums:
    """Running sums over the tokens for one SAE, and the file of its pairs."""

    def __init__(self, target: Target, folder: Path) -> None:
        self.target = target
        self.pairs = PairFile(folder, target.coder.num_latents)
        zeros = torch.zeros(target.coder.num_latents, dtype=torch.float64)
        self._value, self._square, self._projection = zeros.clone(), zeros.clone(), zeros.clone()
        self._shift: Tensor | None = None
        self._y_sum, self._y_square, self._n_tokens = torch.zeros(target.coder.d_out, dtype=torch.float64), 0.0, 0

    def add_tokens(self, x_ND: Tensor, y_ND: Tensor, rows: np.ndarray) -> None:
        """Add the activations of N kept tokens, whose numbers in the stream are ``rows`` (N,) int64."""
        coder = self.target.coder
        codes = coder.encode(x_ND)
        # Any constant near the mean keeps the sums accurate.
        self._shift = y_ND.mean(dim=0) if self._shift is None else self._shift
        y_ND = y_ND - self._shift
        token, latent, value = codes.active_pairs()
        counts = torch.bincount(token, minlength=len(codes))
        offsets = counts.cumsum(0) - counts
        projection = multiply_pairs(y_ND, token, latent, offsets, coder.W_dec)
        latent = latent.cpu()
        for total, terms in (
            (self._value, value),
            (self._square, value.square()),
            (self._projection, value * projection),
        ):
            total.index_add_(0, latent, terms.double().cpu())
        # Sums over a chunk are accurate enough in fp32, because the activations are centred.
        self._y_sum += y_ND.sum(dim=0).double().cpu()
        self._y_square += float(torch.linalg.vector_norm(y_ND)) ** 2
        self._n_tokens += len(y_ND)
        self.pairs.append_pairs(latent.numpy(), rows[token.cpu().numpy()], value.cpu().numpy())

    @property
    def mean_l0(self) -> float:
        """Mean number of active latents per token."""
        return float(self.pairs.counts.sum() / self._n_tokens)

    def variance_explained(self) -> np.ndarray:
        """Return the share of the variance of y that each latent explains alone, (F,) fp32.

        With f the activation, d the decoder row and m the mean of y: (2 E[f d·(y - m)] - E[f²] ‖d‖²) / E‖y - m‖².
        """
        W_dec = self.target.coder.W_dec.detach().double().cpu()
        mean = self._y_sum / self._n_tokens
        explained = 2 * (self._projection - self._value * (W_dec @ mean)) - self._square * W_dec.square().sum(dim=1)
        variance = total_variance(self._y_sum, torch.tensor(self._y_square), torch.tensor(self._n_tokens))
        return (explained / variance).float().numpy()


@torch.no_grad()
def read_text(
    targets: Mapping[str, Target],
    extractor: ActivationExtractor,
    batches: Iterable[ModelBatch],
    folder: Path,
    on_progress: Callable[[int], object] = lambda tokens: None,
) -> tuple[TokenStream, dict[str, LatentSums]]:
    """Run the model once over ``batches``, and return the tokens and {SAE: sums and pairs}.

    ``folder``: where the temporary files are written; ``on_progress``: called with the number of tokens per batch.
    """
    stream = TokenStream(folder / "stream")
    sums = {
        name: LatentSums(target, folder / f"pairs{number}") for number, (name, target) in enumerate(targets.items())
    }
    own, shared = itertools.tee(batches)
    for sequences, batch in zip(own, extractor.iterate_labelled(shared), strict=True):
        n_tokens = sum(map(len, sequences))
        is_kept = batch.token_class == TokenClass.KEPT
        # Tokens that are not kept may lack activations that are finite.
        assert batch.rows is not None
        kept = np.zeros(n_tokens, dtype=bool)
        kept[batch.rows[is_kept]] = True
        rows = len(stream) + np.flatnonzero(kept)
        stream.append_tokens(sequences, kept)
        chosen = torch.from_numpy(np.flatnonzero(is_kept))
        for start in range(0, len(rows), CHUNK_TOKENS):
            record_progress()
            part = chosen[start : start + CHUNK_TOKENS]
            captured = {name: value[part.to(value.device)].float() for name, value in batch.values.items()}
            for each in sums.values():
                each.add_tokens(*each.target.site.select_xy(captured), rows[start : start + CHUNK_TOKENS])
        on_progress(n_tokens)
    for each in sums.values():
        each.pairs.write_pending()
    return stream, sums


def limit_tokens(batches: Iterable[ModelBatch], keep: TokenPolicy, tokens: int) -> Iterator[ModelBatch]:
    """Yield batches until they have ``tokens`` tokens that ``keep`` keeps; the last batch ends after that sequence."""
    left = tokens
    for batch in batches:
        chosen: ModelBatch = []
        for sequence in batch:
            if left <= 0:
                break
            chosen.append(sequence)
            left -= int(keep(sequence).sum())
        if chosen:
            yield chosen
        if left <= 0:
            return
