"""Loss recovered against plain loops: one sequence at a time, no padding, probabilities written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saetrain.activations.extract import TokenPolicy
from saetrain.activations.lm_batches import LMBatchBuilder
from saetrain.activations.lm_head import LMHeadModel, load_model_with_head
from saetrain.activations.mlm_masking import select_masked_positions
from saetrain.activations.model import ModelSettings
from saetrain.coders.topk import TopK
from saetrain.data.sharded import build_token_policy
from saetrain.evaluation.baselines import Baselines, RunningMoments
from saetrain.evaluation.evaluator import EvalTarget, MetricResult
from saetrain.evaluation.loss_recovered import evaluate_losses
from saetrain.types import Codes, Site, TokenSequence, batch_by_length

CAUSAL_AT, MASKED_AT, ENCODER_AT = "h.1", "encoder.layer.1", "encoder.layer.3"
KEPT = build_token_policy(exclude_special=True, exclude_first=True)
ALL = build_token_policy(exclude_special=False, exclude_first=False)
MASK_ID = 103
SEED = 5
Activations = Callable[[LMHeadModel, list[TokenSequence], str], Tensor]


class Given(TopK):
    """A coder that rebuilds by a given function."""

    def __init__(self, d_in: int, rebuild: Callable[[Tensor], Tensor]) -> None:
        super().__init__(d_in, d_in, d_in)
        self.rebuild = rebuild

    def encode(self, x_ND: Tensor) -> Codes:
        return Codes(x_ND, None, self.d_in)

    def decode(self, codes: Codes, x_ND: Tensor | None = None) -> Tensor:
        return self.rebuild(codes.values)


def nulls_on(x: Tensor, coder: TopK) -> Baselines:
    moments = RunningMoments(x.shape[1], x.device)
    moments.add(x)
    return Baselines.from_moments(moments, coder.num_latents, 4, SEED)


def ours(
    head: LMHeadModel,
    sequences: list[TokenSequence],
    coder: TopK,
    nulls: Baselines,
    hookpoint: str,
    policy: TokenPolicy = KEPT,
    batch_tokens: int = 256,
    groups: int = 1,
    norm_limit: float = float("inf"),
) -> dict[str, MetricResult]:
    builder = LMBatchBuilder(head, policy, MASK_ID)
    parts = [sequences[start::groups] for start in range(groups)]
    batches = (batch for part in parts for batch in builder.iterate_batches(batch_by_length(part, batch_tokens), SEED))
    target = EvalTarget(Site.of_sae(hookpoint), coder, nulls.mean, nulls)
    return evaluate_losses({"sae": target}, head, batches, {hookpoint: norm_limit}, replicates=20, seed=SEED)["sae"]


def values(figures: dict[str, MetricResult]) -> dict[str, float]:
    return {name: figure.estimate.value for name, figure in figures.items()}


@dataclass
class ByHand:
    """One sequence at a time through the bare model, the output of one module replaced position by position."""

    head: LMHeadModel
    hookpoint: str
    variants: dict[str, Callable[[Tensor], Tensor]]
    policy: TokenPolicy
    norm_limit: float = float("inf")

    def outputs(self, ids: Tensor, keep: np.ndarray, rebuild: Callable[[Tensor], Tensor] | None, of: Any) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> Any:
            x = (output[0] if isinstance(output, tuple) else output).clone()
            for position in range(x.shape[1]):
                if keep[position] and float(x[0, position].norm()) <= self.norm_limit:
                    x[0, position] = rebuild(x[0, position].unsqueeze(0))[0] if rebuild else x[0, position]
            return (x, *output[1:]) if isinstance(output, tuple) else x

        handle = dict(self.head.base.module.named_modules())[self.hookpoint].register_forward_hook(hook)
        with torch.no_grad():
            out = of(ids.unsqueeze(0))
        handle.remove()
        return out

    def losses(self, sequences: list[TokenSequence]) -> dict[str, float]:
        sums = {f"{kind}_{name}": 0.0 for kind in ("ce", "kl") for name in ("clean", *self.variants)}
        count = 0
        for sequence in sequences:
            ids = torch.from_numpy(sequence.ids.astype(np.int64))
            if self.head.kind == "causal":
                pairs = [(at, int(ids[at + 1])) for at in range(len(ids) - 1)]
            else:
                pairs = [(at, int(ids[at])) for at in np.flatnonzero(select_masked_positions(sequence, SEED))]
                for at, _ in pairs:
                    ids[at] = MASK_ID
            if not pairs:
                continue
            keep = self.policy(sequence)
            run = {
                name: self.outputs(ids, keep, rebuild, self.head.module).logits[0].double().softmax(dim=-1)
                for name, rebuild in (("clean", None), *self.variants.items())
            }
            for at, target in pairs:
                count += 1
                for name, p in run.items():
                    sums[f"ce_{name}"] -= float(p[at, target].log())
                    sums[f"kl_{name}"] += float((run["clean"][at] * (run["clean"][at] / p[at]).log()).sum())
        return {name: value / count for name, value in sums.items()} | {"count": count}


def expected(hand: ByHand, sequences: list[TokenSequence]) -> dict[str, float]:
    """Our figures of what the loops give."""
    m = hand.losses(sequences)
    return {
        "ce_clean": m["ce_clean"],
        "ce_spliced": m["ce_sae"],
        "ce_zero": m["ce_zero"],
        "ce_mean": m["ce_mean"],
        "delta_ce": m["ce_sae"] - m["ce_clean"],
        "kl": m["kl_sae"],
        "kl_zero": m["kl_zero"],
        "kl_mean": m["kl_mean"],
        "ce_recovered_zero": (m["ce_zero"] - m["ce_sae"]) / (m["ce_zero"] - m["ce_clean"]),
        "ce_recovered_mean": (m["ce_mean"] - m["ce_sae"]) / (m["ce_mean"] - m["ce_clean"]),
        "kl_recovered_zero": 1 - m["kl_sae"] / m["kl_zero"],
        "kl_recovered_mean": 1 - m["kl_sae"] / m["kl_mean"],
    }


def coder_near(x: Tensor) -> TopK:
    """An untrained SAE that is centred, so that its reconstruction is neither perfect nor nothing."""
    coder = TopK(x.shape[1], 4 * x.shape[1], 8, seed=3).requires_grad_(False)
    coder.W_enc.copy_(coder.W_dec.T)
    coder.b_dec.copy_(x.mean(dim=0))
    return coder


def variants(coder: TopK, nulls: Baselines) -> dict[str, Callable[[Tensor], Tensor]]:
    """The reconstruction with all F latents written out, and the ablations."""

    def rebuild(x: Tensor) -> Tensor:
        pre = (x[0] - coder.b_dec) @ coder.W_enc + coder.b_enc
        out = coder.b_dec.clone()
        for latent in pre.argsort(descending=True)[: coder.k].tolist():
            out += max(float(pre[latent]), 0.0) * coder.W_dec[latent]
        return out.unsqueeze(0)

    return {"sae": rebuild, "zero": lambda x: x * 0, "mean": lambda x: nulls.mean.unsqueeze(0)}


CASES = [("gpt2_head", "packed", CAUSAL_AT), ("mlm_head", "single", MASKED_AT)]


@pytest.mark.parametrize("policy", [KEPT, ALL], ids=["kept", "all"])
@pytest.mark.parametrize(("model", "text", "hookpoint"), CASES)
def test_losses_equal_plain_loops(
    model: str,
    text: str,
    hookpoint: str,
    policy: TokenPolicy,
    request: pytest.FixtureRequest,
    activations: Activations,
) -> None:
    head, sequences = request.getfixturevalue(model), request.getfixturevalue(text)
    x = activations(head, sequences, hookpoint)
    coder = coder_near(x)
    nulls = nulls_on(x, coder)
    wanted = expected(ByHand(head, hookpoint, variants(coder, nulls), policy), sequences)
    apart = sorted(wanted[name] for name in ("ce_clean", "ce_spliced", "ce_zero", "ce_mean"))
    assert min(np.diff(apart)) > 1e-3, "the variants are told apart"
    assert wanted["kl"] > 1e-3
    for batch_tokens in (1, 130, 10_000):
        figures = values(ours(head, sequences, coder, nulls, hookpoint, policy, batch_tokens))
        got = {name: figures[name] for name in wanted}
        ratios = {name for name in wanted if "recovered" in name}
        for name in wanted:
            assert got[name] == pytest.approx(wanted[name], abs=1e-4 if name in ratios else 1e-5), name


def test_the_policies_replace_different_positions(
    gpt2_head: LMHeadModel, packed: list[TokenSequence], activations: Activations
) -> None:
    x = activations(gpt2_head, packed, CAUSAL_AT)
    coder = coder_near(x)
    nulls = nulls_on(x, coder)
    everywhere = values(ours(gpt2_head, packed, coder, nulls, CAUSAL_AT, ALL))
    kept = values(ours(gpt2_head, packed, coder, nulls, CAUSAL_AT, KEPT))
    untouched = values(ours(gpt2_head, packed, coder, nulls, CAUSAL_AT, ALL, norm_limit=0.0))
    assert everywhere["ce_clean"] == kept["ce_clean"] == untouched["ce_clean"]
    assert abs(everywhere["ce_spliced"] - kept["ce_spliced"]) > 1e-4
    assert untouched["ce_spliced"] == untouched["ce_clean"]
    assert untouched["kl"] == pytest.approx(0, abs=1e-9)


def test_positions_above_the_norm_limit_stay_as_they_are(
    gpt2_head: LMHeadModel, packed: list[TokenSequence], activations: Activations
) -> None:
    x = activations(gpt2_head, packed, CAUSAL_AT)
    limit = float(x.norm(dim=1).median())
    coder = coder_near(x)
    nulls = nulls_on(x, coder)
    wanted = expected(ByHand(gpt2_head, CAUSAL_AT, variants(coder, nulls), ALL, limit), packed)
    got = values(ours(gpt2_head, packed, coder, nulls, CAUSAL_AT, ALL, norm_limit=limit))
    everywhere = values(ours(gpt2_head, packed, coder, nulls, CAUSAL_AT, ALL))
    assert got["ce_spliced"] == pytest.approx(wanted["ce_spliced"], abs=1e-5)
    assert abs(got["ce_spliced"] - everywhere["ce_spliced"]) > 1e-3


@pytest.mark.parametrize(("model", "text", "hookpoint"), CASES)
def test_a_perfect_sae_recovers_all_and_the_mean_nothing(
    model: str, text: str, hookpoint: str, request: pytest.FixtureRequest, activations: Activations
) -> None:
    head, sequences = request.getfixturevalue(model), request.getfixturevalue(text)
    x = activations(head, sequences, hookpoint)
    perfect = Given(x.shape[1], lambda x: x)
    nulls = nulls_on(x, perfect)
    figures = values(ours(head, sequences, perfect, nulls, hookpoint))
    for name in ("ce_recovered_zero", "ce_recovered_mean", "kl_recovered_zero", "kl_recovered_mean"):
        assert figures[name] == pytest.approx(1, abs=1e-5), name
    assert figures["delta_ce"] == pytest.approx(0, abs=1e-6)
    dead = TopK(x.shape[1], 64, 8).requires_grad_(False)
    dead.b_enc.fill_(-1e6)
    dead.b_dec.copy_(nulls.mean)
    figures = values(ours(head, sequences, dead, nulls, hookpoint))
    assert figures["ce_recovered_mean"] == pytest.approx(0, abs=1e-6)
    assert figures["kl_recovered_mean"] == pytest.approx(0, abs=1e-6)
    assert figures["ce_spliced"] == pytest.approx(figures["ce_mean"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "text", "hookpoint"), [*CASES, ("encoder_head", "single", ENCODER_AT)])
def test_figures_depend_neither_on_batches_nor_on_order(
    model: str, text: str, hookpoint: str, request: pytest.FixtureRequest, activations: Activations
) -> None:
    head, sequences = request.getfixturevalue(model), request.getfixturevalue(text)
    x = activations(head, sequences, hookpoint)
    coder = coder_near(x)
    nulls = nulls_on(x, coder)
    whole = ours(head, sequences, coder, nulls, hookpoint, batch_tokens=10_000)
    for other in (
        ours(head, sequences, coder, nulls, hookpoint, batch_tokens=1),
        ours(head, sequences[::-1], coder, nulls, hookpoint, batch_tokens=150, groups=3),
    ):
        for name, figure in whole.items():
            again = other[name]
            assert again.count == figure.count
            first, second = ((e.value, e.low, e.high) for e in (figure.estimate, again.estimate))
            assert second == pytest.approx(first, rel=1e-3, abs=2e-5, nan_ok=True), name
    if head.kind != "none":
        assert whole["ce_clean"].estimate.low < whole["ce_clean"].estimate.high


@pytest.mark.slow
def test_hidden_states_and_pooled_output_equal_plain_loops(
    encoder_head: LMHeadModel, single: list[TokenSequence], activations: Activations
) -> None:
    x = activations(encoder_head, single, ENCODER_AT)
    coder = coder_near(x)
    nulls = nulls_on(x, coder)
    hand = ByHand(encoder_head, ENCODER_AT, variants(coder, nulls), KEPT)
    wanted: dict[str, dict[str, float]] = {}
    for name, rebuild in hand.variants.items():
        error, norm, cosines = 0.0, 0.0, []
        for sequence in single:
            ids, keep = torch.from_numpy(sequence.ids.astype(np.int64)), KEPT(sequence)
            clean = hand.outputs(ids, keep, None, encoder_head.base.module).last_hidden_state[0].double()
            other = hand.outputs(ids, keep, rebuild, encoder_head.base.module).last_hidden_state[0].double()
            for a, b in zip(clean, other, strict=True):
                error += float(((a - b) ** 2).sum())
                norm += float((a**2).sum())
            a, b = clean.mean(dim=0), other.mean(dim=0)
            cosines.append(float(a @ b / (a.norm() * b.norm())))
        wanted[name] = {"final_hidden_error": (error / norm) ** 0.5, "pooled_cosine": sum(cosines) / len(cosines)}
    assert 0.05 < wanted["sae"]["final_hidden_error"] < wanted["mean"]["final_hidden_error"] - 0.02
    for batch_tokens in (1, 200, 10_000):
        figures = ours(encoder_head, single, coder, nulls, ENCODER_AT, batch_tokens=batch_tokens)
        assert values(figures) == pytest.approx(wanted["sae"], abs=1e-5)
        assert {name: figure.baselines["mean"].value for name, figure in figures.items()} == pytest.approx(
            wanted["mean"], abs=1e-5
        )
        assert figures["pooled_cosine"].count == len(single)
        assert figures["final_hidden_error"].count == sum(map(len, single))


def test_a_perfect_sae_leaves_an_encoder_as_it_is(
    encoder_head: LMHeadModel, single: list[TokenSequence], activations: Activations
) -> None:
    x = activations(encoder_head, single, ENCODER_AT)
    perfect = Given(x.shape[1], lambda x: x)
    figures = values(ours(encoder_head, single, perfect, nulls_on(x, perfect), ENCODER_AT))
    assert figures == pytest.approx({"pooled_cosine": 1.0, "final_hidden_error": 0.0}, abs=1e-6)


def test_an_ablation_that_costs_nothing_is_flagged(tiny_gpt2: str, packed: list[TokenSequence]) -> None:
    """With untrained weights no token depends on its context, so nothing is lost and a ratio to it is noise."""
    head = load_model_with_head(tiny_gpt2, ModelSettings(device="cpu"))
    coder = TopK(32, 64, 4).requires_grad_(False)
    nulls = nulls_on(torch.randn(50, 32, generator=torch.Generator().manual_seed(0)) * 0.1, coder)
    figures = ours(head, packed, coder, nulls, "h.3")
    assert figures["kl_zero"].estimate.value < 0.05
    assert figures["kl_recovered_zero"].flag == "small denominator"
    assert figures["ce_spliced"].flag == ""
