"""Columns of a page from the ``features/<SAE>/`` folders of a run (docs/features.md): latents, contexts, and text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from saetrain.atomic_io import replace_non_finite
from saetrain.features.features import Features
from saetrain.features.store import CONTEXTS_FILE, METADATA_FILE, read_table
from saetrain.report.columns import ColumnStore

MAX_TOKEN_CHARACTERS = 200
"""Characters of a token that a page stores; longer tokens end in an ellipsis and their length."""
FLOATS = ("max", "mean_active", "quantiles", "variance_explained")
UNIT_STEP, LOGIT_STEP, LIFT_STEP = 1e-4, 1e-2, 1e-2
"""Precision of shares and cosines, of logits and entropies, and of lifts."""
ABLATION = ("loss_effect", "loss_effect_low", "loss_effect_high")
NO_TOKEN = -1
SEQUENCE_START, DOCUMENT_START, EXCLUDED = 1, 2, 4
"""Bits of ``flags``, which a page stores per token of the text."""


def is_feature_folder(folder: Path) -> bool:
    """Return whether ``folder`` holds the features of an SAE; metadata.json is written last."""
    return (folder / METADATA_FILE).is_file()


class PageText:
    """The text of one page: the union of the vocabularies, by falling frequency, and each distinct stream once."""

    def __init__(self, features: list[Features]) -> None:
        self.streams: list[dict[str, np.ndarray]] = []
        self._stream_of: dict[Path, int] = {}
        texts: dict[int, str] = {}
        for found in features:
            texts.update(found.vocabulary)
            self._stream_of[found.folder] = self._find_stream(found.stream_columns)
        self._ids = np.array(sorted(texts), np.int64)
        counts = np.zeros(len(self._ids), np.int64)
        for stream in self.streams:
            np.add.at(counts, np.searchsorted(self._ids, stream["token_id"]), 1)
        # Frequent tokens get small numbers, which compress better.
        order = np.argsort(-counts, kind="stable")
        self._rank = np.empty(len(order), np.int64)
        self._rank[order] = np.arange(len(order))
        self.tokens = [shorten_token(texts[token]) for token in self._ids[order].tolist()]

    def _find_stream(self, stream: dict[str, np.ndarray]) -> int:
        for number, known in enumerate(self.streams):
            if all(np.array_equal(known[name], stream[name]) for name in known):
                return number
        self.streams.append(stream)
        return len(self.streams) - 1

    def stream_number(self, features: Features) -> int:
        """Return the number of the stream that the contexts of ``features`` refer to."""
        return self._stream_of[features.folder]

    def find_tokens(self, token_ids: np.ndarray) -> np.ndarray:
        """Return the numbers of tokens in the page's vocabulary; NO_TOKEN stays as it is."""
        places = np.searchsorted(self._ids, token_ids).clip(max=max(len(self._ids) - 1, 0))
        known = token_ids != NO_TOKEN
        assert bool((self._ids[places] == token_ids)[known].all()), "vocabulary.parquet lacks a token"
        return np.where(known, self._rank[places], NO_TOKEN)

    def add_columns(self, store: ColumnStore) -> None:
        """Add the vocabulary and the streams to the page."""
        store.add_json("vocabulary", self.tokens)
        for number, stream in enumerate(self.streams):
            sequence, doc = stream["sequence"], stream["doc"]
            starts = np.flatnonzero(np.diff(doc, prepend=doc[:1] - 1))
            flags = np.where(np.diff(sequence, prepend=sequence[:1] - 1) != 0, SEQUENCE_START, 0)
            flags[starts] |= DOCUMENT_START
            flags[~stream["kept"]] |= EXCLUDED
            store.add_integers(f"t{number}.token", self.find_tokens(stream["token_id"]))
            store.add_integers(f"t{number}.flags", flags)
            store.add_integers(f"t{number}.doc", doc[starts])


def shorten_token(text: str) -> str:
    """Return a token of at most MAX_TOKEN_CHARACTERS; a longer one ends in its length."""
    if len(text) <= MAX_TOKEN_CHARACTERS:
        return text
    return f"{text[:MAX_TOKEN_CHARACTERS]}… ({len(text):,} characters)"


def add_latent_columns(store: ColumnStore, prefix: str, features: Features, text: PageText) -> None:
    """Add one value or one row per latent of an SAE."""
    table = features.latents
    store.add_integers(f"{prefix}.count", table["count"].to_numpy())
    for name in FLOATS:
        store.add_floats(f"{prefix}.{name}", _flatten_column(table[name]))
    for name in ABLATION:
        values = table[name].to_numpy().astype(np.float64)
        if not np.isnan(values).all():
            store.add_floats(f"{prefix}.{name}", values)
    for name in ("purity", "encoder_decoder_cosine", "neighbour_cosines"):
        store.add_quantized(f"{prefix}.{name}", np.nan_to_num(_flatten_column(table[name])), UNIT_STEP)
    store.add_quantized(f"{prefix}.entropy", np.nan_to_num(_flatten_column(table["entropy"])), LOGIT_STEP)
    for name in ("histogram", "positions"):
        store.add_integers(f"{prefix}.{name}", _flatten_column(table[name]))
    _add_ragged(store, prefix, "token_ids", table["token_ids"], text)
    store.add_integers(f"{prefix}.token_counts", _flatten_column(table["token_counts"]))
    _add_ragged(store, prefix, "neighbours", table["neighbours"])
    _add_ragged(store, prefix, "cofiring", table["cofiring"])
    store.add_quantized(f"{prefix}.cofiring_lift", _flatten_column(table["cofiring_lift"]), LIFT_STEP)
    for name in ("lens_top", "lens_bottom"):
        _add_ragged(store, prefix, name, table[name], text)
        store.add_quantized(f"{prefix}.{name}_logits", _flatten_column(table[f"{name}_logits"]), LOGIT_STEP)


def add_context_columns(store: ColumnStore, prefix: str, features: Features) -> None:
    """Add the contexts of an SAE in order of latent, band and rank; activations are shares of the latent's maximum.

    The shares are negative where codes are.
    """
    table = read_table(features.folder, CONTEXTS_FILE).sort_by(
        [(name, "ascending") for name in ("latent", "band", "rank")]
    )
    latent, offsets = table["latent"].to_numpy(), table["offsets"].combine_chunks()
    n_latents = len(features.latents)
    largest = np.zeros(n_latents)
    largest[features.latents["latent"].to_numpy()] = features.latents["max"].to_numpy()
    lengths = offsets.value_lengths().to_numpy()
    of_context = np.maximum(largest[latent], np.finfo(np.float32).tiny)
    store.add_integers(f"{prefix}.contexts", np.bincount(latent, minlength=n_latents))
    store.add_integers(f"{prefix}.context_token", table["token"].to_numpy())
    store.add_integers(f"{prefix}.context_band", table["band"].to_numpy())
    store.add_quantized(f"{prefix}.context_value", (table["value"].to_numpy() / of_context).clip(-1, 1), 1 / 65535)
    store.add_integers(f"{prefix}.context_others", lengths)
    store.add_integers(f"{prefix}.other_offset", _flatten_column(table["offsets"]))
    shares = _flatten_column(table["activations"]) / np.repeat(of_context, lengths)
    store.add_quantized(f"{prefix}.other_value", shares.clip(-1, 1), 1 / 4095)


def _add_ragged(
    store: ColumnStore, prefix: str, name: str, column: pa.ChunkedArray, text: PageText | None = None
) -> None:
    """Add lists of different lengths, with the lengths; with ``text``, the lists hold token ids."""
    values = _flatten_column(column)
    store.add_integers(f"{prefix}.{name}.length", column.combine_chunks().value_lengths().fill_null(0).to_numpy())
    store.add_integers(f"{prefix}.{name}", text.find_tokens(values) if text is not None else values)


def _flatten_column(column: pa.ChunkedArray) -> np.ndarray:
    """Return the values of a column; lists are concatenated."""
    array = column.combine_chunks()
    is_nested = pa.types.is_list(array.type) or pa.types.is_large_list(array.type)
    fixed = pa.types.is_fixed_size_list(array.type)
    return (array.flatten() if is_nested or fixed else array).to_numpy(zero_copy_only=False)


def describe_features(features: Features, stream: int) -> dict[str, Any]:
    """Return what a page states about the collection: metadata.json, the stream, and the number of tokens kept."""
    return {
        "metadata": replace_non_finite(features.metadata),
        "stream": stream,
        "tokens": int(features.stream_columns["kept"].sum()),
    }
