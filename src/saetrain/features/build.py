"""From the pairs of one pass to the files of an SAE's features."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from saetrain.distributed import record_progress
from saetrain.features import statistics
from saetrain.features.collect import LatentSums
from saetrain.features.lens import Lens
from saetrain.features.pairs import PairRange, TokenStream
from saetrain.features.store import (
    CONTEXTS_FILE,
    LATENTS_FILE,
    VOCABULARY_FILE,
    build_table,
    select_valid,
    write_tables,
)
from saetrain.features.vocabulary import describe_tokens
from saetrain.features.weights import cosine_of_encoder, find_cofiring, find_neighbours


class FeatureBuilder:
    """Computes the features of one SAE, and writes all files but the stream and the metadata to ``folder``."""

    def __init__(self, folder: Path, stream: TokenStream, sums: LatentSums, lens: Lens, *, distinct: bool) -> None:
        self._folder, self._stream, self._sums, self._lens, self._distinct = folder, stream, sums, lens, distinct
        self._summaries: list[dict[str, Any]] = []

    def write_files(self, tokenizer: Any, loss_effects: np.ndarray) -> None:
        """Write latents, contexts and vocabulary; ``loss_effects`` (F, 3): value, low and high, nan if unknown."""
        write_tables(self._folder, CONTEXTS_FILE, self._iterate_contexts())
        write_tables(self._folder, LATENTS_FILE, [build_table(LATENTS_FILE, self._collect_columns(loss_effects))])
        ids = np.unique(
            np.concatenate([self._stream.distinct_ids(), self._lens.top_ids, self._lens.bottom_ids], axis=None)
        )
        columns = {"token_id": ids, "text": describe_tokens(tokenizer, ids)}
        write_tables(self._folder, VOCABULARY_FILE, [build_table(VOCABULARY_FILE, columns)])

    def _iterate_contexts(self) -> Iterator[pa.Table]:
        """Yield the contexts of one range of latents after the other, and keep the range's statistics."""
        for pairs in self._sums.pairs.iterate_ranges():
            record_progress()
            order = statistics.order_by_strength(pairs)
            tokens, lists = statistics.summarize_tokens(pairs, self._stream)
            self._summaries.append(
                {
                    **statistics.summarize_strengths(pairs, order),
                    **tokens,
                    "positions": statistics.count_positions(pairs, self._stream),
                    "token_lengths": np.diff(lists.offsets),
                    **lists.columns,
                }
            )
            yield self._build_contexts(pairs, order)

    def _build_contexts(self, pairs: PairRange, order: np.ndarray) -> pa.Table:
        chosen = statistics.choose_contexts(pairs, order, self._stream, distinct_documents=self._distinct)
        pair = chosen["pair"]
        window = statistics.find_window_activations(pairs, pair, self._stream)
        columns = {
            "latent": pairs.first + pairs.latent[pair].astype(np.int32),
            "band": chosen["band"],
            "rank": chosen["rank"],
            "token": pairs.token[pair],
            "value": pairs.value[pair],
            **{name: (window.offsets, values) for name, values in window.columns.items()},
        }
        return build_table(CONTEXTS_FILE, columns)

    def _collect_columns(self, loss_effects: np.ndarray) -> dict[str, Any]:
        merged: dict[str, Any] = {
            name: np.concatenate([part[name] for part in self._summaries]) for name in self._summaries[0]
        }
        offsets = np.concatenate([[0], np.cumsum(merged.pop("token_lengths"))])
        for name in ("token_ids", "token_counts"):
            merged[name] = (offsets, merged[name])
        coder, lens = self._sums.target.coder, self._lens
        record_progress()
        neighbours, cosines = find_neighbours(coder.W_dec.detach())
        cofiring, lift = find_cofiring(self._sums.pairs, self._stream.read_column("kept"))
        return {
            "latent": np.arange(coder.num_latents, dtype=np.int32),
            **merged,
            "cofiring": select_valid(cofiring, cofiring >= 0),
            "cofiring_lift": select_valid(lift, cofiring >= 0),
            "neighbours": neighbours,
            "neighbour_cosines": cosines,
            "lens_top": lens.top_ids,
            "lens_top_logits": lens.top_logits,
            "lens_bottom": lens.bottom_ids,
            "lens_bottom_logits": lens.bottom_logits,
            "encoder_decoder_cosine": cosine_of_encoder(coder.W_enc.detach(), coder.W_dec.detach()),
            "variance_explained": self._sums.variance_explained(),
            "loss_effect": loss_effects[:, 0],
            "loss_effect_low": loss_effects[:, 1],
            "loss_effect_high": loss_effects[:, 2],
        }
