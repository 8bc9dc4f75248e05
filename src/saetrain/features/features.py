"""The collected features of one SAE in Python: ``sae.features[1988].contexts``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from saetrain.features.store import (
    CONTEXTS_FILE,
    LATENTS_FILE,
    STREAM_FILE,
    VOCABULARY_FILE,
    read_metadata,
    read_table,
)
from saetrain.untrusted import escape_text

LEFT_MARK, RIGHT_MARK = "«", "»"
SHOWN_CONTEXTS = 5


@dataclass(frozen=True)
class Context:
    """A place where a latent fires: its value, and the tokens around it.

    ``band``: 0 for the strongest, 1 to 4 for quarters of the activations from the strongest, 5 for the weakest.
    ``tokens``: texts of the window; ``activations``: the latent's activation on each of them; ``position``: place of
    the context's own token in the window. ``document``: row of the data set.
    """

    band: int
    rank: int
    value: float
    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    position: int
    document: int

    @property
    def token(self) -> str:
        """Text of the token on which the latent fires."""
        return self.tokens[self.position]

    def __str__(self) -> str:
        before, after = "".join(self.tokens[: self.position]), "".join(self.tokens[self.position + 1 :])
        space = " " if self.token.startswith(" ") else ""
        return f"{before}{space}{LEFT_MARK}{self.token.removeprefix(' ')}{RIGHT_MARK}{after}"

    def __repr__(self) -> str:
        return f"Context({self.value:.3g}, {str(self)!r})"


@dataclass(frozen=True, repr=False)
class Feature:
    """What was collected of one latent; docs/features.md defines each figure.

    ``count``: tokens on which it fires, and ``rate`` their share; ``tokens``: the most frequent of them, with counts;
    ``cofiring``: (latent, lift); ``neighbours``: (latent, cosine); ``lens_top`` and ``lens_bottom``: (token, logit);
    ``loss_effect``: value, low and high, or None if it was not measured.
    """

    latent: int
    count: int
    rate: float
    max: float
    mean_active: float
    histogram: np.ndarray
    quantiles: np.ndarray
    tokens: list[tuple[str, int]]
    purity: float | None
    entropy: float | None
    positions: np.ndarray
    cofiring: list[tuple[int, float]]
    neighbours: list[tuple[int, float]]
    lens_top: list[tuple[str, float]]
    lens_bottom: list[tuple[str, float]]
    encoder_decoder_cosine: float | None
    variance_explained: float
    loss_effect: tuple[float, float | None, float | None] | None
    contexts: list[Context]

    def __repr__(self) -> str:
        if not self.count:
            return f"Feature {self.latent}: never fires"
        lines = [
            f"Feature {self.latent}: fires on {self.count:,} tokens ({self.rate:.2%}), max {self.max:.3g}, "
            f"explains {self.variance_explained:.2%} of the variance"
        ]
        lines.append("  tokens   " + _join_pairs(self.tokens, "{0!r} {1}"))
        if self.lens_top:
            lines.append("  promotes " + _join_pairs(self.lens_top, "{0!r}"))
        lines.append("  near     " + _join_pairs(self.neighbours, "{0} ({1:.2f})"))
        lines += [f"  {context.value:7.3g}  {escape_text(str(context))}" for context in self.contexts[:SHOWN_CONTEXTS]]
        return "\n".join(lines)


def _join_pairs(pairs: Sequence[tuple[Any, Any]], pattern: str) -> str:
    return ", ".join(pattern.format(*pair) for pair in pairs)


class Features(Sequence[Feature]):
    """The features of all latents of an SAE, ``features[latent]``.

    ``metadata``: text, tokens and sizes. ``latents`` and ``stream`` are tables of pyarrow with the columns of the
    files. Raises SaetrainError if nothing was collected.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.metadata = folder, read_metadata(folder)

    @cached_property
    def latents(self) -> pa.Table:
        """One row per latent."""
        return read_table(self.folder, LATENTS_FILE)

    @cached_property
    def stream(self) -> pa.Table:
        """One row per token that was read."""
        return read_table(self.folder, STREAM_FILE)

    @cached_property
    def vocabulary(self) -> Mapping[int, str]:
        """{token id: text} of the tokens of the text and of the lens."""
        table = read_table(self.folder, VOCABULARY_FILE)
        return dict(zip(table["token_id"].to_pylist(), table["text"].to_pylist(), strict=True))

    @cached_property
    def _context_table(self) -> tuple[pa.Table, np.ndarray]:
        """The contexts, and the first one of each latent."""
        table = read_table(self.folder, CONTEXTS_FILE)
        return table, np.searchsorted(table["latent"].to_numpy(), np.arange(len(self) + 1))

    @cached_property
    def stream_columns(self) -> dict[str, np.ndarray]:
        """The columns of the stream that a context or a page needs, one value per token."""
        return {name: self.stream[name].to_numpy() for name in ("token_id", "doc", "sequence", "kept")}

    def __len__(self) -> int:
        return int(self.metadata["num_latents"])

    @overload
    def __getitem__(self, latent: int) -> Feature: ...
    @overload
    def __getitem__(self, latent: slice) -> list[Feature]: ...
    def __getitem__(self, latent: int | slice) -> Feature | list[Feature]:
        if isinstance(latent, slice):
            return [self[number] for number in range(*latent.indices(len(self)))]
        if not -len(self) <= latent < len(self):
            # IndexError ends a loop over the features.
            raise IndexError(f"features[{latent}]: the SAE has latents 0 to {len(self) - 1}")
        latent = int(latent) % len(self)
        (row,) = self.latents.slice(latent, 1).to_pylist()
        effect = row["loss_effect"]
        return Feature(
            latent=latent,
            rate=row["count"] / self.metadata["kept_tokens"],
            histogram=np.array(row["histogram"]),
            quantiles=np.array(row["quantiles"]),
            positions=np.array(row["positions"]),
            tokens=self._name_tokens(row["token_ids"], row["token_counts"]),
            cofiring=list(zip(row["cofiring"], row["cofiring_lift"], strict=True)),
            neighbours=list(zip(row["neighbours"], row["neighbour_cosines"], strict=True)),
            lens_top=self._name_tokens(row["lens_top"], row["lens_top_logits"]),
            lens_bottom=self._name_tokens(row["lens_bottom"], row["lens_bottom_logits"]),
            loss_effect=None if effect is None else (effect, row["loss_effect_low"], row["loss_effect_high"]),
            contexts=self._read_contexts(latent),
            **{name: row[name] for name in PLAIN_COLUMNS},
        )

    def _name_tokens(self, ids: list[int], values: list[Any]) -> list[tuple[str, Any]]:
        return [(self.vocabulary[number], value) for number, value in zip(ids, values, strict=True)]

    def _read_contexts(self, latent: int) -> list[Context]:
        table, starts = self._context_table
        rows = table.slice(int(starts[latent]), int(starts[latent + 1] - starts[latent])).to_pylist()
        return [self._build_context(row) for row in rows]

    def _build_context(self, row: Mapping[str, Any]) -> Context:
        token, columns = row["token"], self.stream_columns
        before, after = self.metadata["window_before"], self.metadata["window_after"]
        window = np.arange(max(0, token - before), min(token + after + 1, len(columns["token_id"])))
        window = window[columns["sequence"][window] == columns["sequence"][token]]
        values = {
            token: row["value"],
            **{token + o: v for o, v in zip(row["offsets"], row["activations"], strict=True)},
        }
        return Context(
            band=row["band"],
            rank=row["rank"],
            value=row["value"],
            tokens=tuple(self.vocabulary[int(number)] for number in columns["token_id"][window]),
            activations=tuple(values.get(int(place), 0.0) for place in window),
            position=int(token - window[0]),
            document=int(columns["doc"][token]),
        )

    def __repr__(self) -> str:
        found = self.metadata
        return (
            f"Features({len(self):,} latents of {found['sae']}, on {found['kept_tokens']:,} tokens of "
            f"{found['text'].replace('_', ' ')} text)"
        )


PLAIN_COLUMNS = ("count", "max", "mean_active", "purity", "entropy", "encoder_decoder_cosine", "variance_explained")
"""Columns of the latents that a feature has as they are."""
