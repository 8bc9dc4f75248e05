"""``saetrain evaluate`` and the assessment at a run's end, on real models, real text and real files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file

from saetrain.cli import main
from saetrain.coders.topk import TopK
from saetrain.interop.formats import load_sae
from saetrain.types import Codes
from tests.integration.evaluate.conftest import SIZES, evaluate, forget_text, refused, rewrite, write_texts
from tests.unit.interop.layouts import write_gemma_scope, write_saelens

ROOT = Path(__file__).parents[3]


def test_a_run_ends_with_its_assessment(causal_run: Path) -> None:
    found = json.loads((causal_run / "final_assessment.json").read_text())
    assert found["judged_on"]["in_sample"] is True
    assert sorted(found["saes"]) == ["h.1", "h.2"]
    last = [json.loads(line) for line in (causal_run / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["kind"] == "assessment"
    for name, sae in found["saes"].items():
        assert sae["verdict"] == f"{sae['passed']}/{sae['of']}"
        statuses = [metric["status"] for metric in sae["metrics"].values()]
        assert sae["passed"] == sum(status in ("good", "pass") for status in statuses)
        assert sae["of"] == 4 - statuses.count("n/a")
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
    monkeypatch.setenv("COLUMNS", "120")
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
            assert sum(sae["frequency"]["tokens"]) == figures["fvu"]["count"]
            assert len(sae["frequency"]["fvu"]) == len(sae["frequency"]["edges_log10"]) - 1
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
    pattern = r"h\.\d: (./.) checks pass[^:]*; ./. on other.jsonl \(out of sample\)"
    assert re.findall(pattern, " ".join(shown.split())) == verdicts
    assert 80 < max(len(line) for line in shown.splitlines() if "written" not in line) <= 120


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


@pytest.mark.parametrize("layout", ["gated", "gemma_scope"])
def test_saes_whose_l0_is_not_recorded_are_evaluated(layout: str, tiny_gpt2: str, other: str, tmp_path: Path) -> None:
    """Their baselines have the L0 that is counted."""
    torch.manual_seed(0)
    weights = {"W_enc": 0.3 * torch.randn(32, 96), "W_dec": torch.randn(96, 32), "b_dec": torch.zeros(32)}
    bias, words = torch.zeros(96), ["--model", tiny_gpt2, "--ctx_len", "32", "--in_sample", "false"]
    if layout == "gated":
        gate = {"b_gate": bias, "r_mag": bias + 0.2, "b_mag": bias + 0.1}
        folder = write_saelens(tmp_path / "sae", "gated", {**weights, **gate})
        words += ["--dataset", other]
    else:
        folder = write_gemma_scope(tmp_path / "sae", {**weights, "b_enc": bias, "threshold": bias + 0.01})
        words += ["--dataset", other, "--hookpoint", "h.1"]
    (found,) = evaluate(folder, tmp_path / "out", *words)["other"]["saes"].values()
    assert found["k"] is None
    assert 1 < found["figures"]["l0"]["value"] < 96
    assert found["figures"]["fvu"]["nulls"].keys() >= {"random_decoder"}
    assert found["figures"]["ce_spliced"]["value"] > 0


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
    assert verdict["l0"]["status"] == "n/a"
    assert "steps are too few" in verdict["l0"]["reason"]
    assert not verdict["l0"]["by_construction"]
    monkeypatch.setattr("saetrain.coders.topk.TopK.encode", encode_with_two_latents)
    fewer = evaluate(causal_run, tmp_path / "fewer")["own"]["saes"]["h.2"]["figures"]
    assert fewer["l0"]["nulls"]["random_decoder"]["value"] == pytest.approx(fewer["l0"]["value"]) == 2


def encode_with_two_latents(coder: TopK, x_ND: torch.Tensor) -> Codes:
    """The two largest pre-activations, whatever their sign."""
    values, indices = torch.addmm(coder.b_enc, x_ND - coder.b_dec, coder.W_enc).topk(2, dim=1)
    return Codes(values.abs(), indices, coder.num_latents)


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
    assert strict["metrics"]["l0"]["status"] == "n/a"
    assert strict["metrics"]["l0"]["by_construction"] is True
    words = [
        "--l0_range",
        "1",
        "20",
        "--max_redundancy_excess",
        "1",
        "--max_dead",
        "1",
        "--min_explained_variance",
        "0",
    ]
    mild = evaluate(causal_run, tmp_path / "b", *words)["final_assessment"]["saes"]["h.2"]
    assert mild["verdict"] == "4/4"
