"""What is captured is what the modules put out, the pass ends after the last of them, and no hook stays behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from saetrain.activations.capture import ActivationCapture, pad_batch
from saetrain.activations.model import BaseModel, ModelSettings, load_model
from saetrain.errors import SaetrainError
from saetrain.types import TokenSequence, group_by_length

Make = Callable[..., list[TokenSequence]]


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(5, 900, (3, 20), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones_like(ids)


@torch.no_grad()
def hidden_states(model: BaseModel, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    ids, mask = batch
    return tuple(model.module(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states)


def hooks(model: BaseModel) -> int:
    """Hooks that are registered anywhere in the model, the library's own among them."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return sum(len(getattr(module, kind)) for module in model.module.modules() for kind in kinds)


@contextmanager
def counting(modules: list[nn.Module]) -> Iterator[list[int]]:
    """How often each of ``modules`` is entered."""
    counts = [0] * len(modules)

    def count(at: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            counts[at] += 1

        return hook

    handles = [module.register_forward_pre_hook(count(at)) for at, module in enumerate(modules)]
    yield counts
    for handle in handles:
        handle.remove()


def test_layers_of_bert_are_its_hidden_states(bert: BaseModel, batch: tuple[Tensor, Tensor]) -> None:
    names = [f"encoder.layer.{layer}" for layer in range(12)]
    capture = ActivationCapture(bert, names)
    found, expected = capture(*batch), hidden_states(bert, batch)
    for layer, name in enumerate(names):
        torch.testing.assert_close(found[name], expected[layer + 1], rtol=0, atol=0)
    assert capture.widths == dict.fromkeys(names, 32)


def test_last_layer_of_gpt2_is_taken_before_the_final_norm(gpt2: BaseModel, batch: tuple[Tensor, Tensor]) -> None:
    names = [f"h.{layer}" for layer in range(4)]
    found, expected = ActivationCapture(gpt2, names)(*batch), hidden_states(gpt2, batch)
    for layer in range(3):
        torch.testing.assert_close(found[names[layer]], expected[layer + 1], rtol=0, atol=0)
    assert not torch.allclose(found["h.3"], expected[4], atol=0.1)
    with torch.no_grad():
        torch.testing.assert_close(gpt2.module.ln_f(found["h.3"]), expected[4], rtol=0, atol=1e-6)


def test_nothing_after_the_last_hookpoint_runs(gpt2: BaseModel, batch: tuple[Tensor, Tensor]) -> None:
    # Not given in the order in which they run.
    capture = ActivationCapture(gpt2, ["h.2.mlp", "h.0", "h.1.attn"])
    modules = [gpt2.module.get_submodule(name) for name in ("h.0", "h.1", "h.2", "h.3", "ln_f")]
    with counting(modules) as counts:
        found = capture(*batch)
    assert counts == [1, 1, 1, 0, 0]
    assert set(found) == {"h.2.mlp", "h.0", "h.1.attn"}


def test_a_module_and_the_layer_around_it(gpt2: BaseModel, batch: tuple[Tensor, Tensor]) -> None:
    # The layer ends after its MLP, though its name comes first.
    found = ActivationCapture(gpt2, ["h.1", "h.1.mlp"])(*batch)
    torch.testing.assert_close(found["h.1"], hidden_states(gpt2, batch)[2], rtol=0, atol=0)
    assert "h.1.mlp" in found


@pytest.mark.parametrize("name", ["encoder.layer.1.attention", "encoder.layer.1.attention.self"])
def test_of_a_tuple_the_first_tensor_is_taken(bert: BaseModel, batch: tuple[Tensor, Tensor], name: str) -> None:
    outputs = []
    handle = bert.module.get_submodule(name).register_forward_hook(lambda *args: outputs.append(args[2]))
    found = ActivationCapture(bert, [name])(*batch)[name]
    handle.remove()
    assert isinstance(outputs[-1], tuple)
    assert found.shape == (3, 20, 32)
    torch.testing.assert_close(found, outputs[-1][0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        # The pooler gives one vector a sequence, the encoder an object with named parts, and a list never runs.
        ("pooler", r"output has shape \(2, 32\), but activations must have shape \(batch 2, positions 8, width\)"),
        ("encoder", "not an activation; choose another module"),
        ("encoder.layer", "does not run"),
    ],
)
def test_modules_without_an_activation_are_refused(bert: BaseModel, name: str, reason: str) -> None:
    before = hooks(bert)
    with pytest.raises(SaetrainError, match=f"--hookpoints {name}: .*{reason}"):
        ActivationCapture(bert, ["encoder.layer.0", name])
    assert hooks(bert) == before


def test_a_module_that_runs_several_times_is_refused(tmp_path: Any) -> None:
    from transformers import AlbertConfig, AlbertModel

    sizes = {"vocab_size": 99, "embedding_size": 16, "hidden_size": 16, "intermediate_size": 16}
    AlbertModel(AlbertConfig(**sizes, num_attention_heads=2, num_hidden_layers=3)).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), ModelSettings(device="cpu"))
    with pytest.raises(SaetrainError, match="runs several times"):
        ActivationCapture(model, ["encoder.albert_layer_groups.0"])


def test_no_hook_stays_behind_also_after_an_error(bert: BaseModel, batch: tuple[Tensor, Tensor]) -> None:
    before = hooks(bert)
    capture = ActivationCapture(bert, ["encoder.layer.0", "encoder.layer.5"])
    assert hooks(bert) == before
    capture(*batch)
    assert hooks(bert) == before
    with pytest.raises(IndexError):
        capture(torch.full((1, 4), 10**6), torch.ones(1, 4, dtype=torch.long))
    assert hooks(bert) == before


def test_capture_is_not_differentiated_and_keeps_the_model_s_dtype(tiny_bert: str) -> None:
    model = load_model(tiny_bert, ModelSettings(device="cpu", dtype="bfloat16"))
    capture = ActivationCapture(model, ["encoder.layer.2"])
    found = capture(torch.full((1, 4), 9), torch.ones(1, 4, dtype=torch.long))["encoder.layer.2"]
    assert (found.dtype, found.requires_grad) == (torch.bfloat16, False)


@pytest.mark.parametrize("which", ["minilm", "bert", "gpt2"])
def test_padding_changes_nothing(which: str, request: pytest.FixtureRequest, sequences: Make) -> None:
    if which == "minilm":
        model = load_model(request.getfixturevalue("minilm"), ModelSettings(device="cpu"))
    else:
        model = request.getfixturevalue(which)
    name = "h.3" if which == "gpt2" else "encoder.layer.5"
    capture = ActivationCapture(model, [name])
    rows = sequences(5, 60, 17, 60)
    together = capture(*pad_batch(rows, model.device))[name]
    for row, sequence in enumerate(rows):
        alone = capture(*pad_batch([sequence], model.device))[name][0]
        torch.testing.assert_close(together[row, : len(sequence)], alone, rtol=0, atol=1e-5)


def test_padded_batch_holds_each_sequence_and_masks_the_rest(sequences: Make) -> None:
    rows = sequences(3, 6, 4)
    ids, mask = pad_batch(rows, torch.device("cpu"))
    assert ids.shape == mask.shape == (3, 6)
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.int64)
    for row, sequence in enumerate(rows):
        assert ids[row, mask[row].bool()].tolist() == sequence.ids.tolist()
        assert mask[row].tolist() == [1] * len(sequence) + [0] * (6 - len(sequence))


@pytest.mark.parametrize("tokens", [1, 50, 64, 300])
def test_batches_are_of_like_length_and_hold_each_sequence_once(sequences: Make, tokens: int) -> None:
    lengths = np.random.default_rng(0).integers(3, 60, 40)
    rows = sequences(*lengths.tolist())
    batches = [group.tolist() for group in group_by_length([len(row) for row in rows], tokens)]
    assert sorted(number for batch in batches for number in batch) == list(range(40))
    for batch in batches:
        longest = max(len(rows[number]) for number in batch)
        assert len(batch) * longest <= tokens or len(batch) == 1
    padded = sum(len(batch) * max(len(rows[number]) for number in batch) for batch in batches)
    assert padded <= 1.25 * lengths.sum()
