"""Properties of coders: folding, saving, code layouts, micro-batches, and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saetrain.activations.normalize import Normalizer
from saetrain.coders import CODERS, SparseCoder
from saetrain.coders.jumprelu import JumpReLU
from saetrain.coders.standard import Standard
from saetrain.interop.formats import WRITTEN_FORMATS, load_sae, save_sae
from saetrain.interop.metadata import SaeMetadata
from saetrain.ops import plain_products
from saetrain.optim import OptimSettings
from saetrain.training.steps.autograd import AutogradStep
from saetrain.types import StepContext, TokenGroups
from tests.architectures.abs_topk import AbsTopK
from tests.architectures.relu_l1 import ReluL1
from tests.architectures.threshold import Threshold

D, F, K, N = 12, 60, 4, 50
GROUP = 10
"""Tokens per group of coders that select in groups."""
ARCHITECTURES: dict[str, type[SparseCoder]] = {
    **CODERS,
    "relu_l1": ReluL1,
    "abs_topk": AbsTopK,
    "threshold": Threshold,
}
CONTROLLED = (JumpReLU, Standard)
"""Architectures that reach their L0 by training (tests/unit/coders/test_l0_control.py)."""
METADATA = SaeMetadata(model="m", hookpoint="h.0", hook_name="blocks.0.hook_resid_post", ctx_len=8, prepend_bos=True)


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> type[SparseCoder]:
    return ARCHITECTURES[request.param]


@pytest.fixture(params=[None, 7, D], ids=["sae", "narrower", "same width"])
def d_out(request: pytest.FixtureRequest) -> int | None:
    """Width of the outputs; None for an SAE."""
    return request.param  # type: ignore[no-any-return]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(cls: type[SparseCoder], d_out: int | None = None, seed: int = 1, **settings: Any) -> SparseCoder:
    """Return a coder with random biases and, where there is one, a threshold."""
    coder = cls.build(cls.Settings(k=K, num_latents=F, **settings), D, d_out, seed=seed)
    with torch.no_grad():
        coder.b_enc.copy_(0.1 * draw(F, seed=2))
        coder.b_dec.copy_(0.1 * draw(coder.d_out, seed=3))
        if "threshold" in dict(coder.named_buffers()):
            coder.get_buffer("threshold").fill_(0.2)
    return coder


def make_normalizer(width: int, scale: float, seed: int) -> Normalizer:
    axes, _ = torch.linalg.qr(draw(width, width, seed=seed))
    return Normalizer(5 * draw(width, seed=seed + 1), scale, axes, 1.0)


def make_context(n_tokens: int = N, rows: int = N, dead: Tensor | None = None) -> StepContext:
    """Return the context of a micro-batch of ``rows`` tokens, in the sample order, of a step of ``n_tokens``."""
    groups = TokenGroups(torch.arange(rows), GROUP, rows // GROUP)
    variances = torch.tensor(float(D)), torch.tensor(0.7 * D)
    return StepContext(0, n_tokens, dead, *variances, total_steps=10, groups=groups)


def test_a_folded_coder_equals_the_normalized_one(architecture: type[SparseCoder], d_out: int | None) -> None:
    coder = build(architecture, d_out)
    inputs = make_normalizer(D, 3.0, 10)
    outputs = inputs if d_out is None else make_normalizer(coder.d_out, 0.5, 20)
    raw = draw(N, D) * 3 + inputs.mean
    before = {name: value.clone() for name, value in coder.state_dict().items()}
    folded = coder.folded(inputs, outputs)
    codes, own_codes = folded.encode(raw), coder.encode(inputs(raw))
    torch.testing.assert_close(codes.to_dense(), outputs.scale * own_codes.to_dense(), rtol=1e-3, atol=1e-3)
    expected = outputs.denormalize(coder.decode(own_codes, inputs(raw)))
    torch.testing.assert_close(folded.decode(codes, raw), expected, rtol=1e-3, atol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in coder.state_dict().items()), "the coder has changed"
    folded.unfold_(inputs, outputs)
    for name, value in folded.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_saved_and_loaded_coder_is_the_same(
    architecture: type[SparseCoder], d_out: int | None, tmp_path: Path
) -> None:
    coder = build(architecture, d_out)
    skipped = save_sae(tmp_path, coder, METADATA)
    loaded, metadata = load_sae(tmp_path)
    assert type(loaded) is architecture
    assert metadata == METADATA
    assert loaded.is_sae == coder.is_sae
    for name, value in coder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    x = draw(N, D)
    assert torch.equal(loaded.decode(loaded.encode(x), x), coder.decode(coder.encode(x), x))
    assert set(skipped) == {each.NAME for each in WRITTEN_FORMATS if each.unsupported(coder) is not None}


def test_formats_that_can_hold_it_give_the_same_outputs(architecture: type[SparseCoder], tmp_path: Path) -> None:
    coder, x = build(architecture), draw(N, D)
    save_sae(tmp_path, coder, METADATA)
    for each in WRITTEN_FORMATS:
        if each.unsupported(coder) is not None:
            continue
        found = each.read_sae(tmp_path)
        assert found is not None, each.NAME
        torch.testing.assert_close(found[0].decode(found[0].encode(x)), coder.decode(coder.encode(x)))


def test_layouts_of_codes_agree(architecture: type[SparseCoder], d_out: int | None) -> None:
    coder, x = build(architecture, d_out), draw(N, D)
    for codes in (coder.encode(x), coder.encode_train(x, make_context()).codes):
        dense = codes.to_dense()
        assert dense.shape == (N, F) == (len(codes), codes.n_latents)
        torch.testing.assert_close(coder.decode(codes, x), dense @ coder.W_dec + coder.b_dec)
        assert torch.equal(codes.l0_per_token(), (dense != 0).sum(dim=1))
        assert torch.equal(codes.firing_counts(), (dense != 0).sum(dim=0))
        rows = torch.tensor([7, 3, 3, 40])
        assert torch.equal(codes.select_tokens(rows).to_dense(), dense[rows])


def test_a_code_does_not_depend_on_the_batch(architecture: type[SparseCoder]) -> None:
    coder, x = build(architecture), draw(N, D)
    with torch.no_grad():
        whole = coder.encode(x).to_dense()
        torch.testing.assert_close(torch.cat([coder.encode(part).to_dense() for part in x.split(11)]), whole)


@pytest.mark.parametrize("with_gradients", [False, True])
def test_no_tokens_have_an_empty_code(architecture: type[SparseCoder], with_gradients: bool) -> None:
    coder = build(architecture)
    with torch.set_grad_enabled(with_gradients):
        codes = coder.encode(torch.zeros(0, D))
        assert codes.to_dense().shape == (0, F)
        assert coder.decode(codes, torch.zeros(0, D)).shape == (0, coder.d_out)


def test_the_expected_l0_is_that_of_training(architecture: type[SparseCoder]) -> None:
    coder = build(architecture)
    l0 = coder.expected_l0()
    if l0 is not None and architecture not in CONTROLLED:
        coder.get_parameter("b_enc").data += 1.0
        assert float(coder.encode_train(draw(N, D), make_context()).codes.l0_per_token().float().mean()) == l0


def gradients(coder: SparseCoder, batches: list[tuple[Tensor, Tensor | None]], *, is_plain: bool) -> dict[str, Tensor]:
    step = AutogradStep(coder, OptimSettings(), is_plain=is_plain)
    for x, y in batches:
        step.forward_backward(x, make_context(rows=len(x)), y)
    return {name: p.grad.clone() for name, p in coder.named_parameters() if p.grad is not None}


def test_micro_batches_add_up_to_one_batch(architecture: type[SparseCoder], d_out: int | None) -> None:
    x, y = draw(N, D), None if d_out is None else draw(N, d_out, seed=8)
    whole = gradients(build(architecture, d_out), [(x, y)], is_plain=False)
    parts = [(x[rows], None if y is None else y[rows]) for rows in (slice(0, 10), slice(10, 40), slice(40, N))]
    found = gradients(build(architecture, d_out), parts, is_plain=False)
    assert whole.keys() == found.keys() == dict(build(architecture).named_parameters()).keys()
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_fast_products_have_the_gradients_of_plain_ones(architecture: type[SparseCoder], d_out: int | None) -> None:
    batch = [(draw(N, D), None if d_out is None else draw(N, d_out, seed=8))]
    fast, plain = (gradients(build(architecture, d_out), batch, is_plain=is_plain) for is_plain in (False, True))
    for name, value in plain.items():
        torch.testing.assert_close(fast[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_plain_products_encode_the_same(architecture: type[SparseCoder]) -> None:
    coder, x = build(architecture), draw(N, D)
    fast = coder.encode(x).to_dense()
    with plain_products():
        torch.testing.assert_close(fast, coder.encode(x).to_dense())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_lowers_the_loss_and_obeys_the_traits(architecture: type[SparseCoder], dtype: torch.dtype) -> None:
    coder, x, ctx = build(architecture), draw(200, D) @ draw(D, D, seed=5), make_context(200, 200)
    step = AutogradStep(coder, OptimSettings(), dtype)
    losses = []
    for _ in range(60):
        stats = step.forward_backward(x, ctx)
        losses.append(float(stats.losses["recon"]))
        assert stats.fired.shape == (F,)
        step.norm_bound()
        step.optimizer_step(0.01)
        coder.after_step(stats.sums, ctx)
    assert losses[-1] < 0.6 * losses[0]
    assert all(p.dtype == torch.float32 for p in coder.parameters())
    if coder.has_unit_norm_decoder:
        torch.testing.assert_close(coder.W_dec.norm(dim=1), torch.ones(F))
