"""Each column of the files equals a plain computation from the firings of one latent."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from saetrain.features import statistics, weights
from saetrain.features.features import Features
from saetrain.features.pairs import PairFile
from tests.unit.features.conftest import (
    CASES,
    Collection,
    F,
    Firing,
    build_coder,
    encode_plainly,
    make_batches,
    write_collection,
)


def latents_of(found: Collection) -> list[tuple[int, list[Firing]]]:
    return [(latent, found.firings.get(latent, [])) for latent in range(F)]


def test_the_stream_has_every_token(collection: Collection) -> None:
    stream = collection.features.stream
    for name, expected in (
        ("token_id", collection.column("ids")),
        ("doc", collection.column("doc")),
        ("position", collection.column("position")),
        ("sequence", collection.column("sequence")),
    ):
        assert stream[name].to_numpy().tolist() == expected.tolist()
    assert np.flatnonzero(stream["kept"].to_numpy()).tolist() == collection.kept.tolist()


def test_the_case_covers_what_is_special(collection: Collection) -> None:
    counts = [len(firings) for _, firings in latents_of(collection)]
    assert max(counts) > statistics.CANDIDATES
    assert min(counts) < 30


def test_strengths(collection: Collection) -> None:
    for latent, firings in latents_of(collection):
        found, strengths = collection.features[latent], np.abs([firing.value for firing in firings])
        assert found.count == len(firings)
        assert found.rate == pytest.approx(len(firings) / len(collection.kept))
        if not firings:
            assert (found.max, found.mean_active, found.histogram.sum(), found.quantiles.sum()) == (0, 0, 0, 0)
            continue
        assert found.max == pytest.approx(strengths.max(), rel=1e-5)
        assert found.mean_active == pytest.approx(strengths.mean(), rel=1e-5)
        assert found.quantiles == pytest.approx(np.quantile(strengths, statistics.QUANTILES), rel=1e-4)
        expected, _ = np.histogram(strengths, bins=statistics.HISTOGRAM_BINS, range=(0, float(strengths.max())))
        # A strength within rounding of an edge may be in the next bin.
        assert np.abs(np.cumsum(found.histogram) - np.cumsum(expected)).max() <= 1
        assert found.histogram.sum() == len(firings)


def test_tokens_and_positions(collection: Collection) -> None:
    ids, position, sequence = (collection.column(name) for name in ("ids", "position", "sequence"))
    length = np.bincount(sequence)[sequence]
    vocabulary = collection.features.vocabulary
    for latent, firings in latents_of(collection):
        found, rows = collection.features[latent], [firing.row for firing in firings]
        counted = Counter(ids[rows].tolist())
        ranked = sorted(counted.items(), key=lambda item: (-item[1], item[0]))[: statistics.SHOWN_TOKENS]
        assert found.tokens == [(vocabulary[number], count) for number, count in ranked]
        bins = Counter(int(position[row] * 16 // length[row]) for row in rows)
        assert found.positions.tolist() == [bins[number] for number in range(16)]
        if rows:
            shares = np.array(list(counted.values())) / len(rows)
            assert found.purity == pytest.approx(shares.max())
            assert found.entropy == pytest.approx(-(shares * np.log2(shares)).sum(), abs=1e-5)
        else:
            assert (found.purity, found.entropy) == (None, None)


def expected_top(collection: Collection, firings: list[Firing], distinct: bool) -> list[int]:
    docs, chosen, seen = collection.column("doc"), [], set()
    ranked = sorted(firings, key=lambda firing: (-abs(firing.value), firing.row))
    for firing in ranked:
        if docs[firing.row] not in seen:
            seen.add(docs[firing.row])
            chosen.append(firing)
    if not distinct:
        chosen = []
    chosen = (chosen + [firing for firing in ranked if firing not in chosen])[: statistics.TOP_CONTEXTS]
    return [firing.row for firing in ranked if firing in chosen]


def check_contexts(collection: Collection, features: Features, *, distinct: bool) -> None:
    table = features._context_table[0].to_pylist()
    by_latent: dict[int, list[dict[str, int]]] = {latent: [] for latent in range(F)}
    for row in table:
        by_latent[row["latent"]].append(row)
    assert [row["latent"] for row in table] == sorted(row["latent"] for row in table)
    for latent, firings in latents_of(collection):
        ranked = sorted(firings, key=lambda firing: (-abs(firing.value), firing.row))
        wanted = [(0, row) for row in expected_top(collection, firings, distinct)]
        for band in range(4):
            low, high = band * len(ranked) // 4, (band + 1) * len(ranked) // 4
            places = dict.fromkeys(low + (2 * place + 1) * (high - low) // 6 for place in range(3) if high > low)
            wanted += [(band + 1, ranked[place].row) for place in places]
        wanted += [(5, firing.row) for firing in ranked[::-1][:3]]
        expected, seen = [], set()
        for band, row in wanted:
            if row not in seen:
                seen.add(row)
                expected.append((band, row))
        found = by_latent[latent]
        assert [(row["band"], row["token"]) for row in found] == expected
        for band in range(6):
            ranks = [row["rank"] for row in found if row["band"] == band]
            assert ranks == list(range(len(ranks)))


def test_contexts_with_distinct_documents(collection: Collection) -> None:
    check_contexts(collection, collection.features, distinct=True)


@pytest.mark.parametrize("case", ["causal", "transcoder"])
def test_contexts_without_distinct_documents(case: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    coder, site = build_coder(case)
    batches, model = make_batches(33, 200), request.getfixturevalue(CASES[case][0])
    head = write_collection(tmp_path / "all", model, coder, site, batches, distinct=False)
    found = encode_plainly(Features(tmp_path / "all"), coder, site, head, batches)
    check_contexts(found, found.features, distinct=False)


def test_documents_are_distinct_even_if_the_strongest_are_in_one(
    collection: Collection, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """With a single candidate, every latent needs the search over all of its pairs."""
    monkeypatch.setattr(statistics, "CANDIDATES", 1)
    case = request.node.callspec.params["collection"]
    coder, site = build_coder(case)
    model = request.getfixturevalue(CASES[case][0])
    write_collection(tmp_path / "few", model, coder, site, make_batches(33, 200))
    check_contexts(collection, Features(tmp_path / "few"), distinct=True)


def test_windows(collection: Collection) -> None:
    ids, sequence, docs = (collection.column(name) for name in ("ids", "sequence", "doc"))
    vocabulary, n_neighbours = collection.features.vocabulary, 0
    for latent, firings in latents_of(collection):
        values = {firing.row: firing.value for firing in firings}
        rows = collection.features._context_table[0].filter(
            collection.features._context_table[0]["latent"].to_numpy() == latent
        )
        for context, row in zip(collection.features[latent].contexts, rows["token"].to_pylist(), strict=True):
            window = [n for n in range(row - 16, row + 9) if 0 <= n < len(ids) and sequence[n] == sequence[row]]
            assert context.tokens == tuple(vocabulary[ids[n]] for n in window)
            assert context.activations == pytest.approx([values.get(n, 0.0) for n in window], rel=1e-4, abs=1e-6)
            assert context.token == vocabulary[ids[row]]
            assert context.value == pytest.approx(values[row], rel=1e-4)
            assert context.document == docs[row]
            n_neighbours += sum(value != 0 for value in context.activations) - 1
    assert n_neighbours > 0


def test_cofiring(collection: Collection) -> None:
    tokens = {latent: {firing.row for firing in firings} for latent, firings in collection.firings.items()}
    for latent in range(F):
        own, found = tokens.get(latent, set()), dict(collection.features[latent].cofiring)
        scores, lifts = {}, {}
        for other, theirs in tokens.items():
            both = len(own & theirs)
            if other != latent and both >= weights.MIN_TOGETHER:
                scores[other] = both / math.sqrt(len(own) * len(theirs))
                lifts[other] = len(collection.kept) * both / (len(own) * len(theirs))
        best = sorted(scores.values(), reverse=True)[: weights.NEIGHBOURS]
        assert [scores[other] for other in found] == pytest.approx(best)
        assert list(found.values()) == pytest.approx([lifts[other] for other in found])


def test_cofiring_of_a_sample(collection: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    fires = rng.random((400, 9)) < 0.4
    pairs = PairFile(Path(collection.features.folder) / f"sample{rng.integers(1 << 60)}", 9)
    row, latent = fires.nonzero()
    pairs.append_pairs(latent, row, np.ones(len(row), dtype=np.float32))
    pairs.write_pending()
    monkeypatch.setattr(weights, "MAX_PRODUCTS", pairs.n_products // 3)
    kept = rng.random(400) < 2
    found, lift = weights.find_cofiring(pairs, kept)
    sampled = fires[::4] if -(-pairs.n_products // (pairs.n_products // 3)) == 4 else fires[::3]
    assert len(sampled) in (100, 134)
    together = sampled.T.astype(int) @ sampled.astype(int)
    for one, (others, values) in enumerate(zip(found, lift, strict=True)):
        assert one not in others
        for other, value in zip(others, values, strict=True):
            if other >= 0:
                expected = len(sampled) * together[one, other] / (together[one, one] * together[other, other])
                assert value == pytest.approx(expected)


def test_weights(collection: Collection) -> None:
    rows = torch.nn.functional.normalize(collection.coder.W_dec, dim=1)
    cosines = (rows @ rows.T).fill_diagonal_(-1)
    encoder = collection.coder.W_enc.T
    for latent in range(F):
        found = collection.features[latent]
        best, _ = cosines[latent].topk(8)
        assert [cosine for _, cosine in found.neighbours] == pytest.approx(best.tolist(), abs=1e-5)
        for other, cosine in found.neighbours:
            assert float(cosines[latent, other]) == pytest.approx(cosine, abs=1e-5)
        if encoder.shape == rows.shape:
            expected = float(torch.cosine_similarity(encoder[latent], rows[latent], dim=0))
            assert found.encoder_decoder_cosine == pytest.approx(expected, abs=1e-5)
        else:
            assert found.encoder_decoder_cosine is None


def test_variance_explained_by_one_latent(collection: Collection) -> None:
    y = collection.y_ND.double()
    row_of = {int(row): number for number, row in enumerate(collection.kept)}
    centred = y - y.mean(dim=0)
    for latent, firings in latents_of(collection):
        f = torch.zeros(len(y), dtype=torch.float64)
        for firing in firings:
            f[row_of[firing.row]] = firing.value
        residual = centred - f[:, None] * collection.coder.W_dec[latent].double()
        expected = 1 - float(residual.square().sum() / centred.square().sum())
        assert collection.features[latent].variance_explained == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_loss_effects_are_stored(collection: Collection) -> None:
    assert collection.features[3].loss_effect == (0.5, 0.25, 0.75)
    assert collection.features[4].loss_effect is None


def test_a_single_latent_has_no_neighbours() -> None:
    latents, cosines = weights.find_neighbours(torch.randn(1, 8))
    assert latents.shape == cosines.shape == (1, 0)
