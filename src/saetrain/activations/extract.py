"""From model batches to activations: each batch runs through the model, and kept tokens are selected.

What comes out of the model for a batch depends on nothing but the batch; norm limits apply afterwards.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from saetrain import distributed
from saetrain.activations.capture import pad_batch
from saetrain.activations.model import BaseModel
from saetrain.async_copy import PendingCopy, copy_to_device_async
from saetrain.errors import SaetrainError, is_out_of_memory
from saetrain.types import DATASET_ROW_BITS, ModelBatch, TokenKind, TokenSequence

TokenPolicy = Callable[[TokenSequence], np.ndarray]


class Capture(Protocol):
    """What the extractor needs of a model: :class:`ActivationCapture`, or a stand-in whose activations are stored."""

    model: BaseModel
    hookpoints: list[str]
    widths: dict[str, int]

    def __call__(self, ids_BS: Tensor, mask_BS: Tensor) -> dict[str, Tensor]:
        """Return {hookpoint: (B, S, D)} for token ids and attention mask."""


class BatchCache(Protocol):
    """Stored activations of model batches: :class:`ActivationCache`, or a folder that has all of them."""

    def read_batch(self, batch: ModelBatch) -> dict[str, Tensor] | None:
        """Return {hookpoint: (N, D)} of all tokens of a batch, on the host, or None if they are not stored."""

    def prefetch_batches(self, batches: Iterable[ModelBatch]) -> None:
        """Start to read the stored ones among ``batches``."""

    def add_batch(self, batch: ModelBatch, values: dict[str, Tensor]) -> None:
        """Store {hookpoint: (N, D)} of all tokens of a batch."""

    def close(self) -> None:
        """Write what is still in memory."""


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
    """Runs batches through the model, one at a time."""

    def __init__(self, extractor: ActivationExtractor, batches: list[ModelBatch]) -> None:
        self._batches = extractor.iterate_batches(batches)
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

    ``token_class`` (N,) uint8, values of :class:`TokenClass`; ``rows`` (N,) int64 their numbers in the
    batch, which has more tokens if some were dropped, and ``ids`` (N,) int32 their token ids, or None if unknown.
    """

    values: dict[str, Tensor]
    doc: np.ndarray
    token_class: np.ndarray
    rows: np.ndarray | None = None
    ids: np.ndarray | None = None


class ActivationExtractor:
    """Runs batches through the model and keeps the positions that the token policy and the norm limits allow.

    ``batch_tokens``: padded tokens per batch, for advice. ``cache``: batches that it has do not run through the model,
    and others are added to it.
    """

    def __init__(
        self,
        capture: Capture,
        keep: TokenPolicy,
        batch_tokens: int,
        data_sets: tuple[str, ...] = (),
        cache: BatchCache | None = None,
    ) -> None:
        self.capture, self.keep, self.batch_tokens, self.cache = capture, keep, batch_tokens, cache
        self._data_sets = data_sets
        self._norm_limits: dict[str, float] = {}
        self._check_interrupt: Callable[[], None] = lambda: None
        self.max_in_flight = 1 if capture.model.device.type == "cuda" else 0
        """Number of model batches that are started before the norms of an earlier batch are checked."""

    @property
    def norm_limits(self) -> dict[str, float]:
        """{hookpoint: largest norm of a token that is kept}; hookpoints may be missing."""
        return self._norm_limits

    def set_norm_limits(self, limits: dict[str, float]) -> None:
        """Exclude tokens above a limit; above the limit at one hookpoint, a token is excluded at all of them."""
        self._norm_limits = limits

    def set_interrupt_check(self, check: Callable[[], None]) -> None:
        """Call ``check``, which may raise to stop, before each model batch."""
        self._check_interrupt = check

    def check_interrupt(self) -> None:
        """Raise what the interrupt check raises."""
        self._check_interrupt()

    def iterate_batches(self, batches: Iterable[ModelBatch]) -> Iterator[Activations]:
        """Yield one :class:`Activations` per batch; SaetrainError when an activation is not finite."""
        in_flight: deque[tuple[dict[str, Tensor], np.ndarray, PendingCopy]] = deque()
        for chosen, captured, rows in self._run_batches(batches):
            keep = np.concatenate([self.keep(sequence) for sequence in chosen])
            docs = np.concatenate([sequence.doc for sequence in chosen])[keep]
            values = self._select_rows(captured, rows[keep])
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

    def iterate_labelled(self, batches: Iterable[ModelBatch]) -> Iterator[LabelledActivations]:
        """Yield all tokens of each batch except padding, with their class.

        Raises SaetrainError when the activation of a kept token is not finite. Other tokens with such activations are
        dropped.
        """
        for chosen, captured, rows in self._run_batches(batches):
            keep = np.concatenate([self.keep(sequence) for sequence in chosen])
            kinds = np.concatenate([sequence.kind for sequence in chosen])
            docs = np.concatenate([sequence.doc for sequence in chosen])
            ids = np.concatenate([sequence.ids for sequence in chosen])
            values = self._select_rows(captured, rows)
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
            classes = token_class[accepted_rows].astype(np.uint8)
            yield LabelledActivations(values, docs[accepted_rows], classes, accepted_rows, ids[accepted_rows])

    def _run_batches(self, batches: Iterable[ModelBatch]) -> Iterator[tuple[ModelBatch, dict[str, Tensor], np.ndarray]]:
        """Yield (batch, {hookpoint: (R, D)}, (N,) row of each token of the batch) for each batch."""
        for chosen in batches:
            self._check_interrupt()
            distributed.record_progress()
            yield chosen, *self._compute_values(chosen)

    def _compute_values(self, batch: ModelBatch) -> tuple[dict[str, Tensor], np.ndarray]:
        """Return {hookpoint: (R, D)} and the row of each token of the batch, (N,) int64."""
        numbers = np.arange(sum(map(len, batch)))
        stored = None if self.cache is None else self.cache.read_batch(batch)
        if stored is not None:
            device = self.capture.model.device
            return {name: stored[name].to(device, non_blocking=True) for name in self.capture.hookpoints}, numbers
        captured = self._capture_activations(*pad_batch(batch, self.capture.model.device))
        values, longest = {name: value.flatten(0, 1) for name, value in captured.items()}, max(map(len, batch))
        rows = np.concatenate([row * longest + np.arange(len(sequence)) for row, sequence in enumerate(batch)])
        if self.cache is None:
            return values, rows
        values = self._select_rows(values, rows)
        self.cache.add_batch(batch, values)
        return values, numbers

    def _select_rows(self, values: dict[str, Tensor], numbers: np.ndarray) -> dict[str, Tensor]:
        rows = copy_to_device_async(numbers, self.capture.model.device)
        return {name: value.index_select(0, rows) for name, value in values.items()}

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

    def extract_all(self, batches: list[ModelBatch]) -> Activations:
        """Return the activations of all ``batches``."""
        return Extraction(self, batches).run_remaining()

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
            if name in self._norm_limits:
                accept &= hookpoint_norms <= self._norm_limits[name]
        return accept

    def _describe_rows(self, docs: np.ndarray) -> str:
        """Return the first few rows as text, with their data set if several are mixed."""
        rows = np.unique(docs)[:5].tolist()
        if len(self._data_sets) < 2:
            return ", ".join(map(str, rows))
        return ", ".join(
            f"{row % (1 << DATASET_ROW_BITS)} of {self._data_sets[row >> DATASET_ROW_BITS]}" for row in rows
        )
