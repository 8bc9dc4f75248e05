"""SAEs that the real dictionary_learning trained and saved: `make test-interop`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from saetrain.coders import architecture_name
from saetrain.errors import SaetrainError
from saetrain.interop.formats import load_sae
from tests.interop.outputs import compare_outputs

pytestmark = pytest.mark.interop

D, F, K, STEPS = 384, 512, 8, 12
TOPK = {"k": K, "warmup_steps": 2, "threshold_start_step": 2, "threshold_beta": 0.5}
TRAINERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "standard.StandardTrainer": ("AutoEncoder", {"warmup_steps": 2, "sparsity_warmup_steps": 4}, "standard"),
    "standard.StandardTrainerAprilUpdate": ("AutoEncoder", {"warmup_steps": 2, "sparsity_warmup_steps": 4}, "standard"),
    "gdm.GatedSAETrainer": ("GatedAutoEncoder", {"warmup_steps": 2, "sparsity_warmup_steps": 4}, "gated"),
    "top_k.TopKTrainer": ("AutoEncoderTopK", TOPK, "topk"),
    "batch_top_k.BatchTopKTrainer": ("BatchTopKSAE", TOPK, "batchtopk"),
    "matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer": (
        "MatryoshkaBatchTopKSAE",
        {**TOPK, "group_fractions": [0.25, 0.25, 0.5]},
        "matryoshka",
    ),
    "jumprelu.JumpReluTrainer": (
        "JumpReluAutoEncoder",
        {"warmup_steps": 2, "sparsity_warmup_steps": 4, "target_l0": 16, "bandwidth": 0.5},
        "jumprelu",
    ),
}
"""{trainer: class of its SAE, settings, our architecture}."""


@pytest.fixture(scope="module", autouse=True)
def without_nnsight() -> Iterator[None]:
    """dictionary_learning imports nnsight to capture activations, which these tests compute themselves."""
    stand_in = ModuleType("nnsight")
    stand_in.LanguageModel = object  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "nnsight", stand_in)
        yield


def train(trainer: str, x_ND: Tensor, folder: Path, *, normalize: bool = False, **settings: Any) -> Path:
    """Train with ``trainSAE``, and return the folder that it wrote."""
    from importlib import import_module

    from dictionary_learning.training import trainSAE

    module, name = trainer.split(".")
    _, own, _ = TRAINERS[trainer]
    config = {
        "trainer": getattr(import_module(f"dictionary_learning.trainers.{module}"), name),
        "activation_dim": D,
        "dict_size": F,
        "lr": 2e-3,
        "steps": STEPS,
        "layer": 3,
        "lm_name": "m",
        "submodule_name": "resid_post_layer_3",
        "device": "cpu",
        "seed": 0,
        **own,
        **settings,
    }
    batches = [batch.clone() for batch in x_ND[: 200 * STEPS].split(200)]
    torch.manual_seed(0)
    trainSAE(batches, [config], STEPS, save_dir=str(folder), normalize_activations=normalize, device="cpu")
    return folder / "trainer_0"


def load_theirs(folder: Path, dict_class: str) -> Any:
    """Return the SAE as the real library reads it."""
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    places = (dictionary, top_k, batch_top_k, matryoshka_batch_top_k)
    found = next(getattr(place, dict_class) for place in places if hasattr(place, dict_class))
    # By default it scales the codes of AutoEncoder by the norms of the decoder.
    return found.from_pretrained(
        folder / "ae.pt", **({"normalize_decoder": False} if found.__name__ == "AutoEncoder" else {})
    )


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("normalize", [False, True])
def test_saetrain_reads_what_dictionary_learning_writes(
    trainer: str, normalize: bool, tmp_path: Path, activations: Tensor
) -> None:
    dict_class, _, architecture = TRAINERS[trainer]
    folder = train(trainer, activations, tmp_path, normalize=normalize)
    coder, metadata = load_sae(folder)
    assert json.loads((folder / "config.json").read_text())["trainer"]["dict_class"] == dict_class
    assert architecture_name(type(coder)) == architecture
    assert (metadata.model, metadata.hook_name) == ("m", "blocks.3.hook_resid_post")
    assert coder.expected_l0() in (K, None)
    with torch.no_grad():
        theirs = load_theirs(folder, dict_class)
        assert float(coder.b_dec.abs().max()) > 0.01, "else it makes no difference whether it is subtracted"
        compare_outputs(coder, theirs.encode(activations), theirs(activations), activations).check()


def test_autoencoders_without_a_bias_of_the_input(tmp_path: Path, activations: Tensor) -> None:
    """No trainer of 0.1.0 makes them, but its loader reads them."""
    from dictionary_learning.dictionary import AutoEncoderNew

    torch.manual_seed(0)
    theirs = AutoEncoderNew(D, F).requires_grad_(False)
    theirs.encoder.bias.normal_(std=0.1)
    theirs.decoder.bias.normal_(std=0.1)
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoderNew"}}))
    coder, _ = load_sae(tmp_path)
    compare_outputs(coder, theirs.encode(activations), theirs(activations), activations).check()


def test_a_threshold_that_is_not_set_is_refused(tmp_path: Path, activations: Tensor) -> None:
    """Else the SAE would be a ReLU with many times k active latents, as in the real library."""
    folder = train("batch_top_k.BatchTopKTrainer", activations, tmp_path, threshold_start_step=STEPS)
    with torch.no_grad():
        assert (load_theirs(folder, "BatchTopKSAE").encode(activations) != 0).sum(dim=1).float().mean() > 5 * K
    with pytest.raises(SaetrainError, match=r"ae\.pt: its threshold is not set \(-1\), so all positive latents would"):
        load_sae(folder)


def test_the_groups_are_read(tmp_path: Path, activations: Tensor) -> None:
    folder = train("matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer", activations, tmp_path)
    assert load_sae(folder)[0].prefix_sizes == (F // 4, F // 2, F)
