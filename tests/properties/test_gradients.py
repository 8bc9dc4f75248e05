"""Loss terms and gradients of every architecture against formulas in float64 with dense tensors and plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from saetrain.coders import CODERS, SparseCoder, TopK
from saetrain.coders.auxk import default_k_aux
from saetrain.optim import OptimSettings
from saetrain.training.steps.autograd import AutogradStep
from tests.properties.test_coders import GROUP, D, F, K, N, build, draw, make_context

VARIANCE, RESIDUAL_VARIANCE = float(D), 0.7 * D
Weights = dict[str, Tensor]
Reference = Callable[[SparseCoder, Weights, Tensor, Tensor], dict[str, Tensor]]


def pre_activations(w: Weights, x: Tensor, b_dec: Tensor | None = None) -> Tensor:
    return (x - (w["b_dec"] if b_dec is None else b_dec)) @ w["W_enc"] + w["b_enc"]


def fvu(x: Tensor, x_hat: Tensor) -> Tensor:
    return (x - x_hat).square().sum() / (len(x) * VARIANCE)


def decode(w: Weights, code: Tensor, latents: int = F) -> Tensor:
    return code[:, :latents] @ w["W_dec"][:latents] + w["b_dec"]


def largest(values: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` largest entries."""
    limit = values.detach().flatten().sort(descending=True).values[count - 1]
    return values >= limit


def token_topk(pre: Tensor, k: int) -> Tensor:
    return pre.relu() * torch.stack([largest(row, k) for row in pre])


def auxk(w: Weights, x: Tensor, x_hat: Tensor, dead: Tensor, alpha: float) -> Tensor:
    rows = dead.nonzero().squeeze(1)
    k_aux = default_k_aux(D)
    code = token_topk(pre_activations(w, x, w["b_dec"].detach())[:, rows], min(k_aux, len(rows)))
    error = (code @ w["W_dec"][rows] - (x - x_hat).detach()).square().sum()
    return alpha * min(len(rows) / k_aux, 1) * error / (len(x) * RESIDUAL_VARIANCE)


def topk(coder: SparseCoder, w: Weights, x: Tensor, dead: Tensor) -> dict[str, Tensor]:
    pre = pre_activations(w, x)
    x_hat = decode(w, token_topk(pre, K))
    return {"recon": fvu(x, x_hat), "auxk": auxk(w, x, x_hat, dead, 0.1)}


def multi_topk(coder: SparseCoder, w: Weights, x: Tensor, dead: Tensor) -> dict[str, Tensor]:
    wide = fvu(x, decode(w, token_topk(pre_activations(w, x), 4 * K)))
    return {**topk(coder, w, x, dead), "multi_topk": wide / 8}


def abstopk(coder: SparseCoder, w: Weights, x: Tensor, dead: Tensor) -> dict[str, Tensor]:
    pre = pre_activations(w, x)
    return {"recon": fvu(x, decode(w, pre * torch.stack([largest(row.abs(), K) for row in pre])))}


def batchtopk_code(w: Weights, x: Tensor) -> Tensor:
    pre = pre_activations(w, x).relu()
    return pre * torch.cat([largest(part, K * GROUP) for part in pre.split(GROUP)])


def batchtopk(coder: SparseCoder, w: Weights, x: Tensor, dead: Tensor) -> dict[str, Tensor]:
    x_hat = decode(w, batchtopk_code(w, x))
    return {"recon": fvu(x, x_hat), "auxk": auxk(w, x, x_hat, dead, 0.1)}


def matryoshka(coder: SparseCoder, w: Weights, x: Tensor, dead: Tensor) -> dict[str, Tensor]:
    code = batchtopk_code(w, x)
    inner = [fvu(x, decode(w, code, latents)) for latents in (15, 30)]
    return {**batchtopk(coder, w, x, dead), "nested": torch.stack(inner).sum()}


def jumprelu(coder: SparseCoder, w: Weights, x: Tensor, dead: Tensor) -> dict[str, Tensor]:
    """A threshold appears only through (θ - θ.detach()), times the estimated derivative."""
    width, pre, theta = 0.5, pre_activations(w, x), w["threshold"]
    fixed = theta.detach()
    window = ((pre - fixed).abs() < width / 2).detach() / width
    active = (pre > fixed).double()
    assert int((active * window).sum()) > 0
    assert int(((1 - active) * window).sum()) > 0
    code = pre * active - fixed * window * (theta - fixed)
    l0 = (active - window * (theta - fixed)).sum(dim=1)
    missing = (theta - pre_activations(w, x, w["b_dec"].detach()))[:, dead].relu()
    target = coder.get_buffer("l0_target").double()
    return {
        "recon": fvu(x, decode(w, code)),
        "l0": 0.7 * (l0 / K - target).square().mean(),
        "dead_pre": 0.2 * missing.sum() / len(x),
    }


def standard(coder: SparseCoder, w: Weights, x: Tensor, dead: Tensor) -> dict[str, Tensor]:
    code = pre_activations(w, x).relu()
    penalty = (code @ w["W_dec"].norm(dim=1)).mean() / VARIANCE**0.5
    return {"recon": fvu(x, decode(w, code)), "l1": coder.get_buffer("l1_coefficient").double() * penalty}


CASES: dict[str, tuple[dict[str, Any], Reference]] = {
    "topk": ({"auxk_alpha": 0.1}, topk),
    "multi_topk": ({"auxk_alpha": 0.1, "multi_topk": True}, multi_topk),
    "abstopk": ({}, abstopk),
    "batchtopk": ({"auxk_alpha": 0.1}, batchtopk),
    "matryoshka": ({"auxk_alpha": 0.1, "prefixes": (0.25, 0.5, 1.0)}, matryoshka),
    "jumprelu": ({"l0_weight": 0.7, "dead_pre_weight": 0.2}, jumprelu),
    "standard": ({}, standard),
}


@pytest.mark.parametrize("is_plain", [False, True], ids=["fast", "plain"])
@pytest.mark.parametrize("case", {**CODERS, **CASES})
def test_losses_and_gradients_equal_the_formulas(case: str, is_plain: bool) -> None:
    settings, reference = CASES[case]
    coder, x = build(CODERS.get(case, TopK), **settings), draw(N, D)
    dead = torch.zeros(F, dtype=torch.bool)
    dead[[3, 17, 18, 40]] = True
    step = AutogradStep(coder, OptimSettings(), is_plain=is_plain)
    stats = step.forward_backward(x, make_context(dead=dead))
    weights = {name: p.detach().double().requires_grad_() for name, p in coder.named_parameters()}
    expected = reference(coder, weights, x.double(), dead)
    assert {name: float(value) for name, value in stats.losses.items()} == pytest.approx(
        {name: float(value.detach()) for name, value in expected.items()}, rel=1e-5
    )
    torch.stack(list(expected.values())).sum().backward()
    for name, parameter in coder.named_parameters():
        grad, found = weights[name].grad, parameter.grad
        assert grad is not None
        assert found is not None
        assert float(grad.abs().max()) > 0, name
        torch.testing.assert_close(found.double(), grad, rtol=1e-4, atol=1e-7, msg=name)
