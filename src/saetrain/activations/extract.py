"""From sequences to activations: batches of similar length run through the model, and kept tokens are selected."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from saetrain import distributed
from saetrain.activations.capture import ActivationCapture, batch_by_length, pad_batch
from saetrain.async_copy import PendingCopy, copy_to_device_async
from saetrain.errors import SaetrainError, is_out_of_memory
from saetrain.types import DATASET_ROW_BITS, TokenKind, TokenSequence

TokenPolicy = Callable[[TokenSequence], np.ndarray]


@dataclass(frozen=True)
class Activations:
    """Activations of N kept tokens and the documents that they come from.

    ``values`` {hookpoint: (N, D)} in the model's dtype; ``doc`` (N,) int64 row of the data set; ``n_outliers`` number
    of tokens that were excluded because of their norm.
    """

    values: dict[str, Tensor]
    doc: np.ndarray
    n_outliers: int

    def __len__(self) -> int:
        return len(self.doc)


class Extraction:
    """Runs sequences through the model, one model batch at a time."""

    def __init__(self, extractor: ActivationExtractor, sequences: list[TokenSequence]) -> None:
        self._batches = extractor.iterate_batches(sequences)
        self._parts: list[Activations] = []

    def run_next_batch(self) -> int | None:
        """Run the next model batch; return its number of tokens, outliers included, or None after the last batch."""
        part = next(self._batches, None)
        if part is None:
            return None
        self._parts.append(part)
        return len(part) + part.n_outliers

    def run_remaining(self) -> Activations:
        """Run the remaining batches and return the activations of all batches."""
        self._parts.extend(self._batches)
        parts = self._parts
        values = {name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values}
        return Activations(values, np.concatenate([part.doc for part in parts]), sum(part.n_outliers for part in parts))


class TokenClass(IntEnum):
    """Whether a token is used, or why it is excluded."""

    KEPT = 0
    """Used for training and metrics."""
    SPECIAL = 1
    """Excluded by the token policy: CLS, SEP, BOS, EOS."""
    FIRST = 2
    """Excluded by the token policy: position 0 of a causal model."""
    OUTLIER = 3
    """Excluded because of its norm."""


@dataclass(frozen=True)
class LabelledActivations:
    """Activations of all N tokens of a batch except padding: ``values`` and ``doc`` as in :class:`Activations`.

    ``token_class`` (N,) uint8, values of :class:`TokenClass`.
    """

    values: dict[str, Tensor]
    doc: np.ndarray
    token_class: np.ndarray


class ActivationExtractor:
    """Runs sequences through the model and keeps the positions that the token policy and the norm limits allow.

    ``norm_limits`` {hookpoint: largest norm}: a token above the limit at any hookpoint is excluded at all hookpoints,
    so that all hookpoints have the same tokens. ``batch_tokens``: padded tokens per model batch.
    """

    def __init__(
        self, capture: ActivationCapture, keep: TokenPolicy, batch_tokens: int, data_sets: tuple[str, ...] = ()
    ) -> None:
        self.capture, self.keep, self.batch_tokens = capture, keep, batch_tokens
        self._data_sets = data_sets
        self.norm_limits: dict[str, float] = {}
        self.before_batch: Callable[[], None] | None = None
        """Called before each model batch; may raise to stop."""
        self.max_in_flight = 1 if capture.model.device.type == "cuda" else 0
        """Number of model batches that are started before the norms of an earlier batch are checked."""

    def iterate_batches(self, sequences: list[TokenSequence]) -> Iterator[Activations]:
        """Yield one :class:`Activations` per model batch; SaetrainError when an activation is not finite."""
        in_flight: deque[tuple[dict[str, Tensor], np.ndarray, PendingCopy]] = deque()
        for chosen, captured in self._run_batches(sequences):
            keep = np.concatenate([self.keep(sequence) for sequence in chosen])
            docs = np.concatenate([sequence.doc for sequence in chosen])[keep]
            values = self._select_kept(captured, chosen, keep)
            # Without this, the generator would keep the unselected activations alive while the caller uses the batch.
            del captured
            in_flight.append((values, docs, PendingCopy(self._compute_norms(values))))
            if len(in_flight) > self.max_in_flight:
                yield self._filter_outliers(*in_flight.popleft())
        while in_flight:
            yield self._filter_outliers(*in_flight.popleft())

    def _filter_outliers(self, values: dict[str, Tensor], docs: np.ndarray, norms: PendingCopy) -> Activations:
        accept = self._check_norms(list(values), docs, norms.get().numpy())
        if accept.all():
            return Activations(values, docs, 0)
        return Activations(self._select_rows(values, np.flatnonzero(accept)), docs[accept], int((~accept).sum()))

    def iterate_labelled(self, sequences: list[TokenSequence]) -> Iterator[LabelledActivations]:
        """Yield all tokens of each model batch except padding, with their class.

        Raises SaetrainError when the activation of a kept token is not finite. Other tokens with such activations are
        dropped.
        """
        for chosen, captured in self._run_batches(sequences):
            keep = np.concatenate([self.keep(sequence) for sequence in chosen])
            kinds = np.concatenate([sequence.kind for sequence in chosen])
            docs = np.concatenate([sequence.doc for sequence in chosen])
            values = self._select_kept(captured, chosen, np.ones(len(docs), dtype=bool))
            token_class = np.where(
                keep, TokenClass.KEPT, np.where(kinds & TokenKind.SPECIAL, TokenClass.SPECIAL, TokenClass.FIRST)
            )
            kept = np.flatnonzero(keep)
            token_class[kept[~self.mask_within_limits(self._select_rows(values, kept), docs[kept])]] = (
                TokenClass.OUTLIER
            )
            # Training never uses the other tokens, so an overflow there is no error.
            accepted_rows = np.flatnonzero(keep | np.isfinite(self._compute_norms(values).cpu().numpy()).all(axis=0))
            values = values if len(accepted_rows) == len(docs) else self._select_rows(values, accepted_rows)
            yield LabelledActivations(values, docs[accepted_rows], token_class[accepted_rows].astype(np.uint8))

    def _run_batches(self, sequences: list[TokenSequence]) -> Iterator[tuple[list[TokenSequence], dict[str, Tensor]]]:
        """Yield (sequences, {hookpoint: (B, S, D)}) of each model batch."""
        for numbers in batch_by_length(sequences, self.batch_tokens):
            if self.before_batch is not None:
                self.before_batch()
            distributed.record_progress()
            chosen = [sequences[number] for number in numbers]
            yield chosen, self._capture_activations(*pad_batch(chosen, self.capture.model.device))

    def _select_kept(
        self, captured: dict[str, Tensor], chosen: list[TokenSequence], keep: np.ndarray
    ) -> dict[str, Tensor]:
        """Select the activations of kept tokens; ``keep`` (bool) covers all tokens of ``chosen`` without padding."""
        longest = max(map(len, chosen))
        unpadded = np.concatenate([row * longest + np.arange(len(sequence)) for row, sequence in enumerate(chosen)])
        picked = copy_to_device_async(unpadded[keep], self.capture.model.device)
        return {name: value.flatten(0, 1).index_select(0, picked) for name, value in captured.items()}

    def _select_rows(self, values: dict[str, Tensor], numbers: np.ndarray) -> dict[str, Tensor]:
        rows = copy_to_device_async(numbers, self.capture.model.device)
        return {name: value[rows] for name, value in values.items()}

    def _capture_activations(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        try:
            return self.capture(ids, mask)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            rows, length = ids.shape
            advice = f"--model_batch_tokens from {self.batch_tokens} to {max(length, rows * length // 2)}"
            if rows == 1:
                advice = f"--ctx_len from {length} to {length // 2}"
            raise SaetrainError(
                f"out of memory while the model read {rows} x {length} tokens: lower {advice}"
            ) from error

    def extract_all(self, sequences: list[TokenSequence]) -> Activations:
        """Return the activations of all ``sequences``."""
        return Extraction(self, sequences).run_remaining()

    def mask_within_limits(self, values: dict[str, Tensor], docs: np.ndarray) -> np.ndarray:
        """Return (N,) bool: which tokens from data set rows ``docs`` are within the norm limits.

        Raises SaetrainError when an activation is not finite.
        """
        return self._check_norms(list(values), docs, self._compute_norms(values).cpu().numpy())

    def _compute_norms(self, values: dict[str, Tensor]) -> Tensor:
        """Return the norms, (H, N) fp32."""
        return torch.stack([value.float().norm(dim=1) for value in values.values()])

    def _check_norms(self, names: list[str], docs: np.ndarray, norms: np.ndarray) -> np.ndarray:
        """Check ``norms`` (H, N) as :meth:`mask_within_limits`."""
        accept = np.ones(len(docs), dtype=bool)
        for name, hookpoint_norms in zip(names, norms, strict=True):
            finite = np.isfinite(hookpoint_norms)
            if not finite.all():
                rows = self._describe_rows(docs[~finite])
                raise SaetrainError(
                    f"the model's activations at {name} are not finite on data set rows {rows}; "
                    "use a wider --dtype (float32 or bfloat16)"
                )
            if name in self.norm_limits:
                accept &= hookpoint_norms <= self.norm_limits[name]
        return accept

    def _describe_rows(self, docs: np.ndarray) -> str:
        """Return the first few rows as text, with their data set if several are mixed."""
        rows = np.unique(docs)[:5].tolist()
        if len(self._data_sets) < 2:
            return ", ".join(map(str, rows))
        return ", ".join(
            f"{row % (1 << DATASET_ROW_BITS)} of {self._data_sets[row >> DATASET_ROW_BITS]}" for row in rows
        )
