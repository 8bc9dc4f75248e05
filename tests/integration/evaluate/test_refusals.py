"""What ``saetrain evaluate`` refuses, and with which message."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from saetrain.cli import main
from tests.conftest import python_topics
from tests.integration.evaluate.conftest import QUICK, SIZES, forget_text, refused, rewrite, write_texts


def test_a_single_token_beside_those_of_the_nulls_is_not_scored(
    encoder_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(encoder_run / "sae" / "encoder.layer.3", tmp_path / "sae"))
    rewrite(folder, forget_text)
    text = write_texts(tmp_path / "two.jsonl", ["a", "b"])
    said = refused(capsys, str(folder), "--dataset", text, "--in_sample", "false")
    assert f"data set {text}: has 1 tokens to score on (split 'train'" in said
    assert "without those that the baselines are fitted on); at least 2 are needed" in said


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
        (lambda folder: (folder / "cfg.json").write_text("{"), "cfg.json: is not valid JSON"),
        (lambda folder: (folder / "sae_weights.safetensors").unlink(), "sae_weights.safetensors: is missing"),
        (lambda folder: (folder / "cfg.json").unlink(), "contains no SAE (no cfg.json, ae.pt or params.npz)"),
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
    assert "contains no SAE (no cfg.json, ae.pt or params.npz)" in refused(capsys, str(tmp_path))
    (tmp_path / ".saetrain").touch()
    assert "its run is not finished" in refused(capsys, str(tmp_path))


def test_a_foreign_sae_says_what_it_lacks(
    foreign: Path, tiny_gpt2: str, other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(foreign, lambda config: config.pop("metadata", None))
    rewrite(foreign, lambda config: config.get("trainer", {}).pop("submodule_name", None))
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
