"""Training towards the model's own loss: it falls, micro-batches equal one batch, a kill changes nothing, refusals."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from saetrain.cli import main
from saetrain.runs.train import setup
from tests.integration.test_resume import (
    calibrate_on_few_tokens,
    fingerprint,
    finish,
    kill_and_resume,
    last_checkpoint,
    records,
    start,
    wait_for_step,
    words_of,
)
from tests.integration.test_training import lines, train, weights

TINY = "--k 4 --num_latents 64 --batch_size 4 --ctx_len 32 --eval_tokens 500 --layers 1 --assess false"
STEPS = 60
SHORT = ["--max_tokens", str(STEPS * 128), "--save_every", "20"]
SITES = {"tiny_gpt2": "h.1", "tiny_mlm": "encoder.layer.1"}
MODELS = pytest.mark.parametrize("model", SITES)


@pytest.fixture(autouse=True)
def _few_calibration_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "CALIBRATION_TOKENS", setup.CALIBRATION_TOKENS)
    calibrate_on_few_tokens()


@MODELS
@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_the_loss_falls_and_its_terms_are_logged(
    model: str, loss: str, request: pytest.FixtureRequest, tmp_path: Path, topics_jsonl: str
) -> None:
    words = f"{TINY} --loss_fn {loss} --e2e_recon_weight 1e-4 --auxk_alpha 0.01 --lr 6e-3 --log_every 1"
    words += " --dead_window_tokens 100"
    run = train(tmp_path, "run", f"{request.getfixturevalue(model)} {topics_jsonl} {words} --max_tokens 12800")
    figures = [line["saes"][SITES[model]] for line in lines(run, "train")]
    assert len(figures) == 100
    for row in figures:
        terms = [row["loss_recon"], row[f"loss_{loss}"], row.get("loss_auxk", 0.0)]
        assert row["loss"] == pytest.approx(sum(terms))
        assert row["loss_recon"] == pytest.approx(1e-4 * row["fvu"], rel=1e-4), "no token is left out for its norm"
    assert any("loss_auxk" in row for row in figures)
    first, last = ([row[f"loss_{loss}"] for row in part] for part in (figures[:20], figures[-20:]))
    # The cross-entropy of random weights is all but the model's own.
    assert sum(last) < (0.6 if loss == "kl" else 0.9999) * sum(first)
    about = json.loads((run / "sae" / SITES[model] / "cfg.json").read_text())["saetrain"]
    assert (about["loss_fn"], about["kernels"], about["compute_dtype"]) == (loss, "torch", "float32")
    assert lines(run, "final")[0]["saes"][SITES[model]]["l0"] <= 4


@MODELS
@pytest.mark.parametrize("loss", ["ce", "kl"])
def test_accumulated_micro_batches_equal_one_batch(
    model: str, loss: str, request: pytest.FixtureRequest, tmp_path: Path, topics_jsonl: str
) -> None:
    base = f"{request.getfixturevalue(model)} {topics_jsonl} {TINY} --max_tokens 4096 --loss_fn {loss}"
    base += " --dead_window_tokens 512 --e2e_recon_weight 0.1 --optimizer sgd --lr 0.5"
    one = train(tmp_path, "one", f"{base} --batch_size 8")
    four = train(tmp_path, "four", f"{base} --batch_size 2 --grad_acc_steps 4")
    for key, value in weights(one, SITES[model]).items():
        torch.testing.assert_close(value, weights(four, SITES[model])[key], rtol=1e-4, atol=1e-5, msg=key)
    for a, b in zip(lines(one, "train"), lines(four, "train"), strict=True):
        for name, value in a["saes"][SITES[model]].items():
            assert b["saes"][SITES[model]][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


RUNS = pytest.mark.parametrize(
    ("model", "source"),
    [
        pytest.param("tiny_gpt2", "--loss_fn kl --e2e_recon_weight 0.1", id="decoder-kl"),
        pytest.param(
            "tiny_mlm",
            "--loss_fn ce --streaming --mix 2 1 --data_shards 4 --batch_size 2 --grad_acc_steps 2",
            id="encoder-ce-streaming-mixed-two-micro-steps",
        ),
    ],
)


@RUNS
def test_killed_and_resumed_it_ends_with_the_same_bits(
    model: str, source: str, request: pytest.FixtureRequest, tmp_path: Path, few_topics_jsonl: str
) -> None:
    words = words_of(request.getfixturevalue(model), "1", [*source.split(), *SHORT], few_topics_jsonl)
    whole = start(tmp_path, "whole", words, calibrate_on_few_tokens)
    kill_and_resume(tmp_path, "killed", words, kills=2, seed=5, steps=STEPS)
    finish(whole)
    assert fingerprint(tmp_path / "killed") == fingerprint(tmp_path / "whole")
    assert records(tmp_path / "killed") == records(tmp_path / "whole")


def test_sigterm_loses_nothing(tmp_path: Path, tiny_mlm: str, topics_jsonl: str) -> None:
    source = ["--loss_fn", "kl", "--batch_size", "2", "--grad_acc_steps", "2"]
    words = words_of(tiny_mlm, "1", [*source, *SHORT], topics_jsonl)
    whole = start(tmp_path, "whole", words, calibrate_on_few_tokens)
    process = start(tmp_path, "stopped", words, calibrate_on_few_tokens)
    wait_for_step(process, tmp_path / "stopped", 27)
    process.send_signal(signal.SIGTERM)
    assert "everything is saved" in finish(process)
    assert last_checkpoint(tmp_path / "stopped") >= 27
    finish(start(tmp_path, "stopped", [*words, "--resume"], calibrate_on_few_tokens))
    finish(whole)
    assert fingerprint(tmp_path / "stopped") == fingerprint(tmp_path / "whole")


@MODELS
def test_a_dry_run_times_the_model_too(
    model: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    topics_jsonl: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = f"{request.getfixturevalue(model)} {topics_jsonl} {TINY} --max_tokens 25600 --loss_fn kl --dry_run"
    main([*words.split(), "--save_dir", str(tmp_path)])
    printed = capsys.readouterr().out
    assert re.search(r" \d+:\d\d  training at [\d,]+ tokens/s", printed)
    assert "filling the shuffle buffer" not in printed
    assert "200 of 128 tokens" in printed
    assert not list(tmp_path.iterdir())


def without_mask(model: str, folder: Path) -> str:
    """A copy of the model whose tokenizer has no mask token."""
    shutil.copytree(model, folder)
    path = folder / "tokenizer_config.json"
    values: dict[str, Any] = json.loads(path.read_text())
    values.pop("mask_token")
    values["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(values))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    return str(folder)


@pytest.mark.parametrize(
    ("model", "words", "message"),
    [
        ("tiny_bert", "", "--loss_fn kl: model .* is a BertModel and has no head that predicts tokens"),
        ("tiny_gpt2", "--layers 0 2", r"--loss_fn kl trains one SAE at a time, but 2 hookpoints .*\(h.0, h.2\)"),
        ("tiny_gpt2", "--kernels native", "--kernels native: .* --loss_fn ce and kl need gradients through the model"),
        (
            "tiny_gpt2",
            "--kernels reference --compute_dtype bfloat16",
            "--compute_dtype bfloat16: --kernels reference supports only float32",
        ),
        ("no mask", "", "predicts masked tokens, but its tokenizer has no mask token"),
    ],
)
def test_what_cannot_be_is_refused(
    model: str,
    words: str,
    message: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    topics_jsonl: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if model == "no mask":
        name = without_mask(request.getfixturevalue("tiny_mlm"), tmp_path / "model")
    else:
        name = request.getfixturevalue(model)
    with pytest.raises(SystemExit) as caught:
        train(tmp_path / "out", "run", f"{name} {topics_jsonl} {TINY} --max_tokens 1280 --loss_fn kl {words}")
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list((tmp_path / "out").rglob("cfg.json"))


def test_a_resumed_run_keeps_its_loss(
    tmp_path: Path, tiny_gpt2: str, topics_jsonl: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = f"{tiny_gpt2} {topics_jsonl} {TINY} --max_tokens 1280"
    train(tmp_path, "run", f"{base} --loss_fn kl --e2e_recon_weight 0.1")
    for words, message in (
        ("--loss_fn kl --e2e_recon_weight 0.2", "--e2e_recon_weight is 0.2 now and was 0.1"),
        ("--loss_fn ce --e2e_recon_weight 0.1", "--loss_fn is ce now and was kl"),
        ("--kernels reference", "--loss_fn is mse now and was kl"),
    ):
        with pytest.raises(SystemExit):
            train(tmp_path, "run", f"{base} {words} --resume")
        assert message in capsys.readouterr().err


def test_a_spike_ends_the_run_and_says_where_the_text_stood(
    tmp_path: Path, tiny_gpt2: str, topics_jsonl: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"{tiny_gpt2} {topics_jsonl} {TINY} --max_tokens 12800 --loss_fn kl --lr 1e12 --weight_decay 1e12"
    words += " --lr_warmup_steps 0"
    with pytest.raises(SystemExit) as caught:
        train(tmp_path, "run", f"{words} --max_grad_norm 0 --optimizer sgd")
    assert caught.value.code == 2
    assert "the loss of step" in capsys.readouterr().err
    facts = json.loads((tmp_path / "run" / "spike.json").read_text())
    assert facts["sae"] == "h.1"
    assert {len(place["cursor"]) for place in facts["shards"].values()} == {1}
