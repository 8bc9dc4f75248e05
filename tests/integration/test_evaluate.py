"""``saetrain evaluate`` and the assessment at a run's end, on real models, real text and real files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file

from saetrain.cli import main
from saetrain.coders.topk import TopK
from saetrain.interop.formats import load_sae
from saetrain.types import Codes
from tests.conftest import python_topics

ROOT = Path(__file__).parents[2]
SIZES = "--k 8 --num_latents 96 --batch_size 4 --ctx_len 32 --max_tokens 6400 --eval_tokens 1500 --lr 4e-3"
QUICK = "--eval_tokens 800 --loss_tokens 300 --fit_tokens 1000 --bootstrap 20"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The text that SAEs are trained on: all but the last 30 of the chapters."""
    return write_texts(tmp_path_factory.mktemp("own") / "own.jsonl", python_topics()[:-30])


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Chapters that no SAE was trained on."""
    return write_texts(tmp_path_factory.mktemp("other") / "other.jsonl", python_topics()[-30:])


def write_texts(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture(scope="module")
def causal_run(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: str, own: str) -> Path:
    out = tmp_path_factory.mktemp("causal")
    words = f"{tiny_gpt2} {own} --layers 1 2 {SIZES} --loss_tokens 300 --fit_tokens 1000 --bootstrap 20"
    main([*words.split(), "--save_dir", str(out), "--run_name", "run"])
    return out / "run"


@pytest.fixture(scope="module")
def encoder_run(tmp_path_factory: pytest.TempPathFactory, tiny_bert: str, own: str) -> Path:
    out = tmp_path_factory.mktemp("encoder")
    words = f"{tiny_bert} {own} --layers 3 {SIZES} --assess false"
    main([*words.split(), "--save_dir", str(out), "--run_name", "run"])
    return out / "run"


def evaluate(path: Path, out: Path, *words: str) -> dict[str, dict[str, Any]]:
    """{file stem: contents} of what the command writes."""
    main(["evaluate", str(path), "--out", str(out), *QUICK.split(), *words])
    files = [*(out / "evaluation").glob("*.json"), out / "final_assessment.json"]
    return {file.stem: json.loads(file.read_text()) for file in files}


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the command says as it ends with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", *words])
    said = capsys.readouterr().err
    assert caught.value.code == 2, said
    assert "Traceback" not in said
    return said


def test_a_run_ends_with_its_assessment(causal_run: Path) -> None:
    found = json.loads((causal_run / "final_assessment.json").read_text())
    assert found["judged_on"]["in_sample"] is True
    assert sorted(found["saes"]) == ["h.1", "h.2"]
    last = [json.loads(line) for line in (causal_run / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["kind"] == "assessment"
    for name, sae in found["saes"].items():
        assert sae["verdict"] == f"{sae['passed']}/4"
        assert sae["passed"] == sum(metric["status"] != "fail" for metric in sae["metrics"].values())
        assert last["saes"][name]["health_passed"] == sae["passed"]
        assert last["saes"][name]["ce_recovered_zero"] == sae["figures"]["ce_recovered_zero"]["value"]
    assert (causal_run / found["evaluations"][0]).exists()


def test_the_files_are_as_the_docs_say(causal_run: Path, encoder_run: Path, tmp_path: Path) -> None:
    schema = json.loads((ROOT / "docs" / "final_assessment.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    formulas = set(re.findall(r"`([a-z0-9_-]+)`", (ROOT / "docs" / "metrics.md").read_text()))
    for run in (causal_run, encoder_run):
        found = evaluate(run, tmp_path / run.parent.name)
        jsonschema.validate(found["final_assessment"], schema)
        for sae in found["own"]["saes"].values():
            lacking = {figure["formula"] for figure in sae["figures"].values()} - formulas
            assert not lacking, f"docs/metrics.md does not say what {lacking} are"
            for name, figure in sae["figures"].items():
                for each in (figure, *figure["nulls"].values()):
                    assert each["low"] is None or each["low"] <= each["value"] <= each["high"], name
                    if name.startswith(("dead", "alive", "density", "l0_share")):
                        assert each["low"] is None or 0 <= each["low"] <= each["high"] <= 1, name


def test_own_and_other_text_in_one_call(
    causal_run: Path,
    other: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    found = evaluate(causal_run, tmp_path, "--dataset", other)
    assert (found["own"]["in_sample"], found["other"]["in_sample"]) == (True, False)
    for text in ("own", "other"):
        for sae in found[text]["saes"].values():
            figures = sae["figures"]
            for name in ("explained_variance", "ce_recovered_zero", "ce_recovered_mean", "kl", "delta_ce"):
                figure = figures[name]
                assert figure["low"] <= figure["value"] <= figure["high"]
                assert figure["low"] < figure["high"]
                assert set(figure["nulls"]) == {"random_decoder", "pca", "mean"}
            assert figures["explained_variance"]["nulls"]["mean"]["value"] == pytest.approx(0, abs=0.1)
            assert figures["ce_recovered_mean"]["nulls"]["mean"]["value"] == 0
            assert figures["l0"]["value"] <= 8
            assert figures["explained_variance"]["count"] >= 800
            assert {"kept", "special", "first", "all"} >= set(sae["classes"]) >= {"kept", "all"}
    shown = capsys.readouterr().out
    for text in (
        "own.jsonl",
        "other.jsonl",
        "in-sample",
        "out of sample",
        "random decoder",
        "PCA of rank k",
        "health on own.jsonl (in-sample)",
    ):
        assert text in shown
    verdicts = [sae["verdict"] for sae in found["final_assessment"]["saes"].values()]
    judged = re.findall(r"verdict (./4) on own.jsonl \(in-sample\), ./4 on other.jsonl \(out of sample\)", shown)
    assert judged == verdicts
    assert 80 < max(len(line) for line in shown.splitlines() if "written" not in line) <= 90


def test_an_encoder_without_a_head_is_scored_by_its_output(encoder_run: Path, tmp_path: Path) -> None:
    figures = evaluate(encoder_run, tmp_path)["own"]["saes"]["encoder.layer.3"]["figures"]
    assert 0 < figures["pooled_cosine"]["value"] <= 1
    assert figures["final_hidden_error"]["value"] > 0
    assert not any(name.startswith(("ce_", "kl")) for name in figures)


def test_a_masked_model_is_scored_at_masked_positions(tiny_mlm: str, own: str, tmp_path: Path) -> None:
    words = f"{tiny_mlm} {own} --layers 1 {SIZES} --assess false"
    main([*words.split(), "--save_dir", str(tmp_path), "--run_name", "run"])
    sae = evaluate(tmp_path / "run", tmp_path / "out")["own"]["saes"]["encoder.layer.1"]
    figures = sae["figures"]
    # 300 tokens are asked for, of which 15 % are masked.
    assert 20 < figures["ce_clean"]["count"] < 90
    assert figures["kl"]["value"] >= 0


def test_figures_do_not_depend_on_the_batch_size(causal_run: Path, encoder_run: Path, tmp_path: Path) -> None:
    for run, sae in ((causal_run, "h.2"), (encoder_run, "encoder.layer.3")):
        one, many = (
            evaluate(run, tmp_path / f"{run.parent.name}{size}", "--model_batch_tokens", size)["own"]["saes"][sae]
            for size in ("40", "4096")
        )
        for name, figure in one["figures"].items():
            if "flag" in figure:
                continue
            for key in ("value", "low", "high"):
                other = many["figures"][name][key]
                assert figure[key] == (other and pytest.approx(other, rel=2e-4, abs=2e-6)), (name, key)
        assert one["density"] == many["density"]
        assert one["documents"] == many["documents"]


@pytest.fixture(params=["saelens", "sparsify"])
def foreign(request: pytest.FixtureRequest, causal_run: Path, tmp_path: Path) -> Path:
    """The same SAE as the other library would have saved it."""
    source = causal_run / "sae" / "h.2"
    config = json.loads((source / "cfg.json").read_text())
    folder = tmp_path / request.param / ("h.2" if request.param == "sparsify" else "sae")
    folder.mkdir(parents=True)
    if request.param == "sparsify":
        kept = {
            key: config[key] for key in ("activation", "d_in", "num_latents", "k", "normalize_decoder", "transcode")
        }
        shutil.copy(source / "sae.safetensors", folder)
    else:
        kept = {key: value for key, value in config.items() if key not in ("saetrain", "activation", "num_latents")}
        shutil.copy(source / "sae_weights.safetensors", folder)
    (folder / "cfg.json").write_text(json.dumps(kept))
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the SAE's ``cfg.json``."""
    config = json.loads((folder / "cfg.json").read_text())
    change(config)
    (folder / "cfg.json").write_text(json.dumps(config))


def forget_text(config: dict[str, Any]) -> None:
    """What the SAE was trained on, so that all layouts take the same part of another text for the nulls."""
    for entries, names in (("saetrain", ("dataset", "fingerprint", "norm_limit")), ("metadata", ("dataset_path",))):
        for name in names:
            config.get(entries, {}).pop(name, None)


def test_other_libraries_saes_give_the_same_figures(
    foreign: Path, causal_run: Path, tiny_gpt2: str, other: str, tmp_path: Path
) -> None:
    own_sae = Path(shutil.copytree(causal_run / "sae" / "h.2", tmp_path / "own" / "h.2"))
    for folder in (own_sae, foreign):
        rewrite(folder, forget_text)
    words = ["--dataset", other, "--ctx_len", "32", "--in_sample", "false", "--exclude_sinks", "true"]
    found = [
        evaluate(folder, tmp_path / name, *words, "--model", tiny_gpt2)["other"]["saes"]
        for folder, name in ((own_sae, "a"), (foreign, "b"))
    ]
    (one,), (two,) = (saes.values() for saes in found)
    assert two["figures"]["l0"]["value"] <= 8
    assert two["hookpoint"] in ("h.2", "blocks.2.hook_resid_post")
    for name in ("fvu", "cosine", "l0", "ce_clean", "ce_spliced", "ce_zero"):
        assert two["figures"][name]["value"] == pytest.approx(one["figures"][name]["value"], rel=1e-5), name
        assert two["figures"][name]["count"] == one["figures"][name]["count"], name
    x = torch.randn(20, 32)
    (ours, _), (them, _) = (load_sae(folder) for folder in (own_sae, foreign))
    torch.testing.assert_close(them.encode(x).to_dense(), ours.encode(x).to_dense())
    torch.testing.assert_close(them.decode(them.encode(x)), ours.decode(ours.encode(x)))


def test_a_single_token_beside_those_of_the_nulls_is_not_scored(
    encoder_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(encoder_run / "sae" / "encoder.layer.3", tmp_path / "sae"))
    rewrite(folder, forget_text)
    text = write_texts(tmp_path / "two.jsonl", ["a", "b"])
    said = refused(capsys, str(folder), "--dataset", text, "--in_sample", "false")
    assert f"data set {text}: has 1 tokens to score on (split 'train'" in said
    assert "without those that the baselines are fitted on); at least 2 are needed" in said


OTHER_TEXT = ["--in_sample", "false", "--loss_tokens", "0"]


@pytest.fixture
def saelens_sae(causal_run: Path, tmp_path: Path) -> Path:
    """An SAE as SAELens alone knows it."""
    folder = Path(shutil.copytree(causal_run / "sae" / "h.2", tmp_path / "saelens"))
    rewrite(folder, lambda config: config.pop("saetrain"))
    return folder


@pytest.mark.parametrize(
    ("hf_name", "name", "words"),
    [
        ("transformer.h.2.output", "blocks.2.hook_resid_post", ()),
        ("transformer.h.2", "blocks.9.hook_resid_post", ()),
        ("transformer.h.2.mlp.input", "blocks.2.hook_resid_post", ()),
        ("transformer.h.2.mlp.input", "blocks.2.hook_mlp_in", ("--hookpoint", "h.2")),
    ],
)
def test_hookpoints_as_saelens_spells_them(
    saelens_sae: Path,
    other: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    hf_name: str,
    name: str,
    words: tuple[str, ...],
) -> None:
    mended = evaluate(saelens_sae, tmp_path / "a", "--dataset", other, *OTHER_TEXT)["other"]["saes"]
    rewrite(saelens_sae, lambda config: config["metadata"].update(hf_hook_name=hf_name, hook_name=name))
    if words:
        said = refused(capsys, str(saelens_sae), "--dataset", other, *OTHER_TEXT)
        assert f"its hookpoint '{hf_name}' and '{name}' is not a module of the model" in said
    spelt = evaluate(saelens_sae, tmp_path / "b", "--dataset", other, *OTHER_TEXT, *words)["other"]["saes"]
    (one,), (two,) = mended.values(), spelt.values()
    assert two["figures"]["fvu"] == one["figures"]["fvu"]
    said = refused(capsys, str(saelens_sae), "--dataset", other, *OTHER_TEXT, "--hookpoint", "h.9")
    assert "--hookpoint h.9: " in said


def test_texts_begin_with_a_bos_where_the_sae_was_trained_so(
    saelens_sae: Path, tiny_gpt2: str, other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--dataset", other, *OTHER_TEXT)
    without = next(iter(evaluate(saelens_sae, tmp_path / "a", *words)["other"]["saes"].values()))
    assert "first" in without["classes"]
    assert "BOS" not in capsys.readouterr().err
    rewrite(saelens_sae, lambda config: config["metadata"].update(prepend_bos=True))
    found = next(iter(evaluate(saelens_sae, tmp_path / "b", *words)["other"]["saes"].values()))
    said = capsys.readouterr().err
    assert "each text gets a BOS token, because the SAE was trained with one (prepend_bos)" in said
    assert "first" not in found["classes"], "position 0 is the BOS, a special token"
    assert found["classes"]["special"]["tokens"] >= 800 // 32
    model = Path(shutil.copytree(tiny_gpt2, tmp_path / "model"))
    forget_token(model, "bos_token")
    said = refused(capsys, str(saelens_sae), *words, "--model", str(model))
    assert "was trained with a BOS token before each text (prepend_bos), but the model's tokenizer has none" in said


def test_texts_have_no_bos_where_the_sae_was_trained_so(
    saelens_sae: Path, tiny_gpt2: str, other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokenizer of this model puts one before each text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    model = Path(shutil.copytree(tiny_gpt2, tmp_path / "model"))
    tokenizer.save_pretrained(model)
    words = ("--dataset", other, *OTHER_TEXT, "--model", str(model))
    found = next(iter(evaluate(saelens_sae, tmp_path / "a", *words)["other"]["saes"].values()))
    assert "texts get no BOS token" in capsys.readouterr().err
    assert "first" in found["classes"]


def forget_token(model: Path, name: str) -> None:
    """Take a special token's role from the tokenizer in ``model``."""
    for path in (model / "tokenizer_config.json", model / "special_tokens_map.json"):
        if path.exists():
            config = json.loads(path.read_text())
            config.pop(name, None)
            path.write_text(json.dumps(config))


def test_a_masked_model_without_a_mask_token_is_scored_without_its_loss(
    tiny_mlm: str, own: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    model = Path(shutil.copytree(tiny_mlm, tmp_path / "model"))
    full = AutoTokenizer.from_pretrained(tiny_mlm)
    PreTrainedTokenizerFast(
        tokenizer_object=full.backend_tokenizer,
        **{name: token for name, token in full.special_tokens_map.items() if name != "mask_token"},
    ).save_pretrained(model)
    words = f"{model} {own} --layers 1 {SIZES} --assess false"
    main([*words.split(), "--save_dir", str(tmp_path), "--run_name", "run"])
    figures = evaluate(tmp_path / "run", tmp_path / "out")["own"]["saes"]["encoder.layer.1"]["figures"]
    assert "the model's loss is not scored: its tokenizer has no mask token" in capsys.readouterr().err
    assert figures["fvu"]["value"] > 0
    assert not any(name.startswith(("ce_", "kl")) for name in figures)


def test_baselines_of_an_sae_that_states_no_l0_use_the_measured_one(
    causal_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stated = evaluate(causal_run, tmp_path / "stated")["own"]["saes"]["h.2"]
    monkeypatch.setattr("saetrain.coders.topk.TopK.expected_l0", lambda coder: None)
    found = evaluate(causal_run, tmp_path / "measured")
    measured = found["own"]["saes"]["h.2"]
    assert (stated["k"], measured["k"]) == (8, None)
    assert 7.5 < measured["figures"]["l0"]["value"] <= 8, "rounded it is k"
    assert measured["figures"] == stated["figures"]
    verdict = found["final_assessment"]["saes"]["h.2"]["metrics"]
    assert verdict["l0"]["status"] == "fail"
    assert not verdict["l0"]["by_construction"]
    monkeypatch.setattr("saetrain.coders.topk.TopK.encode", encode_with_two_latents)
    fewer = evaluate(causal_run, tmp_path / "fewer")["own"]["saes"]["h.2"]["figures"]
    assert fewer["l0"]["nulls"]["random_decoder"]["value"] == pytest.approx(fewer["l0"]["value"]) == 2


def encode_with_two_latents(coder: TopK, x_ND: torch.Tensor) -> Codes:
    """The two largest pre-activations, whatever their sign."""
    values, indices = torch.addmm(coder.b_enc, x_ND - coder.b_dec, coder.W_enc).topk(2, dim=1)
    return Codes(values.abs(), indices, coder.num_latents)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_says_what_to_lower(
    causal_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*arguments: object) -> None:
        raise error

    for place in ("loss_recovered.scored_log_probs", "baselines.PCA.__call__", "evaluator.SparsitySums.add"):
        with monkeypatch.context() as patch:
            patch.setattr(f"saetrain.evaluation.{place}", full)
            said = refused(capsys, str(causal_run), *QUICK.split(), "--model_batch_tokens", "512")
        assert "out of memory while scoring: lower --model_batch_tokens from 512 to 256" in said


def test_another_runtime_error_is_not_hidden(causal_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("something else")

    monkeypatch.setattr("saetrain.evaluation.loss_recovered.scored_log_probs", broken)
    with pytest.raises(RuntimeError, match="something else"):
        main(["evaluate", str(causal_run), *QUICK.split()])


def test_weights_ranked_by_norm_are_read_as_saelens_means_them(causal_run: Path, tmp_path: Path) -> None:
    source, folder = causal_run / "sae" / "h.2", tmp_path / "scaled"
    shutil.copytree(source, folder)
    config = json.loads((folder / "cfg.json").read_text())
    weights = load_file(folder / "sae_weights.safetensors")
    factors = torch.rand(96) + 0.5
    weights["W_dec"] *= factors.unsqueeze(1)
    weights["W_enc"] /= factors
    weights["b_enc"] /= factors
    save_file(weights, folder / "sae_weights.safetensors")
    (folder / "sae.safetensors").unlink()
    del config["saetrain"]
    (folder / "cfg.json").write_text(json.dumps({**config, "rescale_acts_by_decoder_norm": True}))
    one = evaluate(source, tmp_path / "a", "--exclude_sinks", "false")["own"]["saes"]["h.2"]["figures"]["fvu"]["value"]
    two = evaluate(folder, tmp_path / "b", "--exclude_sinks", "false")["own"]["saes"]["h.2"]["figures"]["fvu"]["value"]
    assert two == pytest.approx(one, rel=1e-3)


def test_text_that_was_trained_on_is_left_out_of_other_text(
    causal_run: Path, own: str, other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [json.loads(line)["text"] for file in (own, other) for line in Path(file).read_text().splitlines()]
    both = write_texts(tmp_path / "both.jsonl", texts)
    found = evaluate(causal_run, tmp_path, "--dataset", both)
    assert "of texts that the SAE was trained on are excluded" in found["both"]["held_out"]
    assert "are excluded" in capsys.readouterr().err


def test_a_lone_folder_knows_its_own_text(causal_run: Path, tmp_path: Path) -> None:
    """Away from its run, by its metadata alone."""
    shutil.copytree(causal_run / "sae" / "h.2", tmp_path / "moved")
    there = evaluate(causal_run / "sae" / "h.2", tmp_path / "a")["own"]["saes"]["h.2"]["figures"]
    moved = evaluate(tmp_path / "moved", tmp_path / "b")["own"]["saes"]["h.2"]["figures"]
    assert {name: figure["value"] for name, figure in moved.items()} == {
        name: figure["value"] for name, figure in there.items()
    }


def test_thresholds_are_settings(causal_run: Path, tmp_path: Path) -> None:
    strict = evaluate(causal_run, tmp_path / "a", "--l0_range", "20", "200")["final_assessment"]["saes"]["h.2"]
    assert strict["metrics"]["l0"]["status"] == "fail"
    assert strict["metrics"]["l0"]["by_construction"] is True
    words = ["--l0_range", "1", "20", "--max_redundancy", "1", "--max_dead", "1", "--min_explained_variance", "0"]
    mild = evaluate(causal_run, tmp_path / "b", *words)["final_assessment"]["saes"]["h.2"]
    assert mild["verdict"] == "4/4"


Spoil = Callable[[Path], None]


def _cut(folder: Path) -> None:
    path = folder / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _without(key: str) -> Spoil:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "cfg.json").read_text())
        del config[key]
        (folder / "cfg.json").write_text(json.dumps(config))

    return spoil


def _without_tensor(folder: Path) -> None:
    path = folder / "sae_weights.safetensors"
    weights = load_file(path)
    del weights["b_enc"]
    save_file(weights, path)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_cut, "sae_weights.safetensors: is damaged or truncated"),
        (_without("k"), "cfg.json: has no key 'k'"),
        (_without_tensor, 'Missing key(s) in state_dict: "b_enc"'),
        (lambda folder: (folder / "cfg.json").write_text("{"), "cfg.json: is not JSON"),
        (lambda folder: (folder / "sae_weights.safetensors").unlink(), "sae_weights.safetensors: is missing"),
        (lambda folder: (folder / "cfg.json").unlink(), "contains no SAE (no cfg.json)"),
    ],
)
def test_a_broken_sae_is_refused(
    spoil: Spoil, said: str, causal_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(causal_run / "sae" / "h.2", tmp_path / "sae")
    spoil(tmp_path / "sae")
    assert said in refused(capsys, str(tmp_path / "sae"))


def test_what_does_not_fit_is_refused(
    causal_run: Path, encoder_run: Path, tiny_bert: str, minilm: str, other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, sae = str(causal_run), str(causal_run / "sae" / "h.2")
    for words, said in (
        ((run + "x",), "there is no such folder"),
        ((str(causal_run.parent.parent / "nothing"),), "there is no such folder"),
        ((run, "--model", tiny_bert), "its weights are not those that the SAE"),
        ((str(encoder_run), "--model", minilm), "its weights are not those that the SAE"),
        ((sae, "--hookpoint", "h.1"), "--hookpoint h.1: the SAE in"),
        ((run, "--eval_tokens", "10000000"), "--eval_tokens 10000000: data set"),
        ((run, "--dataset", other, "--eval_tokens", "10000000", "--in_sample", "false"), "has only"),
        ((run, "--eval_tokens", "1"), "--eval_tokens 1: must be at least 2"),
        ((run, "--bootstrap", "1"), "--bootstrap 1: one resampling gives no interval"),
        ((run, "--loss_tokens", "-1"), "--loss_tokens -1: must be at least 0"),
        ((run, "--fit_tokens", "1"), "--fit_tokens 1: must be at least 2"),
        ((run, "--in_sample", "false"), "--in_sample false: no text is left to score on"),
        ((run, "--ctx_len", "4096"), "--ctx_len 4096"),
        ((run, "--l0_range", "9", "3"), "--l0_range 9 3: give the smaller number first"),
        ((run, "--good_dead", "0.9"), "--good_dead 0.9: must not be above --max_dead 0.2"),
        ((run, "--min_explained_variance", "0.9"), "must not be above --good_explained_variance"),
        ((run, "--dataset", run + "/nothing.jsonl"), "nothing.jsonl"),
        ((run, "--eval_token", "3"), "--eval_token: no such flag. Did you mean --eval_tokens"),
    ):
        assert said in refused(capsys, *words), words


def test_a_folder_without_a_finished_sae_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "contains no SAE (no cfg.json)" in refused(capsys, str(tmp_path))
    (tmp_path / ".saetrain").touch()
    assert "its run is not finished" in refused(capsys, str(tmp_path))


def test_a_foreign_sae_says_what_it_lacks(
    foreign: Path, tiny_gpt2: str, other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((foreign / "cfg.json").read_text())
    config.pop("metadata", None)
    (foreign / "cfg.json").write_text(json.dumps(config))
    renamed = foreign.rename(foreign.parent / "some")
    assert "its metadata do not name the model; pass --model" in refused(capsys, str(renamed))
    with_model = (str(renamed), "--model", tiny_gpt2)
    assert "; pass --hookpoint" in refused(capsys, *with_model)
    assert "--hookpoint h.9: not a module of" in refused(capsys, *with_model, "--hookpoint", "h.9")
    assert "do not name the training text; pass --dataset" in refused(capsys, *with_model, "--hookpoint", "h.2")
    wider = [*with_model, "--hookpoint", "h.2.mlp.c_fc", "--dataset", other]
    assert "takes activations of width 32" in refused(capsys, *wider)


def test_a_changed_text_is_refused(
    tiny_gpt2: str, own: str, other: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.jsonl"
    shutil.copy(own, text)
    words = f"{tiny_gpt2} {text} --layers 1 {SIZES} --assess false"
    main([*words.split(), "--save_dir", str(tmp_path), "--run_name", "run"])
    shutil.copy(other, text)
    run = str(tmp_path / "run")
    assert "the training text has changed since" in refused(capsys, run)
    third = write_texts(tmp_path / "third.jsonl", python_topics()[:20])
    main(["evaluate", run, *QUICK.split(), "--dataset", third, "--in_sample", "false"])
    assert "without the training text: " in capsys.readouterr().err
    text.unlink()
    main(["evaluate", run, *QUICK.split(), "--dataset", third, "--in_sample", "false"])


def test_a_folder_that_cannot_be_written_is_refused(
    causal_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    said = refused(capsys, str(causal_run), *QUICK.split(), "--out", str(tmp_path / "file"))
    assert "choose another folder with --out" in said
