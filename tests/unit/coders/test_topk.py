"""TopK and AuxK against dense formulas written out, with every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saetrain.activations.normalize import Normalizer
from saetrain.coders.auxk import default_k_aux
from saetrain.coders.base import ENCODER_INIT_NORM
from saetrain.coders.topk import TopK
from saetrain.types import StepContext

D, F, N = 7, 29, 23
TERMS = ("W_enc", "b_enc", "W_dec", "b_dec")


def make(k: int, alpha: float = 0.0, seed: int = 0) -> TopK:
    coder = TopK(D, F, k, alpha, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        coder.W_enc += 0.1 * torch.randn(D, F, generator=generator)
        coder.b_enc += 0.1 * torch.randn(F, generator=generator)
        coder.b_dec += 0.1 * torch.randn(D, generator=generator)
    return coder


def data(seed: int = 5) -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed))


def progress(dead: Tensor | None = None, n: int = N) -> StepContext:
    return StepContext(0, n, dead, torch.tensor(float(D)), torch.tensor(2.5))


def run(coder: TopK, x: Tensor, ctx: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
    """Return reconstruction and losses."""
    encoded = coder.encode_train(x, ctx)
    reconstruction = coder.decode(encoded.codes)
    return reconstruction, coder.losses(x, encoded, reconstruction, ctx)


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def dense_code(coder: TopK, x: Tensor, b_dec: Tensor) -> Tensor:
    """The k largest of each row by sorting, then ReLU, as a dense matrix."""
    pre = (x - b_dec) @ coder.W_enc + coder.b_enc
    threshold = pre.sort(dim=1, descending=True).values[:, coder.k - 1 : coder.k]
    return pre.relu() * (pre >= threshold)


@pytest.mark.parametrize("k", [1, 3, 28, F])
def test_forward_and_all_gradients_equal_the_dense_formula(k: int) -> None:
    ours, theirs, x = make(k), make(k), data()
    found, losses = run(ours, x, progress())
    total(losses).backward()
    reconstruction = dense_code(theirs, x, theirs.b_dec) @ theirs.W_dec + theirs.b_dec
    ((x - reconstruction).pow(2).sum() / (N * D)).backward()
    torch.testing.assert_close(found, reconstruction)
    for name in TERMS:
        torch.testing.assert_close(getattr(ours, name).grad, getattr(theirs, name).grad, msg=name)


def test_rows_with_fewer_than_k_positive_entries_count_only_those() -> None:
    coder, x = make(F), data()
    codes = coder.encode(x)
    pre = (x - coder.b_dec) @ coder.W_enc + coder.b_enc
    assert torch.equal(codes.l0_per_token(), (pre > 0).sum(dim=1))
    assert torch.equal(codes.firing_counts(), (pre > 0).sum(dim=0))
    torch.testing.assert_close(codes.to_dense(), pre.relu())


def test_ties_keep_exactly_k() -> None:
    coder = make(4)
    with torch.no_grad():
        coder.W_enc.zero_()
        coder.b_enc.fill_(1.0)
    codes = coder.encode(data())
    assert (codes.l0_per_token() == 4).all()
    assert codes.indices is not None
    assert all(len(set(row)) == 4 for row in codes.indices.tolist())


def auxk_by_hand(coder: TopK, x: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
    pre = ((x - coder.b_dec.detach()) @ coder.W_enc + coder.b_enc).masked_fill(~dead, -torch.inf)
    k = min(default_k_aux(D), int(dead.sum()))
    values, indices = pre.topk(k, dim=1)
    code = torch.zeros(N, F).scatter(1, indices, values.relu())
    share = min(int(dead.sum()) / default_k_aux(D), 1.0)
    return share * (residual - code @ coder.W_dec).pow(2).sum() / (N * 2.5)


@pytest.mark.parametrize("n_dead", [1, 3, 4, 15])
def test_auxk_and_its_gradients_equal_the_formula_by_hand(n_dead: int) -> None:
    dead = torch.zeros(F, dtype=torch.bool)
    dead[torch.randperm(F, generator=torch.Generator().manual_seed(n_dead))[:n_dead]] = True
    ours, theirs, x = make(3, alpha=1.0), make(3, alpha=1.0), data()
    reconstruction, losses = run(ours, x, progress(dead))
    losses["auxk"].backward()
    residual = (x - reconstruction).detach()
    auxk_by_hand(theirs, x, residual, dead).backward()
    for name in ("W_enc", "b_enc", "W_dec"):
        ours_grad, theirs_grad = getattr(ours, name).grad, getattr(theirs, name).grad
        torch.testing.assert_close(ours_grad, theirs_grad, msg=name)
        assert ours_grad.abs().sum() > 0, f"AuxK does not train {name}"
    assert ours.b_dec.grad is None or not ours.b_dec.grad.any(), "AuxK must not move the decoder bias"


def test_auxk_leaves_live_latents_alone() -> None:
    dead = torch.zeros(F, dtype=torch.bool)
    dead[:5] = True
    coder, x = make(3, alpha=1.0), data()
    run(coder, x, progress(dead))[1]["auxk"].backward()
    assert coder.W_enc.grad is not None
    assert coder.W_dec.grad is not None
    assert not coder.W_enc.grad[:, ~dead].any()
    assert not coder.W_dec.grad[~dead].any()


def test_auxk_counts_the_bias_on_neither_side() -> None:
    """A constant added to x and to b_dec changes nothing, for neither the residual nor its estimate holds the bias."""
    dead = torch.ones(F, dtype=torch.bool)
    coder, x = make(3, alpha=1.0), data()
    before = run(coder, x, progress(dead))[1]["auxk"]
    with torch.no_grad():
        coder.b_dec += 3.0
    torch.testing.assert_close(run(coder, x + 3.0, progress(dead))[1]["auxk"], before)


def test_micro_batches_add_up_to_one_batch() -> None:
    dead = torch.zeros(F, dtype=torch.bool)
    dead[::3] = True
    whole, parts, x = make(3, alpha=0.5), make(3, alpha=0.5), data()
    total(run(whole, x, progress(dead))[1]).backward()
    for part in x.split([5, 1, 17]):
        total(run(parts, part, progress(dead))[1]).backward()
    for name in TERMS:
        torch.testing.assert_close(getattr(whole, name).grad, getattr(parts, name).grad, msg=name)


def test_the_encoder_starts_as_a_part_of_the_decoders_transpose_with_unit_rows() -> None:
    coder = TopK(D, F, 3, seed=4)
    torch.testing.assert_close(coder.W_enc, ENCODER_INIT_NORM * coder.W_dec.T)
    torch.testing.assert_close(coder.W_dec.norm(dim=1), torch.ones(F))
    assert torch.equal(coder.W_dec, TopK(D, F, 3, seed=4).W_dec)
    assert not torch.equal(coder.W_dec, TopK(D, F, 3, seed=5).W_dec)


def test_initial_weights_do_not_touch_the_global_generator() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    TopK(D, F, 3, seed=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_folded_and_unfolded_agree_and_undo_each_other() -> None:
    coder = make(3)
    mean, scale = torch.randn(D, generator=torch.Generator().manual_seed(9)) * 20, 7.5
    axes, _ = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(8)))
    raw, inputs = data() * scale + mean, Normalizer(mean, scale, axes, 1.0)
    before = {name: value.clone() for name, value in coder.state_dict().items()}
    outer = coder.folded(inputs, inputs)
    inner_codes, outer_codes = coder.encode((raw - mean) / scale @ axes), outer.encode(raw)
    torch.testing.assert_close(outer_codes.to_dense(), inner_codes.to_dense() * scale, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        outer.decode(outer_codes), coder.decode(inner_codes) @ axes.T * scale + mean, rtol=1e-4, atol=1e-4
    )
    assert all(torch.equal(value, before[name]) for name, value in coder.state_dict().items())
    outer.unfold_(inputs, inputs)
    for name, value in before.items():
        torch.testing.assert_close(getattr(outer, name), value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("width", "expected"), [(768, 512), (384, 256), (512, 256), (2, 1), (1, 1)])
def test_auxk_size_is_the_power_of_two_near_half_the_width(width: int, expected: int) -> None:
    assert default_k_aux(width) == expected
