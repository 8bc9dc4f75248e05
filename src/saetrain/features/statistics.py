"""Statistics of the latents of a range, and the choice of their contexts; docs/features.md defines each of them.

The strength of an activation is its magnitude. Everything is computed for all latents of the range at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from saetrain.features.pairs import POSITION_BIN, POSITION_BINS, PairRange, TokenStream

HISTOGRAM_BINS = 32
QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
SHOWN_TOKENS = 8
TOP_CONTEXTS, BANDS, BAND_CONTEXTS, WEAK_CONTEXTS = 8, 4, 3, 3
WEAK_BAND = BANDS + 1
TOKENS_BEFORE, TOKENS_AFTER = 16, 8
CANDIDATES = 64
"""Strongest pairs of a latent among which distinct documents are looked for first."""

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class Ragged:
    """Lists of different lengths: list i has entries ``offsets[i]`` to ``offsets[i + 1]`` of each of ``columns``."""

    offsets: np.ndarray
    columns: Columns


def order_by_strength(pairs: PairRange) -> np.ndarray:
    """Return the order of the pairs by latent, then from the strongest, then by token, (P,) int64."""
    # The bits of floats that are not negative are ordered as the floats.
    weakness = np.uint64(0xFFFFFFFF) - np.abs(pairs.value).view(np.uint32).astype(np.uint64)
    return np.argsort((pairs.latent.astype(np.uint64) << np.uint64(32)) | weakness, kind="stable")


def summarize_strengths(pairs: PairRange, order: np.ndarray) -> Columns:
    """Return count, largest and mean strength, histogram and quantiles of each latent; zeros if it never fires."""
    counts, n_latents = pairs.counts, len(pairs.counts)
    strength = np.abs(pairs.value)
    fires = counts > 0
    ranked = strength[order]
    largest = np.zeros(n_latents, dtype=np.float32)
    largest[fires] = ranked[pairs.starts[:-1][fires]]
    total = np.bincount(pairs.latent, weights=strength, minlength=n_latents)
    bins = (strength.astype(np.float64) * HISTOGRAM_BINS / largest[pairs.latent]).astype(np.int64)
    cells = pairs.latent.astype(np.int64) * HISTOGRAM_BINS + np.minimum(bins, HISTOGRAM_BINS - 1)
    quantiles = np.zeros((n_latents, len(QUANTILES)), dtype=np.float32)
    for column, quantile in enumerate(QUANTILES):
        # Ranks count from the strongest, quantiles from the weakest.
        rank = (1 - quantile) * (counts[fires] - 1)
        low, start = np.floor(rank).astype(np.int64), pairs.starts[:-1][fires]
        high = np.minimum(low + 1, counts[fires] - 1)
        below, above = ranked[start + low].astype(np.float64), ranked[start + high].astype(np.float64)
        quantiles[fires, column] = below + (above - below) * (rank - low)
    return {
        "count": counts,
        "max": largest,
        "mean_active": (total / np.maximum(counts, 1)).astype(np.float32),
        "histogram": np.bincount(cells, minlength=n_latents * HISTOGRAM_BINS).reshape(n_latents, -1).astype(np.int32),
        "quantiles": quantiles,
    }


def count_positions(pairs: PairRange, stream: TokenStream) -> np.ndarray:
    """Return how often each latent fires by relative position in the sequence, (latents, POSITION_BINS) int32."""
    cells = pairs.latent.astype(np.int64) * POSITION_BINS + stream.read_column(POSITION_BIN)[pairs.token]
    n_latents = len(pairs.counts)
    return np.bincount(cells, minlength=n_latents * POSITION_BINS).reshape(n_latents, -1).astype(np.int32)


def summarize_tokens(pairs: PairRange, stream: TokenStream) -> tuple[Columns, Ragged]:
    """Return (purity and entropy in bits of the tokens on which each latent fires; its most frequent tokens).

    Both are nan for a latent that never fires.
    """
    counts, n_latents = pairs.counts, len(pairs.counts)
    keys = np.sort((pairs.latent.astype(np.int64) << 32) | stream.read_column("token_id")[pairs.token])
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    times = np.diff(first, append=len(keys))
    latent, token_id = keys[first] >> 32, keys[first] & 0xFFFFFFFF
    starts = np.concatenate([[0], np.cumsum(np.bincount(latent, minlength=n_latents))])
    order = np.argsort((latent << 32) | (0xFFFFFFFF - times), kind="stable")
    shown, offsets = _first_of_each(starts, SHOWN_TOKENS)
    shown = order[shown]
    fires = counts > 0
    purity, entropy = np.full(n_latents, np.nan), np.full(n_latents, np.nan)
    purity[fires] = times[order[starts[:-1][fires]]] / counts[fires]
    weighted = np.bincount(latent, weights=times * np.log2(times), minlength=n_latents)
    entropy[fires] = np.maximum(np.log2(counts[fires]) - weighted[fires] / counts[fires], 0)
    columns = {"purity": purity.astype(np.float32), "entropy": entropy.astype(np.float32)}
    lists = {"token_ids": token_id[shown].astype(np.int32), "token_counts": times[shown].astype(np.int32)}
    return columns, Ragged(offsets, lists)


def choose_contexts(pairs: PairRange, order: np.ndarray, stream: TokenStream, *, distinct_documents: bool) -> Columns:
    """Return the chosen contexts: ``pair`` number, ``band`` and ``rank`` within it, sorted by latent, band and rank.

    Band 0: the strongest; 1 to BANDS: evenly from each quarter of the ranks; WEAK_BAND: the weakest. A pair that
    several bands choose has the first of them.
    """
    starts, counts = pairs.starts[:-1], pairs.counts
    numbers, bands = [_choose_strongest(pairs, order, stream, distinct_documents)], [0]
    for band in range(BANDS):
        low, high = band * counts // BANDS, (band + 1) * counts // BANDS
        for place in range(BAND_CONTEXTS):
            at = low + (2 * place + 1) * (high - low) // (2 * BAND_CONTEXTS)
            numbers.append((starts + at)[high > low])
            bands.append(band + 1)
    for place in range(WEAK_CONTEXTS):
        numbers.append((starts + counts - 1 - place)[counts > place])
        bands.append(WEAK_BAND)
    # The first of equal entries is that of the first band.
    places, kept = np.unique(np.concatenate(numbers), return_index=True)
    pair = order[places]
    band_of = np.repeat(np.array(bands, dtype=np.int8), [len(part) for part in numbers])[kept]
    latent = pairs.latent[pair].astype(np.int64)
    # The weakest come first in their band; in the others the strongest.
    from_end = np.where(band_of == WEAK_BAND, starts[latent] + counts[latent] - places, places - starts[latent])
    sorting = np.lexsort((from_end, band_of, latent))
    pair, band_of, latent = pair[sorting], band_of[sorting], latent[sorting]
    group = latent * (WEAK_BAND + 1) + band_of
    is_first = np.diff(group, prepend=-1) != 0
    rank = np.arange(len(group)) - np.maximum.accumulate(np.where(is_first, np.arange(len(group)), 0))
    return {"pair": pair, "band": band_of, "rank": rank.astype(np.int8)}


def _choose_strongest(pairs: PairRange, order: np.ndarray, stream: TokenStream, distinct: bool) -> np.ndarray:
    """Return the places in ``order`` of the strongest pairs of each latent, documents first that are not yet chosen."""
    if not distinct:
        return _first_of_each(pairs.starts, TOP_CONTEXTS)[0]
    places, _ = _first_of_each(pairs.starts, CANDIDATES)
    chosen, n_documents = _prefer_new_documents(pairs, order, stream, places)
    # Few documents among the candidates: look at all pairs of such a latent.
    few = (n_documents < TOP_CONTEXTS) & (pairs.counts > CANDIDATES)
    if not few.any():
        return chosen
    every = np.flatnonzero(few[pairs.latent[order]])
    again, _ = _prefer_new_documents(pairs, order, stream, every)
    return np.concatenate([chosen[~few[pairs.latent[order[chosen]]]], again])


def _prefer_new_documents(
    pairs: PairRange, order: np.ndarray, stream: TokenStream, places: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return (TOP_CONTEXTS of ``places`` per latent, number of documents of each latent's places).

    ``places`` are sorted by latent and from the strongest. Those that are the first of their document are chosen first.
    """
    pair = order[places]
    latent, doc = pairs.latent[pair].astype(np.int64), stream.read_column("doc")[pairs.token[pair]]
    by_document = np.lexsort((places, doc, latent))
    is_new = np.zeros(len(places), dtype=bool)
    sorted_latent, sorted_doc = latent[by_document], doc[by_document]
    is_new[by_document] = (np.diff(sorted_latent, prepend=-1) != 0) | (np.diff(sorted_doc, prepend=0) != 0)
    n_latents = len(pairs.counts)
    starts = np.concatenate([[0], np.cumsum(np.bincount(latent, minlength=n_latents))])
    preferred = np.argsort(2 * latent + ~is_new, kind="stable")
    return places[preferred[_first_of_each(starts, TOP_CONTEXTS)[0]]], np.bincount(latent[is_new], minlength=n_latents)


def _first_of_each(starts: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (numbers of the first ``limit`` entries of each list, offsets of the shorter lists)."""
    lengths = np.minimum(np.diff(starts), limit)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return np.arange(offsets[-1]) + np.repeat(starts[:-1] - offsets[:-1], lengths), offsets


def find_window_activations(pairs: PairRange, chosen: np.ndarray, stream: TokenStream) -> Ragged:
    """Return for each of the ``chosen`` pairs where else in its window the latent fires: offsets and values.

    The window is TOKENS_BEFORE tokens before and TOKENS_AFTER after, within the same sequence.
    """
    # Pairs are sorted by token, so those within the window are among as many neighbours.
    steps = np.array([step for step in range(-TOKENS_BEFORE, TOKENS_AFTER + 1) if step])
    near = chosen[:, None] + steps
    inside = (near >= 0) & (near < len(pairs.token))
    near = np.where(inside, near, chosen[:, None])
    token = pairs.token[chosen].astype(np.int64)[:, None]
    offset = pairs.token[near] - token
    inside &= pairs.latent[near] == pairs.latent[chosen][:, None]
    inside &= (offset >= -TOKENS_BEFORE) & (offset <= TOKENS_AFTER)
    row, column = np.nonzero(inside)
    same = (
        stream.read_column("sequence")[pairs.token[near[row, column]]]
        == stream.read_column("sequence")[pairs.token[chosen[row]]]
    )
    row, column = row[same], column[same]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(chosen)))])
    return Ragged(
        offsets,
        {"offsets": offset[row, column].astype(np.int8), "activations": pairs.value[near[row, column]]},
    )
