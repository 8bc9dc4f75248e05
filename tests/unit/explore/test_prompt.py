"""The answers about a prompt, next to hooks and products that are written by hand."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import saetrain
from saetrain.errors import SaetrainError
from saetrain.explore import prompt as explore_prompt
from saetrain.explore.prompt import MAX_SHOWN_LATENTS, PromptModel, describe_model
from saetrain.explore.requests import MAX_SCALE, ChangeRequest, PromptRequest, parse_request
from saetrain.features.vocabulary import describe_tokens
from tests.unit.explore.prompt_models import F, K, build_prompt_model, open_prompt_model
from tests.unit.interop.layouts import name_as_linear, write_dictionary

TEXT = "The while statement is used for repeated execution."
CASES = {
    "causal": ("tiny_gpt2", "h.1", "transformer.h.1"),
    "masked": ("tiny_mlm", "encoder.layer.1", "bert.encoder.layer.1"),
    "none": ("tiny_bert", "encoder.layer.1", "encoder.layer.1"),
}


class Case:
    """A kind of model, its answers, and the same model and SAE for hooks by hand."""

    def __init__(self, kind: str, model: PromptModel, hookpoint: str, module: str) -> None:
        self.kind, self.answers, self.sae_name = kind, model, hookpoint
        self.head = model._context.head.module
        self.tokenizer = model._context.tokenizer
        self.module = self.head.get_submodule(module)
        self.sae = saetrain.load(model._context.loaded.saes[hookpoint].folder)

    def run_by_hand(self, ids: list[int], edit: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return the hookpoint's activations (S, D) and the output (S, V), or (S, D) without a head."""
        seen: list[Tensor] = []

        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            value = output if isinstance(output, Tensor) else output[0]
            seen.append(value[0])
            if edit is None:
                return output
            changed = edit(value[0])[None]
            return changed if isinstance(output, Tensor) else (changed, *output[1:])

        handle = self.module.register_forward_hook(hook)
        with torch.no_grad():
            output = self.head(input_ids=torch.tensor([ids]))
        handle.remove()
        return seen[0], output[0][0]

    def encode(self, text: str = TEXT, **values: Any) -> dict[str, Any]:
        return self.answers.encode_prompt(PromptRequest(text=text, sae=self.sae_name, **values))

    def change(self, latent: int, scale: float, text: str = TEXT, **values: Any) -> dict[str, Any]:
        request = ChangeRequest(text=text, sae=self.sae_name, latent=latent, scale=scale, **values)
        return self.answers.measure_change(request)


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name, hookpoint, module = CASES[request.param]
    folder = tmp_path_factory.mktemp("run")
    model = build_prompt_model(folder, request.getfixturevalue(name), [hookpoint], request.param == "causal")
    return Case(request.param, model, hookpoint, module)


def test_the_kind_of_model_is_described(case: Case) -> None:
    found = describe_model(case.answers._context)
    assert found["kind"] == case.kind
    assert found["max_tokens"] == 32
    assert found["mask_token"] == (None if case.kind == "causal" else "[MASK]")


def test_latents_are_those_of_the_encoder(case: Case) -> None:
    found = case.encode()
    ids = case.tokenizer(TEXT)["input_ids"]
    x_SD, _ = case.run_by_hand(ids)
    dense = case.sae.encode(x_SD).to_dense()
    assert len(found["tokens"]) == len(ids)
    assert "".join(found["tokens"]).strip().lower().replace("[cls]", "").replace("[sep]", "").strip() == TEXT.lower()
    assert found["counts"] == found["shown"] == (dense != 0).sum(dim=1).tolist()
    start = 0
    for position, count in enumerate(found["shown"]):
        pairs = list(zip(found["latents"][start : start + count], found["values"][start : start + count], strict=True))
        start += count
        assert {latent for latent, _ in pairs} == set(dense[position].nonzero().flatten().tolist())
        assert [abs(value) for _, value in pairs] == sorted((abs(value) for _, value in pairs), reverse=True)
        for latent, value in pairs:
            assert value == pytest.approx(float(dense[position, latent]), rel=1e-3)
    # Special tokens, and the first position of a causal model, are not used.
    excluded = {0} if case.kind == "causal" else {0, len(ids) - 1}
    assert {n for n, kept in enumerate(found["kept"]) if not kept} == excluded
    assert not found["is_cut"]


def test_next_tokens_are_predicted(case: Case) -> None:
    found = case.encode()
    if case.kind != "causal":
        assert found["predictions"] == [None] * len(found["tokens"])
        return
    _, logits = case.run_by_hand(case.tokenizer(TEXT)["input_ids"])
    for row, expected in zip(found["predictions"], logits.softmax(-1), strict=True):
        assert [share for _, share in row] == pytest.approx(expected.topk(8).values.tolist(), rel=1e-3)
    texts = describe_tokens(case.tokenizer, logits[-1].topk(8).indices.numpy())
    assert [text for text, _ in found["predictions"][-1]] == texts


def test_masked_tokens_are_predicted(case: Case) -> None:
    if case.kind != "masked":
        with pytest.raises(SaetrainError, match="token 2 can't be masked"):
            case.encode(masked=2)
        return
    typed = case.encode("The [MASK] statement is used for repeated execution.")
    asked = case.encode(masked=2)
    assert typed == asked
    assert typed["is_mask"] == [n == 2 for n in range(len(typed["tokens"]))]
    assert typed["kept"][2]
    assert [n for n, row in enumerate(typed["predictions"]) if row is not None] == [2]
    ids = case.tokenizer(TEXT)["input_ids"]
    ids[2] = case.tokenizer.mask_token_id
    _, logits = case.run_by_hand(ids)
    expected = logits[2].softmax(-1).topk(8)
    assert [share for _, share in typed["predictions"][2]] == pytest.approx(expected.values.tolist(), rel=1e-3)
    with pytest.raises(SaetrainError, match="token 0 can't be masked"):
        case.encode(masked=0)
    with pytest.raises(SaetrainError, match="token 99 can't be masked"):
        case.encode(masked=99)


@pytest.mark.parametrize("scale", [0.0, 3.0, -2.5])
@pytest.mark.parametrize("only_one", [False, True])
def test_changes_equal_those_of_a_hook_by_hand(case: Case, scale: float, only_one: bool) -> None:
    text = "The [MASK] statement is used for repeated execution." if case.kind == "masked" else TEXT
    found = case.encode(text)
    ids = case.tokenizer(text)["input_ids"]
    x_SD, before = case.run_by_hand(ids)
    dense = case.sae.encode(x_SD).to_dense()
    kept = torch.tensor(found["kept"])
    latent = int((dense[kept] != 0).sum(dim=0).argmax())
    chosen = kept.clone()
    only = int((kept & (dense[:, latent] != 0)).nonzero()[0]) if only_one else None
    if only is not None:
        chosen &= torch.arange(len(ids)) == only
    move = (scale - 1) * dense[:, latent] * chosen

    _, after = case.run_by_hand(ids, lambda x: x + move[:, None] * case.sae.W_dec[latent])
    position = {"causal": len(ids) - 1, "masked": 2, "none": None}[case.kind]
    answer = case.change(latent, scale, text, only=only, position=position)
    assert answer["fires_on"] == int((chosen & (dense[:, latent] != 0)).sum()) > 0
    assert answer["tokens"] == int(chosen.sum())
    if case.kind == "none":
        moved, size = (after - before).square().sum(dim=1), before.square().sum(dim=1)
        assert answer["relative_change"] == pytest.approx(float((moved.sum() / size.sum()).sqrt()), rel=1e-4)
        shares = (moved / size).sqrt()
        assert [each["change"] for each in answer["changes"]] == pytest.approx(
            shares.sort(descending=True).values[:10].tolist(), rel=1e-3, abs=1e-7
        )
        return
    p, q = (logits[position].double().softmax(-1) for logits in (before, after))
    assert answer["kl"] == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-3, abs=1e-9)
    changes = [each["after"] - each["before"] for each in answer["changes"]]
    expected = (q - p).abs().sort(descending=True).values[:10].tolist()
    assert [abs(change) for change in changes] == pytest.approx(expected, rel=1e-3, abs=1e-8)
    assert all(isinstance(each["token"], str) for each in answer["changes"])


def test_a_latent_that_does_not_fire_changes_nothing(case: Case) -> None:
    text = "The [MASK] statement" if case.kind == "masked" else TEXT
    fired = set(case.encode(text)["latents"])
    latent = next(number for number in range(F) if number not in fired)
    answer = case.change(latent, 0.0, text, position=2)
    assert answer["fires_on"] == 0
    assert answer.get("kl", answer.get("relative_change")) == 0


def test_long_texts_are_cut(case: Case) -> None:
    found = case.encode("while " * 500)
    assert len(found["tokens"]) == 32
    assert found["is_cut"]


def test_the_logits_bound_the_prompt(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explore_prompt, "MAX_LOGITS", 1000 * 8)
    expected = {"causal": 8, "masked": 1, "none": 32}[case.kind]
    assert describe_model(case.answers._context)["max_tokens"] == expected


def test_many_latents_per_token_are_left_out(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = case.encode()
    monkeypatch.setattr(explore_prompt, "MAX_SHOWN_LATENTS", 2)
    found = case.encode()
    assert MAX_SHOWN_LATENTS > K
    assert found["counts"] == whole["counts"]
    assert found["shown"] == [2] * len(found["tokens"])
    assert found["latents"][:2] == whole["latents"][:2]


def test_special_tokens_in_a_text_are_recognized(case: Case) -> None:
    special = case.tokenizer.eos_token or case.tokenizer.sep_token
    found = case.encode(f"one {special} two")
    at = [token.strip() for token in found["tokens"]].index(special)
    assert not found["kept"][at]
    assert found["kept"][at + 1]


@pytest.mark.parametrize("text", ["", "  ", "\0", "\ud7ff\uffff", "\u202eabc", "x" * 5000, "漢字" * 50])
def test_odd_texts_are_read(case: Case, text: str) -> None:
    if case.kind == "causal" and not text:
        with pytest.raises(SaetrainError, match="the text has no tokens"):
            case.encode(text)
        return
    assert case.encode(text)["tokens"]


def test_wrong_requests_are_named(case: Case) -> None:
    with pytest.raises(SaetrainError, match=r"there is no SAE h.9"):
        case.answers.encode_prompt(PromptRequest(text="a", sae="h.9"))
    with pytest.raises(SaetrainError, match=f"latent {F}: the SAE has latents 0 to {F - 1}"):
        case.change(F, 0.0, "a [MASK]" if case.kind == "masked" else TEXT, position=2)
    with pytest.raises(SaetrainError, match="there is no token 99"):
        case.change(0, 0.0, only=99, position=1)
    if case.kind != "none":
        with pytest.raises(SaetrainError, match="the position of the prediction is missing"):
            case.change(0, 0.0)
        with pytest.raises(SaetrainError, match="there is no token 99"):
            case.change(0, 0.0, position=99)
    if case.kind == "masked":
        with pytest.raises(SaetrainError, match="token 1 is not masked"):
            case.change(0, 0.0, position=1)


def test_no_hook_is_left(case: Case) -> None:
    before = case.encode()
    with pytest.raises(SaetrainError):
        case.change(F, 0.0, "a [MASK]" if case.kind == "masked" else TEXT, position=2)
    case.change(1, 100.0, "a [MASK] b" if case.kind == "masked" else TEXT, position=2)
    assert case.encode() == before
    assert not any(module._forward_hooks for module in case.head.modules())


def test_requests_do_not_affect_one_another(case: Case) -> None:
    text = "a [MASK] b" if case.kind == "masked" else TEXT
    position = 2
    latents = case.encode(text)["latents"][-4:]
    expected = [case.change(latent, 50.0, text, position=position) for latent in latents]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda latent: case.change(latent, 50.0, text, position=position), latents * 3))
    assert found == expected * 3


def test_long_prompts_are_cut_in_all_threads(case: Case) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: case.encode(f"{number} " + "word " * 2000), range(24)))
    assert all(each["is_cut"] for each in found)
    assert len({len(each["tokens"]) for each in found}) == 1


def test_several_saes_of_a_run_are_selected(tmp_path: Path, tiny_gpt2: str) -> None:
    model = build_prompt_model(tmp_path, tiny_gpt2, ["h.1", "h.2"], True)
    found = [model.encode_prompt(PromptRequest(text=TEXT, sae=name)) for name in ("h.1", "h.2")]
    assert found[0]["tokens"] == found[1]["tokens"]
    assert found[0]["latents"] != found[1]["latents"]


def test_norm_outliers_are_not_used(tmp_path: Path, tiny_gpt2: str) -> None:
    model = build_prompt_model(tmp_path, tiny_gpt2, ["h.1"], True, norm_limit=1e-6)
    assert not any(model.encode_prompt(PromptRequest(text=TEXT, sae="h.1"))["kept"])


def test_a_masked_model_without_a_mask_token_predicts_nothing(tmp_path: Path, tiny_mlm: str) -> None:
    model = build_prompt_model(tmp_path, tiny_mlm, ["encoder.layer.1"], False)
    context = model._context
    context.tokenizer.mask_token = None
    assert describe_model(context)["kind"] == "none"
    blind = PromptModel(context)
    found = blind.encode_prompt(PromptRequest(text=TEXT, sae="encoder.layer.1"))
    assert not any(found["predictions"])
    change = ChangeRequest(text=TEXT, sae="encoder.layer.1", latent=found["latents"][-1], scale=0.0)
    assert blind.measure_change(change)["relative_change"] >= 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Invalid JSON"),
        (b"[]", "valid dictionary or object|object"),
        (b'{"text": 3, "sae": "a"}', "text: .*string"),
        (b'{"text": "a"}', "sae: Field required"),
        (b'{"text": "a", "sae": "b", "path": "/etc/passwd"}', "path: Extra inputs"),
        (b'{"text": "a", "sae": "b", "masked": -1}', "masked: .*greater than or equal to 0"),
        (b'{"text": "a", "sae": "b", "masked": 1e30}', "masked: .*integer"),
        (b'{"text": "\\ud800", "sae": "b"}', "Invalid JSON"),
        (b"[" * 5000, "JSON"),
        (b"\xff\xfe", "Invalid JSON"),
    ],
)
def test_wrong_json_is_named(content: bytes, message: str) -> None:
    with pytest.raises(SaetrainError, match=message):
        parse_request(content, PromptRequest)


@pytest.mark.parametrize("scale", ["NaN", "Infinity", str(10 * MAX_SCALE), '"2"', "null"])
def test_scales_are_finite_numbers(scale: str) -> None:
    content = f'{{"text": "a", "sae": "b", "latent": 1, "scale": {scale}}}'
    with pytest.raises(SaetrainError, match="scale: "):
        parse_request(content.encode(), ChangeRequest)


def test_values_have_few_digits() -> None:
    assert explore_prompt.round_value(float(np.float32(1 / 3))) == 0.3333
    assert explore_prompt.round_value(123456.0) == 123500.0


def test_saes_of_other_libraries_are_explored(tmp_path: Path, tiny_gpt2: str) -> None:
    """Their names of a hookpoint lead to a module of the model."""
    tensors = {"W_enc": torch.randn(32, F), "b_enc": torch.zeros(F), "W_dec": torch.randn(F, 32)}
    write_dictionary(
        tmp_path / "sae" / "trainer_0",
        "AutoEncoder",
        name_as_linear({**tensors, "b_dec": torch.zeros(32)}, "bias"),
        lm_name=tiny_gpt2,
    )
    answers = open_prompt_model(tmp_path)
    found = answers.encode_prompt(PromptRequest(text=TEXT, sae="trainer_0"))
    latent, position = found["latents"][found["shown"][0]], 1
    request = ChangeRequest(text=TEXT, sae="trainer_0", latent=latent, scale=3.0, position=position)
    assert answers.measure_change(request)["kl"] > 0
