"""``saetrain.attribute_latents`` equals brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
)

import saetrain
from saetrain.coders.gated import Gated
from saetrain.interop.metadata import SaeMetadata
from saetrain.sae import SAE
from tests.unit.splicing.conftest import (
    BUILDERS,
    IDS,
    SIZES,
    D,
    F,
    active_latents,
    hand_written,
    make_sae,
    module_of,
)


def logit(output: Any) -> Tensor:
    return output.logits[0, -1, 3]  # type: ignore[no-any-return]


def test_exact_attribution_equals_brute_force(model: nn.Module, family: str, sae: SAE) -> None:
    inputs = {"input_ids": IDS[:1]}
    found = saetrain.attribute_latents(model, sae, inputs, logit, exact=True).to_dense()
    with torch.no_grad(), saetrain.splice(model, sae) as spliced:
        clean = logit(model(**inputs))
    dense = spliced.codes.to_dense()
    for token, latent in dense.nonzero().tolist():

        def ablate(x: Tensor, token: int = token, latent: int = latent) -> Tensor:
            x = x.clone()
            x[0, token] -= dense[token, latent] * sae.W_dec[latent]
            return x

        with torch.no_grad(), hand_written(module_of(model, family), ablate):
            expected = float(clean - logit(model(**inputs)))
        assert float(found[token, latent]) == pytest.approx(expected, rel=1e-2, abs=2e-6)
    assert int((found != 0).sum()) <= int((dense != 0).sum())
    only = saetrain.attribute_latents(model, sae, inputs, logit, exact=True, latents=[int(dense.sum(0).argmax())])
    assert set(only.to_dense().nonzero()[:, 1].tolist()) <= {int(dense.sum(0).argmax())}


def test_gradient_attribution_is_the_slope_of_a_small_change(model: nn.Module, sae: SAE) -> None:
    model = model.double()
    try:
        inputs, step = {"input_ids": IDS[:1]}, 1e-2
        found = saetrain.attribute_latents(model, sae, inputs, logit).to_dense()
        for latent in active_latents(model, sae):
            moved = []
            for factor in (1 - step, 1 + step):
                with torch.no_grad(), saetrain.splice(model, sae, scale={latent: factor}):
                    moved.append(float(logit(model(**inputs))))
            slope = (moved[1] - moved[0]) / (2 * step)
            assert float(found[:, latent].sum()) == pytest.approx(slope, rel=1e-2, abs=1e-6)
    finally:
        model.float()


@pytest.mark.parametrize("exact", [False, True])
def test_masked_tokens_and_classes_are_attributed_too(exact: bool) -> None:
    torch.manual_seed(0)
    sae = make_sae("encoder.layer.1")
    ids = {"input_ids": IDS[:1, :4]}
    masked = BertForMaskedLM(BertConfig(**SIZES)).eval()
    classifier = BertForSequenceClassification(BertConfig(**SIZES, num_labels=2)).eval()
    for model, metric in (
        (masked, lambda out: out.logits[0, 2].log_softmax(-1)[9]),
        (classifier, lambda out: out.logits[0, 1]),
    ):
        scores = saetrain.attribute_latents(model, sae, ids, metric, exact=exact)
        assert float(scores.to_dense().abs().sum()) > 0
        assert all(parameter.grad is None for parameter in model.parameters())


def test_a_gated_sae_is_spliced_and_attributed() -> None:
    model = BUILDERS["gpt2"]().eval().requires_grad_(False)
    coder = Gated(D, F, seed=1).requires_grad_(False)
    coder.b_mag.fill_(0.1)
    sae = SAE(coder, SaeMetadata(hook_name="blocks.1.hook_resid_post"), Path("sae"))
    inputs = {"input_ids": IDS[:1]}
    scores = saetrain.attribute_latents(model, sae, inputs, lambda out: out.logits[0, -1, 3])
    exact = saetrain.attribute_latents(model, sae, inputs, lambda out: out.logits[0, -1, 3], exact=True, latents=[0, 1])
    assert scores.to_dense().shape == exact.to_dense().shape == (IDS.shape[1], F)
    assert int((scores.to_dense() != 0).sum()) > 0
