"""``saetrain.load``: wrong inputs are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import saetrain
from saetrain.coders.topk import TopK
from saetrain.errors import SaetrainError
from saetrain.interop.formats import save_sae
from saetrain.interop.metadata import SaeMetadata
from saetrain.sae import SAE
from saetrain.types import Codes


@pytest.mark.parametrize(
    ("activations", "found"),
    [([1, 2], "found a list"), (torch.zeros(4), r"found \(4,\)"), (torch.zeros(2, 5), r"found \(2, 5\)")],
)
def test_encode_names_the_expected_shape(activations: torch.Tensor, found: str) -> None:
    sae = SAE(TopK(4, 8, 2, 0.0, 42), SaeMetadata(hookpoint="h.0", model="gpt2"), Path("sae"))
    with pytest.raises(SaetrainError, match=r"expected activations of shape \(…, 4\), " + found):
        sae.encode(activations)


class Skipping(TopK):
    """A coder with a skip connection: the reconstruction contains a part of the input."""

    def decode(self, codes: Codes, x_ND: torch.Tensor | None = None) -> torch.Tensor:
        assert x_ND is not None
        return super().decode(codes) + 0.5 * x_ND


def test_a_coder_with_a_skip_connection_gets_its_input() -> None:
    coder = Skipping(4, 8, 2)
    sae, x = SAE(coder, SaeMetadata(), Path("sae")), torch.randn(2, 3, 4)
    x_ND = x.view(6, 4)
    expected = coder.decode(coder.encode(x_ND), x_ND)
    torch.testing.assert_close(sae(x), expected.detach().view(2, 3, 4))
    torch.testing.assert_close(sae.decode(sae.encode(x), x), expected.detach())
    with pytest.raises(SaetrainError, match=r"decode: expected activations of shape \(…, 4\), found \(6, 5\)"):
        sae.decode(sae.encode(x), torch.zeros(6, 5))


def test_a_run_with_one_sae_loads_and_one_with_several_names_them(tmp_path: Path) -> None:
    for name, seed in (("h.0", 1), ("h.0/seed2", 2)):
        coder = TopK(4, 8, 2, 0.0, seed)
        save_sae(tmp_path / "sae" / name, coder, SaeMetadata(hookpoint="h.0", model="gpt2"))
        if seed == 1:
            loaded = saetrain.load(tmp_path)
            assert torch.equal(loaded.coder.W_dec, coder.W_dec)
            assert loaded.path == tmp_path / "sae" / "h.0"
    with pytest.raises(saetrain.SaetrainError, match=r"contains 2 SAEs; .*h\.0, h\.0/seed2"):
        saetrain.load(tmp_path)


def test_dir_shows_the_public_names() -> None:
    assert {"SAE", "load", "train"} <= set(dir(saetrain))
    assert not {"Any", "annotations", "import_module"} & set(dir(saetrain))
