"""Saved SAEs of all three layouts as a start: exact, or refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from saetrain.coders import SparseCoder
from saetrain.coders.batchtopk import BatchTopK
from saetrain.coders.jumprelu import FIRST_TARGET, JumpReLU
from saetrain.coders.topk import TopK
from saetrain.errors import SaetrainError
from saetrain.interop.finetune import initialize_from_sae
from saetrain.interop.formats import save_sae
from saetrain.interop.metadata import SaeMetadata
from tests.unit.interop.layouts import (
    compute_code,
    draw_thresholds,
    draw_weights,
    name_as_gated,
    name_as_linear,
    write_dictionary,
    write_gemma_scope,
    write_saelens,
)

D, F, K, N = 6, 20, 3, 40
MODULES = ("wte", "h", "h.0", "h.0.attn", "h.1")


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """A trained-like SAE in SAELens' layout, its decoder at unit norm."""
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(F, D, generator=generator)
    W_dec /= W_dec.norm(dim=1, keepdim=True)
    return {
        "W_enc": torch.randn(D, F, generator=generator),
        "b_enc": torch.randn(F, generator=generator) * 0.1,
        "W_dec": W_dec,
        "b_dec": torch.randn(D, generator=generator),
    }


def saelens(folder: Path, weights: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "sae_weights.safetensors")
    cfg = {"architecture": "topk", "d_in": D, "d_sae": F, "k": K, "dtype": "float32", **config}
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return folder


def sparsify(folder: Path, weights: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    names = {"encoder.weight": weights["W_enc"].T.contiguous(), "encoder.bias": weights["b_enc"]}
    save_file({**names, "W_dec": weights["W_dec"], "b_dec": weights["b_dec"]}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"activation": "topk", "d_in": D, "num_latents": F, "k": K, **config}))
    return folder


def loaded(path: Path, hookpoint: str = "h.0", modules: tuple[str, ...] = MODULES) -> TopK:
    coder = TopK(D, F, K, seed=9)
    initialize_from_sae(coder, str(path), hookpoint, modules)
    return coder


def output(
    w: dict[str, torch.Tensor], x: torch.Tensor, *, subtract: bool = True, by_norm: bool = False
) -> torch.Tensor:
    """What such an SAE computes, by its own library's rules."""
    pre = (x - w["b_dec"] if subtract else x) @ w["W_enc"] + w["b_enc"]
    norms = w["W_dec"].norm(dim=1)
    values, indices = (pre * norms if by_norm else pre).topk(K, dim=1)
    code = torch.zeros_like(pre).scatter(1, indices, values.relu())
    return (code / norms if by_norm else code) @ w["W_dec"] + w["b_dec"]


def check(coder: TopK, expected: torch.Tensor, x: torch.Tensor) -> None:
    torch.testing.assert_close(coder.decode(coder.encode(x)), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(coder.W_dec.norm(dim=1), torch.ones(F))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(3))


def test_saelens_and_sparsify_layouts_give_the_same_sae(tmp_path: Path, x: torch.Tensor) -> None:
    weights = tensors()
    check(loaded(saelens(tmp_path / "a", weights)), output(weights, x), x)
    check(loaded(sparsify(tmp_path / "b", weights)), output(weights, x), x)


def test_our_own_directory_and_a_folder_of_hookpoints(tmp_path: Path, x: torch.Tensor) -> None:
    source = loaded(saelens(tmp_path / "a", tensors()))
    save_sae(tmp_path / "sae" / "h.0", source, SaeMetadata(model="m"))
    check(loaded(tmp_path / "sae"), source.decode(source.encode(x)), x)


def test_bf16_weights_and_encoders_that_do_not_subtract_the_bias(tmp_path: Path, x: torch.Tensor) -> None:
    weights = {name: value.bfloat16() for name, value in tensors().items()}
    single = {name: value.float() for name, value in weights.items()}
    coder = loaded(saelens(tmp_path / "a", weights, apply_b_dec_to_input=False))
    torch.testing.assert_close(coder.decode(coder.encode(x)), output(single, x, subtract=False), rtol=1e-2, atol=3e-2)


def test_one_common_norm_is_moved_into_the_encoder(tmp_path: Path, x: torch.Tensor) -> None:
    weights = tensors()
    weights["W_dec"] *= 0.37
    check(loaded(saelens(tmp_path / "a", weights)), output(weights, x), x)


def test_norms_that_take_part_in_the_ranking_are_moved_exactly(tmp_path: Path, x: torch.Tensor) -> None:
    weights = tensors()
    weights["W_dec"] *= torch.rand(F, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    folder = saelens(tmp_path / "a", weights, rescale_acts_by_decoder_norm=True)
    check(loaded(folder), output(weights, x, by_norm=True), x)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"k": 7}, "its k is 7, the run needs 3; give --k 7"),
        ({"architecture": "transcoder"}, "architecture is 'transcoder'; saetrain reads topk, batchtopk"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm'"),
    ],
)
def test_other_kinds_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(SaetrainError, match=message):
        loaded(saelens(tmp_path / "a", tensors(), **config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"activation": "groupmax"}, "activation is 'groupmax'"),
        ({"transcode": True}, "transcoder"),
        ({"skip_connection": True}, "skip connection"),
    ],
)
def test_other_kinds_of_sparsify_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(SaetrainError, match=message):
        loaded(sparsify(tmp_path / "a", tensors(), **config))


def test_uneven_norms_are_refused(tmp_path: Path) -> None:
    weights = tensors()
    weights["W_dec"][3] *= 2
    with pytest.raises(SaetrainError, match=r"norms from 1 to 2; scaling them to 1 would change which latents"):
        loaded(saelens(tmp_path / "a", weights))
    weights["W_dec"][3] = 0
    with pytest.raises(SaetrainError, match="1 of its decoder rows are zero"):
        loaded(saelens(tmp_path / "a", weights))


def test_another_size_is_refused(tmp_path: Path) -> None:
    weights = tensors()
    folder = saelens(tmp_path / "a", weights)
    for coder, message in ((TopK(D, F + 1, K), f"give --num_latents {F}"), (TopK(D + 1, F, K), "another model")):
        with pytest.raises(SaetrainError, match=message):
            initialize_from_sae(coder, str(folder), "h.0", MODULES)


@pytest.mark.parametrize("named", ["h.0", "transformer.h.0", "transformer.h.0.output", "h.0.output"])
def test_hookpoints_as_other_libraries_spell_them(tmp_path: Path, x: torch.Tensor, named: str) -> None:
    folder = saelens(tmp_path / "a", tensors(), metadata={"hf_hook_name": named})
    check(loaded(folder), output(tensors(), x), x)
    with pytest.raises(SaetrainError, match=f"it is an SAE of {named}, the run trains h.1"):
        loaded(folder, "h.1")


def test_a_module_that_is_named_output_is_not_its_parent(tmp_path: Path) -> None:
    """As in BERT, whose layers have a part of that name."""
    folder = saelens(tmp_path / "a", tensors(), metadata={"hf_hook_name": "h.0.output"})
    with pytest.raises(SaetrainError, match=r"it is an SAE of h\.0\.output, the run trains h\.0"):
        loaded(folder, modules=(*MODULES, "h.0.output"))


def test_an_sae_of_another_model_is_named(tmp_path: Path) -> None:
    save_sae(tmp_path, TopK(D, F, K), SaeMetadata(hookpoint="h.0", model_weights_sha256="a" * 64))
    coder = TopK(D, F, K)
    assert initialize_from_sae(coder, str(tmp_path), "h.0", MODULES, "a" * 64) is None
    warning = initialize_from_sae(coder, str(tmp_path), "h.0", MODULES, "b" * 64)
    assert warning is not None
    assert "trained on a model with other weights (SHA-256 aaaaaaaaaaaa…)" in warning


class Variant(TopK):
    """Another architecture with the same tensors."""


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    save_sae(tmp_path, TopK(D, F, K), SaeMetadata(hookpoint="h.0"))
    with pytest.raises(SaetrainError, match=r"its architecture is topk, the run needs tests\.unit\..*:Variant"):
        initialize_from_sae(Variant(D, F, K), str(tmp_path), "h.0", MODULES)
    save_sae(tmp_path, Variant(D, F, K, seed=5), SaeMetadata(hookpoint="h.0"))
    coder = Variant(D, F, K)
    initialize_from_sae(coder, str(tmp_path), "h.0", MODULES)
    torch.testing.assert_close(coder.W_enc, Variant(D, F, K, seed=5).W_enc)


def test_norms_that_differ_by_the_rounding_of_bf16_are_accepted_in_any_dtype(tmp_path: Path, x: torch.Tensor) -> None:
    weights = tensors()
    weights["W_dec"] = weights["W_dec"].bfloat16().float()
    spread = weights["W_dec"].norm(dim=1)
    assert float(spread.max() - spread.min()) > 1e-3
    coder = loaded(saelens(tmp_path / "a", weights))
    torch.testing.assert_close(coder.decode(coder.encode(x)), output(weights, x), rtol=1e-2, atol=3e-2)
    weights["W_dec"] *= 1.1  # no longer a bf16 number, with the same spread
    with pytest.raises(SaetrainError, match="would change which latents"):
        loaded(saelens(tmp_path / "b", weights))


def test_broken_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SaetrainError, match="contains no SAE"):
        loaded(tmp_path)
    folder = saelens(tmp_path / "a", tensors())
    file = folder / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(SaetrainError, match="damaged or truncated"):
        loaded(folder)
    file.unlink()
    with pytest.raises(
        SaetrainError, match=r"contains cfg\.json, but none of saetrain\.safetensors, sae_weights\.safetensors, sae\."
    ):
        loaded(folder)
    save_file({"W_enc": torch.zeros(D, F)}, file)
    with pytest.raises(
        SaetrainError, match=r"--finetune .*sae_weights\.safetensors: W_dec must have shape \(F, D\), found nothing"
    ):
        loaded(folder)


@pytest.mark.parametrize("d_out", [D, 4])
def test_a_transcoder_does_not_fit_an_sae_and_the_reverse(tmp_path: Path, d_out: int) -> None:
    sae, transcoder = TopK(D, F, K), TopK(D, F, K, d_out=d_out)
    for saved, coder, found in ((sae, transcoder, "an SAE"), (transcoder, sae, "a coder of two different")):
        save_sae(tmp_path, saved, SaeMetadata(hookpoint="h.0"))
        with pytest.raises(SaetrainError, match=f": it is {found}.*, but the run trains ") as caught:
            initialize_from_sae(coder, str(tmp_path), "h.0", MODULES)
        assert "--is_sae" not in str(caught.value)


def start_from(coder: SparseCoder, folder: Path, x: torch.Tensor) -> torch.Tensor:
    """Initialize ``coder`` from the SAE in ``folder``, and return its code of ``x``."""
    initialize_from_sae(coder, str(folder), "h.0", MODULES)
    return coder.encode(x).to_dense()


def test_saes_of_dictionary_learning_and_gemma_scope_are_a_start(tmp_path: Path, x: torch.Tensor) -> None:
    weights, settings = draw_weights(), JumpReLU.Settings(k=5, num_latents=F)
    named = {**name_as_linear(weights), "k": torch.tensor(K), "threshold": torch.tensor(0.5)}
    folder = write_dictionary(tmp_path / "run" / "h.0", "BatchTopKSAE", named)
    expected = compute_code("batchtopk", weights, x)
    torch.testing.assert_close(start_from(BatchTopK(D, F, K), folder.parent, x), expected)
    gemma = write_gemma_scope(tmp_path / "gemma", {**weights, "threshold": draw_thresholds()})
    expected = compute_code("jumprelu", weights, x, subtracts=False)
    torch.testing.assert_close(start_from(JumpReLU.build(settings, D), gemma, x), expected)


def test_norms_of_latents_that_do_not_compete_are_moved_exactly(tmp_path: Path, x: torch.Tensor) -> None:
    weights = draw_weights()
    norms = torch.rand(F, generator=torch.Generator().manual_seed(1)) + 0.5
    scaled = {**weights, "W_dec": weights["W_dec"] * norms[:, None], "threshold": draw_thresholds()}
    coder = JumpReLU.build(JumpReLU.Settings(k=5, num_latents=F), D)
    code = start_from(coder, write_saelens(tmp_path, "jumprelu", scaled), x)
    torch.testing.assert_close(code, compute_code("jumprelu", weights, x) * norms)
    torch.testing.assert_close(coder.decode(coder.encode(x)), (code / norms) @ scaled["W_dec"] + weights["b_dec"])
    torch.testing.assert_close(coder.W_dec.norm(dim=1), torch.ones(F))


def test_buffers_of_the_training_come_from_our_own_files_alone(tmp_path: Path, x: torch.Tensor) -> None:
    source = JumpReLU.build(JumpReLU.Settings(k=5, num_latents=F), D, seed=3)
    source.l0_target.fill_(0.7)
    save_sae(tmp_path / "own", source, SaeMetadata())
    for folder, target in (("own", 0.7), ("saelens", FIRST_TARGET)):
        if folder == "saelens":
            write_saelens(tmp_path / folder, "jumprelu", {**draw_weights(), "threshold": draw_thresholds()})
        # The L0 that training is to reach may change.
        coder = JumpReLU.build(JumpReLU.Settings(k=6, num_latents=F), D)
        start_from(coder, tmp_path / folder, x)
        assert (float(coder.l0_target), coder.k) == (pytest.approx(target), 6)


def test_gated_saes_are_no_start(tmp_path: Path) -> None:
    write_dictionary(tmp_path, "GatedAutoEncoder", name_as_gated(draw_weights()))
    message = r"--finetune .*: its architecture is gated, the run needs topk; saetrain can't train it"
    with pytest.raises(SaetrainError, match=message):
        loaded(tmp_path)


def test_the_folder_of_a_run_is_a_start(tmp_path: Path, x: torch.Tensor) -> None:
    source = loaded(saelens(tmp_path / "a", tensors()))
    save_sae(tmp_path / "run" / "sae" / "h.0", source, SaeMetadata(hookpoint="h.0"))
    check(loaded(tmp_path / "run"), source.decode(source.encode(x)), x)
