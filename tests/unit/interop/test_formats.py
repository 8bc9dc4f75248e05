"""Every coder is saved in our own format, and in those of other libraries that can hold it."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

import saetrain
from saetrain.coders import CODERS
from saetrain.coders.base import CoderSettings, SparseCoder
from saetrain.coders.topk import TopK
from saetrain.errors import SaetrainError
from saetrain.interop import saelens
from saetrain.interop.formats import (
    WRITTEN_FORMATS,
    find_sae_folders,
    group_saes,
    load_sae,
    save_sae,
    select_sae_files,
)
from saetrain.interop.metadata import SaeMetadata
from saetrain.types import Codes

D, F, K = 6, 20, 3
METADATA = SaeMetadata(model="m", hookpoint="h.0", hook_name="blocks.0.hook_resid_post", ctx_len=8, prepend_bos=True)


@dataclass(frozen=True, kw_only=True)
class ThresholdSettings(CoderSettings):
    groups: tuple[int, ...] = ()
    rate: float = 1.0


class Threshold(SparseCoder):
    """A transcoder with a skip connection, buffers of two dtypes, and settings of two types."""

    Settings = ThresholdSettings
    saved_settings = ("groups", "rate")

    def __init__(
        self, d_in: int, d_out: int, num_latents: int, groups: tuple[int, ...], rate: float, seed: int
    ) -> None:
        super().__init__(d_in, num_latents, seed, d_out)
        generator = torch.Generator().manual_seed(seed)
        self.W_dec = nn.Parameter(torch.randn(num_latents, d_out, generator=generator))
        self.b_dec = nn.Parameter(torch.randn(d_out, generator=generator))
        self.W_skip = nn.Parameter(torch.randn(d_out, d_in, generator=generator))
        self.register_buffer("threshold", torch.rand(num_latents, generator=generator))
        self.register_buffer("steps", torch.tensor(seed, dtype=torch.int64))
        self.groups, self.rate = groups, rate

    @classmethod
    def build(cls, settings: ThresholdSettings, d_in: int, d_out: int, *, seed: int = 0) -> Threshold:
        return cls(d_in, d_out, settings.resolve_num_latents(d_in), settings.groups, settings.rate, seed)

    def encode(self, x_ND: Tensor) -> Codes:
        pre = x_ND @ self.W_enc + self.b_enc
        return Codes(torch.where(pre > self.threshold, pre, 0), None, self.num_latents)


def threshold() -> Threshold:
    return Threshold(D, 4, F, (5, 15), 0.5, seed=7)


def test_the_files_of_topk_keep_their_bytes(tmp_path: Path) -> None:
    """As version 0.1.0 wrote them: keys and order of ``cfg.json``, and both files of weights."""
    coder = TopK(D, F, K, seed=1)
    assert save_sae(tmp_path, coder, METADATA) == {}
    names = {"W_enc", "b_enc", "W_dec", "b_dec"}
    own = {name: getattr(coder, name).detach().contiguous() for name in names}
    assert (tmp_path / "sae_weights.safetensors").read_bytes() == save(own)
    renamed = {"encoder.weight": own["W_enc"].T.contiguous(), "encoder.bias": own["b_enc"]}
    expected = save({**renamed, "W_dec": own["W_dec"], "b_dec": own["b_dec"]})
    assert (tmp_path / "sae.safetensors").read_bytes() == expected
    text = (tmp_path / "cfg.json").read_text()
    config = json.loads(text)
    assert text == json.dumps(config, indent=2) + "\n"
    entry = config.pop("saetrain")
    assert list(config.items()) == [
        ("activation", "topk"),
        ("d_in", D),
        ("num_latents", F),
        ("expansion_factor", 3),
        ("k", K),
        ("normalize_decoder", True),
        ("multi_topk", False),
        ("skip_connection", False),
        ("transcode", False),
        ("architecture", "topk"),
        ("d_sae", F),
        ("dtype", "float32"),
        ("device", "cpu"),
        ("apply_b_dec_to_input", True),
        ("normalize_activations", "none"),
        ("reshape_activations", "none"),
        ("rescale_acts_by_decoder_norm", False),
        (
            "metadata",
            {
                "sae_lens_version": "6.54.12",
                "model_name": "m",
                "hook_name": "blocks.0.hook_resid_post",
                "hf_hook_name": "h.0",
                "dataset_path": None,
                "context_size": 8,
                "prepend_bos": True,
                "exclude_special_tokens": True,
            },
        ),
    ]
    assert list(entry)[:3] == ["format", "model", "model_revision"]
    assert "coder" not in entry


def test_weights_of_sparsify_may_be_omitted(tmp_path: Path) -> None:
    save_sae(tmp_path / "both", TopK(D, F, K), METADATA)
    for folder in ("both", "one"):  # a second save removes the file of the first
        save_sae(tmp_path / folder, TopK(D, F, K), METADATA, skip_files=["sae.safetensors"])
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == ["cfg.json", "sae_weights.safetensors"]
        assert "num_latents" in json.loads((tmp_path / folder / "cfg.json").read_text())


def test_our_own_format_holds_any_coder(tmp_path: Path) -> None:
    save_sae(tmp_path, TopK(D, F, K), METADATA)
    coder = threshold()
    skipped = save_sae(tmp_path, coder, METADATA)
    reasons = {"SAELens": "topk, batchtopk, matryoshka, jumprelu, standard, abstopk", "sparsify": "topk"}
    assert skipped == {name: f"saetrain writes only {held} in this format" for name, held in reasons.items()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cfg.json", "saetrain.safetensors"]
    name = f"{__name__}:Threshold"
    assert json.loads((tmp_path / "cfg.json").read_text())["saetrain"]["coder"] == {
        "architecture": name, "d_in": D, "d_out": 4, "d_sae": F, "groups": [5, 15], "rate": 0.5,
    }  # fmt: skip
    found, metadata = load_sae(tmp_path)
    assert metadata == METADATA
    assert isinstance(found, Threshold)
    assert (found.groups, found.rate) == ((5, 15), 0.5)
    assert not any(parameter.requires_grad for parameter in found.parameters())
    assert found.state_dict().keys() == coder.state_dict().keys() == load_file(tmp_path / "saetrain.safetensors").keys()
    for key, value in coder.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key
        assert found.state_dict()[key].dtype == value.dtype
    sae = saetrain.load(tmp_path)
    x = torch.randn(9, D)
    assert torch.equal(sae.decode(sae.encode(x)), coder.decode(coder.encode(x)))
    assert repr(sae) == f"SAE(architecture={name}, d_in=6, d_out=4, d_sae=20, groups=(5, 15), rate=0.5, h.0 of m)"


def test_a_file_does_not_choose_what_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trap.py").write_text("class Coder: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    save_sae(tmp_path / "sae", threshold(), METADATA)
    assert isinstance(load_sae(tmp_path / "sae")[0], Threshold), "its module is already imported"
    path = tmp_path / "sae" / "cfg.json"
    config = json.loads(path.read_text())
    config["saetrain"]["coder"]["architecture"] = "trap:Coder"
    path.write_text(json.dumps(config))
    with pytest.raises(SaetrainError, match="architecture trap:Coder: your own code is not imported because a file"):
        load_sae(tmp_path / "sae")
    assert "trap" not in sys.modules


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda coder: coder.register_buffer("threshold", torch.zeros(F)), "it has no tensor threshold"),
        (
            lambda coder: setattr(coder, "W_dec", nn.Parameter(torch.zeros(F, 4))),
            "it has one width, but the coder maps width 6 to 4",
        ),
        (lambda coder: setattr(coder, "is_sae", False), "the coder reconstructs other activations than it reads"),
    ],
)
def test_the_reason_is_given(change: Any, reason: str) -> None:
    coder = TopK(D, F, K)
    assert [each.unsupported(coder) for each in WRITTEN_FORMATS] == [None, None, None]
    change(coder)
    assert [each.unsupported(coder) for each in WRITTEN_FORMATS] == [None, reason, reason]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ({"d_out": 5}, r"W_dec has shape \(20, 4\), but .* gives \(20, 5\)"),
        ({"d_out": 2**31 - 1, "d_sae": 2**31 - 1}, r"W_dec has shape \(20, 4\), but .* gives"),
        ({"d_in": 2**31 - 1}, r"its tensors are not those of Threshold: size mismatch for .*2147483647"),
        ({"is_sae": "false"}, "is_sae: found 'false', must be true or false"),
        ({"d_out": 0}, "d_out: found 0, must be at least 1"),
        ({"groups": 3}, "groups: found 3, must be a list of"),
        ({"rate": None}, "has no key 'rate'"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, spoil: dict[str, Any], said: str) -> None:
    save_sae(tmp_path, threshold(), METADATA)
    path = tmp_path / "cfg.json"
    config = json.loads(path.read_text())
    config["saetrain"]["coder"].update(spoil)
    path.write_text(json.dumps(config))
    with pytest.raises(SaetrainError, match=said):
        load_sae(tmp_path)


def test_saes_of_other_libraries_encode_activations_but_no_texts(tmp_path: Path) -> None:
    coder = TopK(D, F, K, seed=1)
    save_sae(tmp_path, coder, METADATA)
    path = tmp_path / "cfg.json"
    config = json.loads(path.read_text())
    del config["saetrain"]
    path.write_text(json.dumps(config))
    sae, x = saetrain.load(tmp_path), torch.randn(9, D)
    assert torch.equal(sae.encode(x).to_dense(), coder.encode(x).to_dense())
    assert (sae.metadata.model, sae.metadata.hookpoint) == ("m", "h.0")
    with pytest.raises(SaetrainError, match=r"encode_text: the metadata of the SAE in .* do not describe"):
        sae.encode_text("text")


OWN_TENSORS = {
    "batchtopk": {"threshold": ()},
    "matryoshka": {"threshold": ()},
    "jumprelu": {"l0_target": ()},
    "standard": {"l1_coefficient": ()},
}
"""{architecture: shapes of the tensors that SAELens' file can't hold}."""


def build(architecture: str) -> SparseCoder:
    coder = CODERS[architecture].build(CODERS[architecture].Settings(k=K, num_latents=F), D, seed=2)
    if "threshold" in coder.state_dict():
        coder.state_dict()["threshold"].fill_(0.25)
    return coder.requires_grad_(False)


@pytest.mark.parametrize("architecture", CODERS)
def test_one_folder_serves_saetrain_and_saelens(architecture: str, tmp_path: Path) -> None:
    save_sae(tmp_path, threshold(), METADATA)  # the files of another SAE disappear
    coder, own = build(architecture), OWN_TENSORS.get(architecture, {})
    skipped = save_sae(tmp_path, coder, METADATA)
    assert skipped == ({} if architecture == "topk" else {"sparsify": "saetrain writes only topk in this format"})
    files = {"cfg.json", "sae_weights.safetensors"}
    files |= ({"saetrain.safetensors"} if own else set()) | ({"sae.safetensors"} if architecture == "topk" else set())
    assert {path.name for path in tmp_path.iterdir()} == files
    shared = load_file(tmp_path / "sae_weights.safetensors")
    expected = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    config = json.loads((tmp_path / "cfg.json").read_text())
    if "threshold" in coder.state_dict():
        expected["threshold"] = (F,)
        assert torch.equal(shared["threshold"], coder.state_dict()["threshold"].expand(F))
        assert config["architecture"] == "jumprelu"
        trained_as = {"batchtopk": "batchtopk", "matryoshka": "matryoshka_batchtopk"}.get(architecture)
        assert config["metadata"].get("training_architecture") == trained_as
    assert {name: value.shape for name, value in shared.items()} == expected
    if own:
        found = load_file(tmp_path / "saetrain.safetensors")
        assert {name: value.shape for name, value in found.items()} == own
    (ours, metadata), theirs = load_sae(tmp_path), saelens.read_sae(tmp_path)
    assert type(ours) is type(coder)
    assert metadata == METADATA
    for name, value in coder.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    assert theirs is not None
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(0))
    assert torch.equal(theirs[0].encode(x).to_dense(), coder.encode(x).to_dense())


def test_folders_of_earlier_versions_are_read(tmp_path: Path) -> None:
    """They had all tensors in SAELens' file, which only saetrain could read, and none of SAELens' keys."""
    coder = build("batchtopk")
    save_sae(tmp_path, coder, METADATA)
    (tmp_path / "saetrain.safetensors").unlink()
    (tmp_path / "sae_weights.safetensors").write_bytes(
        save({name: value.contiguous() for name, value in coder.state_dict().items()})
    )
    entry = json.loads((tmp_path / "cfg.json").read_text())["saetrain"]
    coder_entry = {"architecture": "batchtopk", "d_in": D, "d_sae": F, "k": K}
    (tmp_path / "cfg.json").write_text(json.dumps({"saetrain": {**entry, "coder": coder_entry}}))
    found, _ = load_sae(tmp_path)
    assert all(torch.equal(value, coder.state_dict()[name]) for name, value in found.state_dict().items())


def test_a_missing_file_of_our_own_is_named(tmp_path: Path) -> None:
    save_sae(tmp_path, build("batchtopk"), METADATA)
    (tmp_path / "saetrain.safetensors").unlink()
    with pytest.raises(
        SaetrainError, match=r"sae_weights\.safetensors: its tensors are not those of BatchTopK: size m"
    ):
        load_sae(tmp_path)
    save_sae(tmp_path, build("batchtopk"), METADATA)
    (tmp_path / "sae_weights.safetensors").unlink()
    with pytest.raises(SaetrainError, match=r"sae_weights\.safetensors: is missing"):
        load_sae(tmp_path)
    save_sae(tmp_path, threshold(), METADATA)
    (tmp_path / "saetrain.safetensors").unlink()
    with pytest.raises(SaetrainError, match=r"sae_weights\.safetensors: is missing"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["cfg.json", "seed2/cfg.json"], {".": "."}),
        (["sae/h.1/cfg.json", "sae/h.1/seed2/cfg.json"], {"h.1": "sae/h.1", "h.1/seed2": "sae/h.1/seed2"}),
        # The SAEs of a run are those in one folder of it.
        (["sae/h.1/cfg.json", "features/cfg.json"], {"h.1": "sae/h.1"}),
        (["layers.1/cfg.json", "x.npz", "config.json"], {"layers.1": "layers.1"}),
        (["b/trainer_1/ae.pt", "b/trainer_0/ae.pt", "b/trainer_0/checkpoints/ae_5.pt"],
         {"b/trainer_0": "b/trainer_0", "b/trainer_1": "b/trainer_1"}),
        (["layer_1/width_16k/average_l0_7/params.npz", "README.md"],
         {"layer_1/width_16k/average_l0_7": "layer_1/width_16k/average_l0_7"}),
        (["config.json", "model.safetensors"], {}),
    ],
)  # fmt: skip
def test_saes_are_found_in_a_list_of_files(files: list[str], found: dict[str, str], tmp_path: Path) -> None:
    assert group_saes(files) == found
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert find_sae_folders(tmp_path) == {name: tmp_path / place for name, place in found.items()}


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        ("cfg.json saetrain.safetensors sae_weights.safetensors sae.safetensors README.md",
         "cfg.json saetrain.safetensors sae_weights.safetensors"),
        ("cfg.json saetrain.safetensors", "cfg.json saetrain.safetensors"),
        ("cfg.json sae.safetensors", "cfg.json sae.safetensors"),
        ("cfg.json README.md", "cfg.json"),
        ("config.json ae.pt eval.json", "ae.pt config.json"),
        ("ae.pt", "ae.pt"),
        ("params.npz cfg", "params.npz"),
    ],
)  # fmt: skip
def test_the_files_of_one_format_are_selected(names: str, wanted: str) -> None:
    assert select_sae_files(names.split()) == tuple(wanted.split())


def test_a_folder_without_an_sae_is_described(tmp_path: Path) -> None:
    with pytest.raises(SaetrainError, match=r"contains no SAE \(no cfg\.json, ae\.pt or params\.npz\)$"):
        load_sae(tmp_path)
    save_sae(tmp_path / "h.0", TopK(D, F, K), METADATA)
    with pytest.raises(SaetrainError, match=r"params\.npz\); SAEs were found in .*h\.0$"):
        load_sae(tmp_path)
