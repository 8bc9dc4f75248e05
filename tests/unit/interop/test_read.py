"""SAEs of other libraries, written by hand in their layouts, compute what their formulas say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import saetrain
from saetrain.coders import architecture_name
from saetrain.coders.matryoshka import Matryoshka
from saetrain.interop.formats import load_sae, save_sae
from saetrain.interop.metadata import SaeMetadata
from tests.unit.interop.layouts import (
    D,
    F,
    K,
    Tensors,
    compute_code,
    draw_gate,
    draw_thresholds,
    draw_weights,
    name_as_gated,
    name_as_linear,
    write_dictionary,
    write_gemma_scope,
    write_saelens,
)

Writer = Callable[[Path, Tensors], Path]
THRESHOLD = torch.tensor(0.5)


def gated_of_saelens(w: Tensors) -> Tensors:
    gate_bias = {"b_gate": w["b_enc"]}
    return {name: value for name, value in w.items() if name != "b_enc"} | gate_bias | draw_gate()


def of_topk(w: Tensors) -> Tensors:
    return {**name_as_linear(w), "k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(-1.0)}


def of_matryoshka(w: Tensors) -> Tensors:
    return {
        **w,
        "k": torch.tensor(K, dtype=torch.int32),
        "threshold": THRESHOLD,
        "group_sizes": torch.tensor([5, 5, 10]),
    }


SAELENS: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "topk": ("topk", lambda w: w),
    "abstopk": ("abstopk", lambda w: w),
    "standard": ("standard", lambda w: w),
    "jumprelu": ("jumprelu", lambda w: {**w, "threshold": draw_thresholds()}),
    "gated": ("gated", gated_of_saelens),
    "batchtopk": ("batchtopk", lambda w: {**w, "topk_threshold": THRESHOLD.double()}),
    "matryoshka_batchtopk": ("batchtopk", lambda w: {**w, "topk_threshold": THRESHOLD.double()}),
}
"""{architecture of SAELens: (formula, its tensors)}; the last two are checkpoints of a training."""
DICTIONARIES: dict[str, tuple[str, bool, Callable[[Tensors], Tensors]]] = {
    "AutoEncoder": ("standard", True, lambda w: name_as_linear(w, "bias")),
    "AutoEncoderNew": ("standard", False, lambda w: name_as_linear(w, "decoder.bias")),
    "GatedAutoEncoder": ("gated", True, name_as_gated),
    "AutoEncoderTopK": ("topk", True, of_topk),
    "BatchTopKSAE": ("batchtopk", True, lambda w: {**of_topk(w), "threshold": THRESHOLD}),
    "MatryoshkaBatchTopKSAE": ("batchtopk", True, of_matryoshka),
    "JumpReluAutoEncoder": ("jumprelu", False, lambda w: {**w, "threshold": draw_thresholds()}),
}
"""{class of dictionary_learning: (formula, whether it subtracts the bias, its tensors)}."""


def check(folder: Path, kind: str, *, subtracts: bool) -> None:
    """The SAE in ``folder`` computes the formula, also after it is saved and loaded, in our format and another one."""
    w, x = draw_weights(), torch.randn(50, D, generator=torch.Generator().manual_seed(3))
    expected = compute_code(kind, w, x, subtracts=subtracts)
    assert 0 < int((expected != 0).sum()) < expected.numel()
    sae = saetrain.load(folder)
    torch.testing.assert_close(sae.encode(x).to_dense(), expected)
    torch.testing.assert_close(sae(x), expected @ w["W_dec"] + w["b_dec"])
    save_sae(folder / "again", sae.coder, sae.metadata)
    coder, metadata = load_sae(folder / "again")
    assert (type(coder), metadata) == (type(sae.coder), sae.metadata)
    assert coder.expected_l0() == sae.coder.expected_l0()
    assert torch.equal(coder.encode(x).to_dense(), sae.encode(x).to_dense())


@pytest.mark.parametrize("architecture", SAELENS)
@pytest.mark.parametrize("subtracts", [True, False])
def test_architectures_of_saelens(architecture: str, subtracts: bool, tmp_path: Path) -> None:
    kind, name_tensors = SAELENS[architecture]
    extra = {"k": 3.4 if "batchtopk" in architecture else K, "matryoshka_widths": [5, 10, F]}
    folder = write_saelens(
        tmp_path, architecture, name_tensors(draw_weights()), apply_b_dec_to_input=subtracts, **extra
    )
    coder, metadata = load_sae(folder)
    assert architecture_name(type(coder)) == architecture.removesuffix("_batchtopk")
    assert coder.expected_l0() == (None if architecture == "gated" else K)
    assert metadata == SaeMetadata(model="gpt2", hook_name="blocks.1.hook_resid_post")
    if isinstance(coder, Matryoshka):
        assert coder.prefix_sizes == (5, 10, F)
    check(folder, kind, subtracts=subtracts)


@pytest.mark.parametrize("dict_class", DICTIONARIES)
def test_classes_of_dictionary_learning(dict_class: str, tmp_path: Path) -> None:
    kind, subtracts, name_tensors = DICTIONARIES[dict_class]
    folder = write_dictionary(tmp_path, dict_class, name_tensors(draw_weights()))
    coder, metadata = load_sae(folder)
    assert coder.expected_l0() == (K if "TopK" in dict_class else None)
    assert metadata == SaeMetadata(model="gpt2", hook_name="blocks.1.hook_resid_post", ctx_len=128)
    if isinstance(coder, Matryoshka):
        assert coder.prefix_sizes == (5, 10, F)
    check(folder, kind, subtracts=subtracts)


def test_k_may_be_in_the_configuration_alone(tmp_path: Path) -> None:
    """As earlier versions of dictionary_learning wrote it."""
    check(write_dictionary(tmp_path, "AutoEncoderTopK", name_as_linear(draw_weights()), k=K), "topk", subtracts=True)


@pytest.mark.parametrize(
    ("name", "hook_name"),
    [(None, None), ("mlp_out_layer_3", "mlp_out_layer_3"), ("resid_post_layer_12", "blocks.12.hook_resid_post")],
)
def test_only_a_named_module_is_a_hookpoint(name: str | None, hook_name: str | None, tmp_path: Path) -> None:
    write_dictionary(tmp_path, "AutoEncoder", name_as_linear(draw_weights(), "bias"), submodule_name=name, layer=3)
    assert load_sae(tmp_path)[1].hook_name == hook_name


@pytest.mark.parametrize(
    ("place", "model", "hook_name"),
    [
        ("sae", None, None),
        ("gemma-scope-2b-pt-mlp/layer_3/width_16k/average_l0_20", None, None),
        (
            "models--google--gemma-scope-9b-it-res/snapshots/0a1b/layer_20/width_16k/average_l0_71",
            "google/gemma-2-9b-it",
            "blocks.20.hook_resid_post",
        ),
    ],
)
def test_gemma_scope_has_its_metadata_in_the_path(
    place: str, model: str | None, hook_name: str | None, tmp_path: Path
) -> None:
    folder = write_gemma_scope(tmp_path / place, {**draw_weights(), "threshold": draw_thresholds()})
    coder, metadata = load_sae(folder)
    assert architecture_name(type(coder)) == "jumprelu"
    known = {"model": model, "hook_name": hook_name, "ctx_len": 1024, "prepend_bos": True}
    assert metadata == SaeMetadata(**(known if model else {}))
    check(folder, "jumprelu", subtracts=False)


def test_what_a_file_does_not_record_is_unknown(tmp_path: Path) -> None:
    write_saelens(tmp_path, "jumprelu", {**draw_weights(), "threshold": draw_thresholds()})
    sae = saetrain.load(tmp_path)
    assert sae.coder.expected_l0() is None
    assert repr(sae) == f"SAE(architecture=jumprelu, d_in={D}, d_sae={F}, None of gpt2)"
