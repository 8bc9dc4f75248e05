"""All figures of a coder on activations, against formulas over the tokens of each class."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saetrain.activations.extract import LabelledActivations, TokenClass
from saetrain.coders.base import SparseCoder
from saetrain.coders.topk import TopK
from saetrain.errors import SaetrainError
from saetrain.evaluation.baselines import Baselines, RunningMoments
from saetrain.evaluation.evaluator import EvalTarget, SaeScores, ScoreSettings, evaluate_coders
from saetrain.types import Codes, Site

N, D, F, K, AT = 3000, 16, 96, 5, "layers.0"
REPLICATES = 25
THRESHOLD = 0.02


@pytest.fixture(scope="module")
def coder() -> TopK:
    coder = TopK(D, F, K, seed=1).requires_grad_(False)
    coder.W_enc.copy_(coder.W_dec.T)
    coder.b_dec.fill_(3.0)
    coder.b_enc.copy_(torch.linspace(-4, -1, F))
    return coder


@pytest.fixture(scope="module")
def tokens() -> LabelledActivations:
    """Tokens of each class, the left-out ones ten times as large."""
    rng = np.random.default_rng(0)
    place = rng.choice(4, N, p=[0.85, 0.08, 0.05, 0.02]).astype(np.uint8)
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0)) + 3
    x[torch.from_numpy(place != TokenClass.KEPT)] *= 10
    return LabelledActivations({AT: x}, np.sort(rng.integers(0, 60, N)), place)


def nulls_of(x: torch.Tensor) -> Baselines:
    moments = RunningMoments(D, x.device)
    moments.add(x + 0.05)
    return Baselines.from_moments(moments, F, K, seed=0)


def run(coder: TopK, nulls: Baselines, batches: list[LabelledActivations]) -> SaeScores:
    targets = {"sae": EvalTarget(Site.of_sae(AT), coder, nulls.mean, nulls)}
    return evaluate_coders(targets, batches, THRESHOLD, replicates=REPLICATES)["sae"]


def pieces(tokens: LabelledActivations, order: np.ndarray, parts: int) -> list[LabelledActivations]:
    return [
        LabelledActivations({AT: tokens.values[AT][torch.from_numpy(rows)]}, tokens.doc[rows], tokens.token_class[rows])
        for rows in np.array_split(order, parts)
    ]


def explained(x: torch.Tensor, estimate: torch.Tensor) -> float:
    a, b = x.double(), estimate.double()
    return float(1 - (a - b).pow(2).sum() / (a - a.mean(dim=0)).pow(2).sum())


def test_figures_are_of_the_kept_tokens_beside_their_nulls(coder: TopK, tokens: LabelledActivations) -> None:
    x = tokens.values[AT]
    kept = x[torch.from_numpy(tokens.token_class == TokenClass.KEPT)]
    nulls = nulls_of(kept)
    scores = run(coder, nulls, [tokens])
    # The reconstruction, with all F latents written out.
    pre = (kept - coder.b_dec) @ coder.W_enc + coder.b_enc
    code = torch.where(pre >= pre.sort(dim=1).values[:, [-K]], pre.clamp_min(0), 0)
    estimate = code @ coder.W_dec + coder.b_dec
    found = scores.metrics["explained_variance"]
    assert found.estimate.value == pytest.approx(explained(kept, estimate), abs=1e-5)
    assert found.estimate.low < found.estimate.value < found.estimate.high
    assert found.count == len(kept)
    assert {name: null.value for name, null in found.baselines.items()} == pytest.approx(
        {
            "random_decoder": explained(kept, nulls.random_decoder(kept)),
            "pca": explained(kept, nulls.pca(kept)),
            "mean": explained(kept, nulls.mean.expand_as(kept)),
        },
        abs=1e-6,
    )
    assert found.baselines["mean"].value < 0 < found.baselines["random_decoder"].value
    rates = (code > 0).double().mean(dim=0)
    l0 = scores.metrics["l0"]
    assert l0.estimate.value == pytest.approx(float(rates.sum()), abs=1e-3)
    assert l0.estimate.value < K - 0.1
    assert l0.baselines["random_decoder"].value == pytest.approx(
        float((nulls.random_decoder.encode(kept).values > 0).sum(dim=1).double().mean())
    )
    dead = scores.metrics["dead_below_threshold"]
    assert dead.estimate.value == pytest.approx(float((rates < THRESHOLD).double().mean()), abs=1.01 / F)
    assert 0.05 < dead.estimate.value < 0.95
    assert scores.n_documents == len(np.unique(tokens.doc))


def test_classes_of_positions_are_told_apart_and_add_up(coder: TopK, tokens: LabelledActivations) -> None:
    x = tokens.values[AT]
    scores = run(coder, nulls_of(x), [tokens])
    estimate = coder.decode(coder.encode(x))
    assert set(scores.metrics_by_class) == {"kept", "special", "first", "outlier", "all"}
    for place in TokenClass:
        rows = torch.from_numpy(tokens.token_class == place)
        of = scores.metrics_by_class[place.name.lower()]
        assert of["tokens"] == int(rows.sum())
        assert of["explained_variance"] == pytest.approx(explained(x[rows], estimate[rows]), abs=1e-6)
    assert scores.metrics_by_class["all"]["tokens"] == N
    assert scores.metrics_by_class["all"]["explained_variance"] == pytest.approx(explained(x, estimate), abs=1e-6)
    assert abs(scores.metrics_by_class["all"]["fvu"] - scores.metrics_by_class["kept"]["fvu"]) > 0.01


@pytest.mark.slow
def test_batches_and_their_order_change_nothing(coder: TopK, tokens: LabelledActivations) -> None:
    nulls = nulls_of(tokens.values[AT])
    whole = run(coder, nulls, [tokens])
    for parts, order in (
        (1, np.arange(N)[::-1].copy()),
        (40, np.random.default_rng(1).permutation(N)),
        (700, np.arange(N)),
    ):
        again = run(coder, nulls, pieces(tokens, order, parts))
        for name, figure in whole.metrics.items():
            other = again.metrics[name]
            assert other.count == figure.count
            for a, b in (
                (figure.estimate, other.estimate),
                *((figure.baselines[n], other.baselines[n]) for n in figure.baselines),
            ):
                assert (b.value, b.low, b.high) == pytest.approx((a.value, a.low, a.high), abs=2e-5, nan_ok=True), name
        assert again.density_histogram == whole.density_histogram
        assert again.l0_percentiles == whole.l0_percentiles


def test_text_without_a_token_that_counts(coder: TopK, tokens: LabelledActivations) -> None:
    only = LabelledActivations(tokens.values, tokens.doc, np.full(N, TokenClass.SPECIAL, dtype=np.uint8))
    scores = run(coder, nulls_of(tokens.values[AT]), [only])
    assert np.isnan(scores.metrics["explained_variance"].estimate.value)
    assert scores.metrics["l0"].count == 0
    assert scores.metrics_by_class["special"]["tokens"] == N
    assert scores.metrics["explained_variance"].as_json("x")["value"] is None


def test_without_baselines_and_replicates_the_values_are_the_same(coder: TopK, tokens: LabelledActivations) -> None:
    """As while training: no intervals, no baselines but the expected ones of geometry, and only the first tokens."""
    first = 1700
    part = LabelledActivations({AT: tokens.values[AT][:first]}, tokens.doc[:first], tokens.token_class[:first])
    nulls = nulls_of(tokens.values[AT])
    full = run(coder, nulls, [part])
    target = EvalTarget(Site.of_sae(AT), coder, nulls.mean)
    seen: list[int] = []
    quick = evaluate_coders(
        {"sae": target}, pieces(tokens, np.arange(N), 2), THRESHOLD, max_tokens=first, on_progress=seen.append
    )["sae"]
    assert seen == [1500, 200]
    record = quick.to_log_record()
    assert record["tokens"] == full.metrics["fvu"].count == int((part.token_class == TokenClass.KEPT).sum())
    for name, figure in full.metrics.items():
        assert record[name] == pytest.approx(figure.estimate.value, rel=1e-6), name
        assert np.isnan(quick.metrics[name].estimate.low)
        assert set(quick.metrics[name].baselines) == set(figure.baselines) & {"random_directions"}
    assert (
        record["decoder_max_cosine_random"] == full.metrics["decoder_max_cosine"].baselines["random_directions"].value
    )
    assert (record["l0_p5"], record["l0_p95"]) == (full.l0_percentiles["p5"], full.l0_percentiles["p95"])
    for name, figures in full.metrics_by_class.items():
        assert quick.metrics_by_class[name] == pytest.approx(figures), name


class Transcoder(SparseCoder):
    """x (N, D) -> dense code with negative values -> y (N, D_OUT), with its own bias for the input."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, F, seed=2, d_out=d_out)
        self.W_dec = torch.nn.Parameter(torch.randn(F, d_out, generator=torch.Generator().manual_seed(3)) * 0.1)
        self.b_dec = torch.nn.Parameter(torch.linspace(-1, 1, d_out))

    def encode(self, x_ND: torch.Tensor) -> Codes:
        pre = x_ND @ self.W_enc
        return Codes(pre.where(pre.abs() > 1.2, 0), None, F)


def test_a_transcoder_is_compared_with_its_target_and_counted_by_its_input(tokens: LabelledActivations) -> None:
    d_out = 7
    x = tokens.values[AT]
    y = torch.randn(N, d_out, generator=torch.Generator().manual_seed(4)) + x[:, :d_out]
    coder = Transcoder(D, d_out).requires_grad_(False)
    batch = LabelledActivations({AT: x, "mlp": y}, tokens.doc, tokens.token_class)
    kept = torch.from_numpy(tokens.token_class == TokenClass.KEPT)
    moments = RunningMoments(d_out, y.device)
    moments.add(y[kept])
    nulls = Baselines.from_moments(moments, F, 5.4, seed=0)
    target = EvalTarget(Site((AT,), ("mlp",)), coder, nulls.mean, nulls)
    figures = evaluate_coders({"transcoder": target}, [batch], THRESHOLD, replicates=REPLICATES)["transcoder"].metrics
    code = x[kept] @ coder.W_enc
    code[code.abs() <= 1.2] = 0
    wanted = explained(y[kept], code @ coder.W_dec + coder.b_dec)
    assert figures["explained_variance"].estimate.value == pytest.approx(wanted, abs=1e-5)
    assert figures["explained_variance"].baselines["pca"].value == pytest.approx(explained(y[kept], nulls.pca(y[kept])))
    assert (code < 0).any(), "an active latent may be negative"
    active = (code != 0).double()
    assert 1 < float(active.sum(dim=1).mean()) < F / 2
    assert figures["l0"].estimate.value == pytest.approx(float(active.sum(dim=1).mean()))
    assert figures["l0"].estimate.low < figures["l0"].estimate.value < figures["l0"].estimate.high
    assert figures["l0"].baselines["random_decoder"].value <= 5, "rounded"
    assert figures["alive"].estimate.value == pytest.approx(float((active.sum(dim=0) > 0).double().mean()))
    assert np.isnan(figures["encoder_decoder_cosine"].estimate.value), "the widths differ"
    assert 0 < figures["decoder_max_cosine"].estimate.value < 1


@pytest.mark.parametrize(
    "values",
    [
        {"bootstrap": 1},
        {"bootstrap": -1},
        {"loss_tokens": -1},
        {"fit_tokens": 1},
        {"eval_seed": -1},
        {"eval_seed": 2**64},
    ],
)
def test_settings_out_of_range_are_refused(values: dict) -> None:
    with pytest.raises(SaetrainError, match=f"--{next(iter(values))}"):
        ScoreSettings(**values)
