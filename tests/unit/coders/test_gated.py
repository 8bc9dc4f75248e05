"""Gated SAEs are read, evaluated and saved; training them is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import saetrain
from saetrain.cli import main
from saetrain.coders.gated import Gated
from saetrain.interop.formats import load_sae, save_sae
from saetrain.interop.metadata import SaeMetadata
from tests.properties.test_coders import make_normalizer

D, F, N = 12, 60, 50


@pytest.fixture
def coder() -> Gated:
    torch.manual_seed(0)
    coder = Gated(D, F, seed=1).requires_grad_(False)
    for name in ("b_enc", "b_mag", "r_mag"):
        coder.get_parameter(name).normal_(std=0.2)
    coder.b_dec.normal_()
    return coder


def test_the_code_is_that_of_the_paper(coder: Gated) -> None:
    """π_gate = W_gate (x - b_dec) + b_gate and π_mag = (exp(r_mag) ⊙ W_gate) (x - b_dec) + b_mag."""
    x = torch.randn(N, D)
    gate = (x - coder.b_dec) @ coder.W_enc + coder.b_enc
    magnitude = (x - coder.b_dec) @ (coder.W_enc * coder.r_mag.exp()) + coder.b_mag
    expected = torch.where(gate > 0, magnitude.clamp(min=0), 0)
    found = coder.encode(x).to_dense()
    torch.testing.assert_close(found, expected)
    assert ((gate > 0) != (magnitude > 0)).any(), "else the gate changes nothing"
    torch.testing.assert_close(torch.cat([coder.encode(part).to_dense() for part in x.split(11)]), found)
    assert coder.expected_l0() is None


def test_it_folds_and_unfolds(coder: Gated) -> None:
    normalizer = make_normalizer(D, 3.0, 10)
    raw = 3 * torch.randn(N, D) + normalizer.mean
    folded = coder.folded(normalizer, normalizer)
    own = coder.encode(normalizer(raw))
    torch.testing.assert_close(folded.encode(raw).to_dense(), 3 * own.to_dense(), rtol=1e-3, atol=1e-3)
    expected = normalizer.denormalize(coder.decode(own))
    torch.testing.assert_close(folded.decode(folded.encode(raw)), expected, rtol=1e-3, atol=1e-3)
    folded.unfold_(normalizer, normalizer)
    for name, value in coder.state_dict().items():
        torch.testing.assert_close(folded.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_it_is_saved_in_our_own_format(coder: Gated, tmp_path: Path) -> None:
    metadata = SaeMetadata(model="m", hookpoint="h.0")
    assert save_sae(tmp_path, coder, metadata).keys() == {"SAELens", "sparsify"}
    found, found_metadata = load_sae(tmp_path)
    assert isinstance(found, Gated)
    assert found_metadata == metadata
    for name, value in coder.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    assert repr(saetrain.load(tmp_path)) == f"SAE(architecture=gated, d_in={D}, d_sae={F}, h.0 of m)"


@pytest.mark.parametrize("words", [["m", "text.jsonl"], ["evaluate", "folder"]])
def test_training_is_refused_by_name(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*words, "--architecture", "gated"])
    assert stop.value.code == 2
    said = "--architecture gated: saetrain reads and evaluates such SAEs, without this flag, but does not train them; "
    assert f"{said}it trains topk, batchtopk, matryoshka, jumprelu, standard, abstopk" in capsys.readouterr().err
    with pytest.raises(saetrain.SaetrainError, match="--architecture gated: saetrain reads and evaluates"):
        saetrain.train("m", "text.jsonl", architecture="gated")
