"""Batches of sequences for a language model, with the positions to replace and to score, and the correct tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saetrain.activations.capture import pad_batch
from saetrain.activations.extract import TokenPolicy
from saetrain.activations.lm_head import LMHeadModel, token_log_probs
from saetrain.activations.mlm_masking import select_masked_positions
from saetrain.types import ModelBatch, TokenSequence

MAX_LOGITS = 1 << 26
"""Largest number of logits per batch of an evaluation, tokens times V; bounds the memory."""


@dataclass(frozen=True)
class LMBatch:
    """A batch of B sequences, padded to the longest.

    ``input_ids`` and ``attention_mask`` are (B, S) int64. ``keep_mask`` (B, S) bool marks the n positions that the
    token policy keeps, and ``kept_docs`` (n,) int64 are their documents. ``scored_mask`` (B, S) bool marks the m
    positions whose output is scored. ``targets`` (m,) int64 are the correct tokens there, and ``target_docs`` (m,)
    int64 the documents of those tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor
    keep_mask: Tensor
    kept_docs: np.ndarray
    scored_mask: Tensor
    targets: Tensor
    target_docs: np.ndarray


class LMBatchBuilder:
    """Builds the batches that ``head`` is scored on.

    A causal model is scored on every position with a next token, a masked model on the masked positions, a model
    without a head on all positions. ``keep`` is the token policy; ``mask_id`` is the id of the mask token, which only
    masked models need.
    """

    def __init__(self, head: LMHeadModel, keep: TokenPolicy, mask_id: int | None) -> None:
        self._head, self._keep, self._mask_id = head, keep, mask_id

    def build_batch(self, sequences: list[TokenSequence], mask_seeds: Sequence[int]) -> LMBatch:
        """Return the batch of ``sequences``; ``mask_seeds`` has one seed per sequence, from 0 to 2^64 - 1."""
        ids, attention_mask = pad_batch(sequences, self._head.base.device)
        kept = [self._keep(sequence) for sequence in sequences]
        scored = [self._select_scored(*each) for each in zip(sequences, mask_seeds, strict=True)]
        scored_mask = torch.from_numpy(_pad_rows(scored, ids.shape[1])).to(ids.device)
        # A causal model predicts the token after the position, the others the token at the position.
        shift = int(self._head.kind == "causal")
        targets_at = [np.flatnonzero(row) + shift for row in scored]
        targets = np.concatenate([s.ids[at] for s, at in zip(sequences, targets_at, strict=True)]).astype(np.int64)
        if self._head.kind == "masked":
            assert self._mask_id is not None, self._head.base.name
            ids = ids.masked_fill(scored_mask, self._mask_id)
        return LMBatch(
            input_ids=ids,
            attention_mask=attention_mask,
            keep_mask=torch.from_numpy(_pad_rows(kept, ids.shape[1])).to(ids.device),
            kept_docs=np.concatenate([s.doc[row] for s, row in zip(sequences, kept, strict=True)]),
            scored_mask=scored_mask,
            targets=torch.from_numpy(targets).to(ids.device),
            target_docs=np.concatenate([s.doc[at] for s, at in zip(sequences, targets_at, strict=True)]),
        )

    def _select_scored(self, sequence: TokenSequence, mask_seed: int) -> np.ndarray:
        """Return the scored positions, (S,) bool."""
        if self._head.kind == "masked":
            return select_masked_positions(sequence, mask_seed)
        return np.arange(len(sequence)) < len(sequence) - (self._head.kind == "causal")

    def limit_batch_tokens(self, batch_tokens: int) -> int:
        """Return ``batch_tokens``, or fewer tokens per batch if the logits would be too large."""
        if self._head.kind == "none":
            return batch_tokens
        vocabulary = self._head.base.config.get_text_config().vocab_size
        return min(batch_tokens, max(1, MAX_LOGITS // vocabulary))

    def iterate_batches(self, batches: Iterable[ModelBatch], mask_seed: int) -> Iterator[LMBatch]:
        """Yield the batches that have at least one scored position."""
        for sequences in batches:
            batch = self.build_batch(sequences, [mask_seed] * len(sequences))
            if len(batch.targets):
                yield batch


def _pad_rows(rows: list[np.ndarray], length: int) -> np.ndarray:
    """Return the rows as (B, S) bool, padded with False."""
    out = np.zeros((len(rows), length), dtype=bool)
    for number, row in enumerate(rows):
        out[number, : len(row)] = row
    return out


def scored_log_probs(head: LMHeadModel, batch: LMBatch) -> Tensor:
    """Return the log-probabilities at the scored positions, (m, V) in fp32; the model must have a head."""
    return token_log_probs(head.compute_logits(batch.input_ids, batch.attention_mask)[batch.scored_mask])
