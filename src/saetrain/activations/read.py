"""Sequences -> activations: batches of like length through the model, and the tokens that count picked out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saetrain.activations.capture import ActivationCapture, length_batches, pad_batch
from saetrain.errors import SaetrainError, is_out_of_memory
from saetrain.types import PART_BITS, Sequence

Keep = Callable[[Sequence], np.ndarray]


@dataclass(frozen=True)
class Activations:
    """Activations of n kept tokens and where each came from.

    ``values`` {hookpoint: (n, D)} in the model's dtype; ``doc`` (n,) int64 data set row; ``n_outliers`` tokens
    that were left out for their norm.
    """

    values: dict[str, Tensor]
    doc: np.ndarray
    n_outliers: int

    def __len__(self) -> int:
        return len(self.doc)


class ActivationReader:
    """Runs sequences through the model and keeps the positions that the token policy and the norm limits allow.

    ``limits`` {hookpoint: largest norm}: a token that exceeds one at any hookpoint is left out at all of them, so
    that every hookpoint sees the same tokens.
    """

    def __init__(
        self, capture: ActivationCapture, keep: Keep, batch_tokens: int, data_sets: tuple[str, ...] = ()
    ) -> None:
        self.capture, self.keep, self.batch_tokens = capture, keep, batch_tokens
        self._data_sets = data_sets
        self.limits: dict[str, float] = {}
        self.between_batches: Callable[[], None] | None = None
        """Called before each model batch; may raise to give up."""

    def batches(self, sequences: list[Sequence]) -> Iterator[Activations]:
        """One :class:`Activations` per model batch; SaetrainError when an activation is not finite."""
        device = self.capture.model.device
        for numbers in length_batches(sequences, self.batch_tokens):
            if self.between_batches is not None:
                self.between_batches()
            chosen = [sequences[number] for number in numbers]
            ids, mask = pad_batch(chosen, device)
            keep = np.zeros(ids.shape, dtype=bool)
            for row, sequence in enumerate(chosen):
                keep[row, : len(sequence)] = self.keep(sequence)
            docs = np.concatenate([sequence.doc[keep[row, : len(sequence)]] for row, sequence in enumerate(chosen)])
            picked = torch.from_numpy(np.flatnonzero(keep)).to(device)
            captured = self._capture(ids, mask)
            values = {name: value.flatten(0, 1).index_select(0, picked) for name, value in captured.items()}
            yield self._without_outliers(values, docs)

    def _capture(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
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

    def read(self, sequences: list[Sequence]) -> Activations:
        """All of ``sequences`` at once."""
        parts = list(self.batches(sequences))
        values = {name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values}
        return Activations(values, np.concatenate([part.doc for part in parts]), sum(part.n_outliers for part in parts))

    def _without_outliers(self, values: dict[str, Tensor], docs: np.ndarray) -> Activations:
        device = self.capture.model.device
        fine = torch.ones(len(docs), dtype=torch.bool, device=device)
        for name, value in values.items():
            norms = value.float().norm(dim=1)
            if not bool(torch.isfinite(norms).all()):
                rows = self._name_rows(docs[(~torch.isfinite(norms)).cpu().numpy()])
                raise SaetrainError(
                    f"the model's activations at {name} are not finite on data set rows {rows}; "
                    "a wider --dtype (float32 or bfloat16) usually mends it"
                )
            if name in self.limits:
                fine &= norms <= self.limits[name]
        if bool(fine.all()):
            return Activations(values, docs, 0)
        kept = {name: value[fine] for name, value in values.items()}
        return Activations(kept, docs[fine.cpu().numpy()], int((~fine).sum()))

    def _name_rows(self, docs: np.ndarray) -> str:
        """The first few rows, with their data set where several are mixed."""
        rows = np.unique(docs)[:5].tolist()
        if len(self._data_sets) < 2:
            return ", ".join(map(str, rows))
        return ", ".join(f"{row % (1 << PART_BITS)} of {self._data_sets[row >> PART_BITS]}" for row in rows)
