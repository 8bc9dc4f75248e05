"""``saetrain.splice`` equals hooks written by hand, to the bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
)

import saetrain
from saetrain.coders.topk import TopK
from saetrain.errors import SaetrainError
from saetrain.interop.metadata import SaeMetadata
from saetrain.sae import SAE
from tests.architectures.threshold import Threshold
from tests.unit.splicing.conftest import (
    BUILDERS,
    HOOKPOINTS,
    IDS,
    SIZES,
    D,
    F,
    K,
    active_latents,
    edit_by_hand,
    hand_written,
    make_sae,
    module_of,
)


@pytest.mark.parametrize("replace", [False, True])
def test_a_pass_equals_a_hand_written_hook(model: nn.Module, family: str, sae: SAE, replace: bool) -> None:
    one, two, three = active_latents(model, sae)
    with torch.no_grad():
        with hand_written(module_of(model, family), edit_by_hand(sae, {one: 0.0, two: 3.0}, replace=replace)):
            expected = model(input_ids=IDS).logits
        with saetrain.splice(model, sae, ablate=[one], scale={two: 3.0}, replace=replace) as spliced:
            found = model(input_ids=IDS).logits
        clean = model(input_ids=IDS).logits
    assert torch.equal(found, expected)
    assert not torch.equal(found, clean)
    assert len(spliced.codes) == IDS.numel()
    assert float(spliced.codes.to_dense()[:, three].sum()) > 0
    with torch.no_grad(), saetrain.splice(model, sae, ablate=one, scale={two: 3.0}, replace=replace):
        assert torch.equal(model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("gradients", [False, True])
def test_without_changes_the_model_computes_the_same_bits(model: nn.Module, sae: SAE, gradients: bool) -> None:
    with torch.no_grad():
        clean = model(input_ids=IDS).logits
        with saetrain.splice(model, sae, gradients=gradients):
            assert torch.equal(model(input_ids=IDS).logits, clean)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generate_with_a_cache_equals_a_hand_written_hook(model: nn.Module, family: str) -> None:
    sae = make_sae(HOOKPOINTS[family])
    (one, *_) = active_latents(model, sae)
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
    }
    options |= {"output_logits": True, "attention_mask": torch.ones_like(IDS)}
    for use_cache in (True, False):
        with hand_written(module_of(model, family), edit_by_hand(sae, {one: 8.0})):
            expected = model.generate(IDS, use_cache=use_cache, **options)  # type: ignore[operator]
        with saetrain.splice(model, sae, scale={one: 8.0}) as spliced:
            found = model.generate(IDS, use_cache=use_cache, **options)  # type: ignore[operator]
        assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))
        assert torch.equal(found.sequences, expected.sequences)
        assert len(spliced.codes) == (2 if use_cache else 2 * (IDS.shape[1] + 5))


@pytest.mark.parametrize("positions", [[7], slice(7, 8), [-1]])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_positions_are_counted_over_all_passes_with_a_cache(model: nn.Module, family: str, positions: Any) -> None:
    sae = make_sae(HOOKPOINTS[family])
    tokens = torch.cat([IDS, IDS[:, :2]], dim=1)
    with torch.no_grad(), saetrain.splice(model, sae, ablate=range(F), positions=positions):
        whole = model(input_ids=tokens).logits
        # The last position of the second pass is number 7.
        first = model(input_ids=tokens[:, :7], use_cache=True)
        second = model(input_ids=tokens[:, 7:], past_key_values=first.past_key_values)
    with torch.no_grad():
        clean, shorter = model(input_ids=tokens).logits, model(input_ids=tokens[:, :7]).logits
    assert torch.equal(whole[:, :-1], clean[:, :-1])
    assert not torch.equal(whole[:, -1], clean[:, -1])
    if positions == [-1]:
        # Each pass changes its own last position.
        assert torch.equal(first.logits[:, :-1], shorter[:, :-1])
        assert not torch.equal(first.logits[:, -1], shorter[:, -1])
    else:
        assert torch.equal(first.logits, shorter), "position 7 is in the second pass"
        torch.testing.assert_close(second.logits[:, -1], whole[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2"])
@pytest.mark.parametrize("n_beams", [1, 2])
def test_a_mask_of_the_prompt_changes_nothing_that_is_generated(model: nn.Module, family: str, n_beams: int) -> None:
    sae, mask = make_sae(HOOKPOINTS[family]), torch.zeros(IDS.shape, dtype=torch.bool)
    mask[0, 2] = True
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "num_beams": n_beams}
    options |= {"attention_mask": torch.ones_like(IDS), "return_dict_in_generate": True, "output_logits": True}
    with saetrain.splice(model, sae, ablate=range(F), positions=mask):
        found = model.generate(IDS, **options)  # type: ignore[operator]
    clean = model.generate(IDS, **options)  # type: ignore[operator]
    assert torch.equal(found.logits[0][n_beams:], clean.logits[0][n_beams:]), "the second prompt is not changed"
    assert not torch.equal(found.logits[0][:n_beams], clean.logits[0][:n_beams])


def test_positions_that_do_not_exist_are_refused(model: nn.Module, sae: SAE) -> None:
    for positions, message in (([-7], "position -7: the pass ends after 6"), ([100], "position 100 was not changed")):
        with pytest.raises(SaetrainError, match=message), saetrain.splice(model, sae, positions=positions):
            model(input_ids=IDS)


def test_only_the_chosen_positions_change(model: nn.Module, family: str, sae: SAE) -> None:
    outputs: list[Tensor] = []
    with torch.no_grad(), hand_written(module_of(model, family), lambda x: (outputs.append(x.clone()), x)[1]):
        mask = torch.zeros(IDS.shape, dtype=torch.bool)
        mask[0, 2] = mask[1, 4] = True
        for chosen in (mask, [2], slice(1, 3)):
            outputs.clear()
            model(input_ids=IDS)
            # This hook is registered after the splice's, so it sees the changed output.
            changed_output = hand_written(module_of(model, family), lambda x: (outputs.append(x.clone()), x)[1])
            with saetrain.splice(model, sae, ablate=range(F), positions=chosen), changed_output:
                model(input_ids=IDS)
            changed = (outputs[0] != outputs[-1]).any(dim=-1)
            wanted = mask if chosen is mask else torch.zeros_like(mask)
            if chosen is not mask:
                wanted[:, chosen] = True
            assert torch.equal(changed, wanted)


def test_several_saes_at_once(model: nn.Module, family: str) -> None:
    first, second = HOOKPOINTS[family].replace("1", "0"), HOOKPOINTS[family]
    saes = [make_sae(first), make_sae(second, seed=3)]
    with torch.no_grad(), saetrain.splice(model, saes, ablate={second: range(F)}) as spliced:
        found = model(input_ids=IDS).logits
    with torch.no_grad(), saetrain.splice(model, saes[1], ablate=range(F)):
        assert torch.equal(model(input_ids=IDS).logits, found)
    assert set(spliced) == {first, second}
    assert not torch.equal(spliced[first].codes.values, spliced[second].codes.values)
    with pytest.raises(SaetrainError, match=r"there are 2 SAEs; take spliced\[hookpoint\]"):
        _ = spliced.codes


def test_several_saes_that_do_not_work_together_are_refused(model: nn.Module, family: str) -> None:
    first, second = HOOKPOINTS[family].replace("1", "0"), HOOKPOINTS[family]
    with (
        pytest.raises(SaetrainError, match="two SAEs are at the same module"),
        saetrain.splice(model, [make_sae(first)] * 2),
    ):
        pass
    saes = [make_sae(first), make_sae(second)]
    with (
        pytest.raises(SaetrainError, match="with replace and gradients, pass one SAE"),
        saetrain.splice(model, saes, replace=True, gradients=True),
    ):
        pass


def test_no_hook_is_left_after_an_exception(model: nn.Module, sae: SAE) -> None:
    def count_hooks() -> int:
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())

    before = count_hooks()
    with pytest.raises(ZeroDivisionError), saetrain.splice(model, sae):
        _ = 1 / (before - before)
    assert count_hooks() == before


def test_a_bfloat16_model_keeps_its_dtype(family: str, sae: SAE) -> None:
    torch.manual_seed(0)
    model = BUILDERS[family]().eval().to(torch.bfloat16)
    with torch.no_grad(), saetrain.splice(model, sae, ablate=range(F)):
        assert model(input_ids=IDS).logits.dtype == torch.bfloat16


def test_gradients_reach_the_codes(model: nn.Module, sae: SAE) -> None:
    with saetrain.splice(model, sae, gradients=True) as spliced:
        model(input_ids=IDS).logits[0, -1, 3].backward()
    gradient = spliced.codes.values.grad
    assert gradient is not None
    assert gradient.shape == spliced.codes.values.shape
    assert float(gradient.abs().max()) > 0


def test_a_transcoder_replaces_the_output_of_its_module() -> None:
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**SIZES)).eval()
    coder = Threshold(D, F, K, 0, 32).requires_grad_(False)
    name = "encoder.layer.1.intermediate"
    metadata = SaeMetadata(model="m", hookpoint=name, inputs=[f"{name}:in"], outputs=[name])
    module = model.get_submodule(f"bert.{name}")
    seen: list[Tensor] = []
    with torch.no_grad(), saetrain.splice(model, SAE(coder, metadata, Path("sae")), replace=True) as spliced:
        handle = module.register_forward_hook(lambda module, args, output: seen.extend([args[0], output]))
        model(input_ids=IDS)
        handle.remove()
    expected = coder.decode(coder.encode(seen[0].flatten(0, 1)))
    assert torch.equal(seen[1].flatten(0, 1), expected)
    assert torch.equal(spliced.codes.values, coder.encode(seen[0].flatten(0, 1)).values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ablate": torch.tensor([1, F])}, f"latent {F}: the SAE has"),
        ({"ablate": [F]}, f"latent {F}: the SAE has latents 0 to {F - 1}"),
        ({"scale": {-1: 2.0}}, "latent -1: the SAE has latents 0 to"),
        ({"ablate": {"h.7": [1]}}, r"ablate names h\.7, but the SAEs are at"),
    ],
)
def test_wrong_arguments_are_named(model: nn.Module, sae: SAE, arguments: Any, message: str) -> None:
    with pytest.raises(SaetrainError, match=message), saetrain.splice(model, sae, **arguments):
        pass


def test_wrong_places_are_named(model: nn.Module, sae: SAE) -> None:
    with pytest.raises(SaetrainError, match=r"has no module h\.9"), saetrain.splice(model, make_sae("h.9")):
        pass
    no_site = SAE(sae.coder, SaeMetadata(model="m"), Path("sae"))
    with pytest.raises(SaetrainError, match="do not name one module"), saetrain.splice(model, no_site):
        pass
    at_input = SAE(sae.coder, dataclasses.replace(sae.metadata, hookpoint=f"{sae.metadata.hookpoint}:in"), Path("sae"))
    with pytest.raises(SaetrainError, match="only outputs can be replaced"), saetrain.splice(model, at_input):
        pass
    narrow = SAE(TopK(8, 16, 2), sae.metadata, Path("sae"))
    with pytest.raises(SaetrainError, match=r"have width \d+, but the SAE in sae was trained on width 8"):  # noqa: SIM117
        with torch.no_grad(), saetrain.splice(model, narrow):
            model(input_ids=IDS)
    unknown = SAE(sae.coder, SaeMetadata(hook_name="blocks.1.attn.hook_z"), Path("sae"))
    message = r"do not name one module of the model to replace \(hook_name is blocks\.1\.attn\.hook_z\)"
    with pytest.raises(SaetrainError, match=message), saetrain.splice(model, unknown):
        pass
    wrong_mask = saetrain.splice(model, sae, ablate=[0], positions=torch.ones(2, 3))
    with pytest.raises(SaetrainError, match="mask of shape"), torch.no_grad(), wrong_mask:
        model(input_ids=IDS)
    with pytest.raises(SaetrainError, match="has not run"), saetrain.splice(model, sae) as spliced:
        _ = spliced.codes


@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize(
    "names",
    [
        {"hook_name": "blocks.1.hook_resid_post"},
        {"hook_name": "blocks.2.hook_resid_pre"},
        {"hook_name": "layers.1"},
        {"hookpoint": "{module}.output", "hook_name": "blocks.9.hook_resid_post"},
        {"hookpoint": "model.{module}.output"},
    ],
)
def test_modules_have_their_names_in_other_libraries(
    model: nn.Module, family: str, sae: SAE, names: dict[str, str], with_head: bool
) -> None:
    known = {key: name.format(module=HOOKPOINTS[family]) for key, name in names.items()}
    if family == "bert" and "hookpoint" in known:
        known["hookpoint"] = known["hookpoint"].removesuffix(".output")  # BERT has a module of that name
    other = SAE(sae.coder, SaeMetadata(**known), Path("other"))
    target = model if with_head else model.base_model
    codes = []
    for each in (sae, other):
        with torch.no_grad(), saetrain.splice(target, each, scale={HOOKPOINTS[family]: {0: 2.0}}) as spliced:
            target(input_ids=IDS)
        assert list(spliced) == [HOOKPOINTS[family]]
        codes.append(spliced.codes.to_dense())
    assert torch.equal(*codes)


def test_an_sae_takes_batches_of_sequences_and_moves() -> None:
    sae = make_sae("h.1")
    x = torch.randn(2, 5, D)
    assert torch.equal(sae.encode(x).values, sae.encode(x.view(10, D)).values)
    assert sae(x).shape == x.shape
    assert torch.equal(sae(x).view(10, D), sae.decode(sae.encode(x)))
    assert sae.to("cpu") is sae
    assert sae.hookpoint == "h.1"
    assert torch.equal(sae.W_dec, sae.coder.W_dec)
