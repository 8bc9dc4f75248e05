"""Stops, restarts, changed settings and damaged checkpoints."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from saetrain.cli import main
from saetrain.optim import LR_DECAY_SHARE, lr_factor
from tests.integration.test_resume import (
    SETTINGS,
    STEPS,
    fingerprint,
    finish,
    last_checkpoint,
    records,
    start,
    wait_for_step,
)
from tests.unit.runs.test_checkpoint_state import remake_manifest

SMALL = "--k 4 --num_latents 64 --batch_size 2 --ctx_len 32 --eval_tokens 500 --log_every 1 --buffer_tokens 1024"
SMALL += " --assess false"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_bert: str, topics_jsonl: str) -> Path:
    """The uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    finish(start(out, "whole", [tiny_bert, topics_jsonl, *SETTINGS.split()]))
    return out / "whole"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_and_loses_nothing(
    number: signal.Signals, code: int, whole: Path, tmp_path: Path, tiny_bert: str, topics_jsonl: str
) -> None:
    words = [tiny_bert, topics_jsonl, *SETTINGS.split()]
    run = tmp_path / "run"
    process = start(tmp_path, "run", words)
    wait_for_step(process, run, 57)
    process.send_signal(number)
    output = finish(process, code)
    assert f"stopped by {number.name} after step" in output
    assert "Traceback" not in output
    done = [r["step"] for r in records(run) if r["kind"] == "train"][-1]
    assert last_checkpoint(run) == done, "nothing that was logged is lost"
    assert f"at step {done} of {STEPS}" in finish(start(tmp_path, "run", [*words, "--resume"]))
    assert fingerprint(run) == fingerprint(whole)
    assert records(run) == records(whole)


@pytest.mark.parametrize(
    ("signals", "code", "reached"),
    [
        (["SIGINT", "SIGINT"], -signal.SIGINT, False),
        (["SIGTERM", "SIGINT"], -signal.SIGINT, False),
        (["SIGINT"], 0, True),
        (["SIGTERM", "SIGTERM"], 0, True),
    ],
)
def test_a_second_ctrl_c_ends_at_once(signals: list[str], code: int, reached: bool) -> None:
    kills = "".join(f"    os.kill(os.getpid(), signal.{name})\n" for name in signals)
    source = (
        "import os, signal\nfrom saetrain.training.preemption import PreemptionHandler\n"
        f"with PreemptionHandler():\n{kills}    print('reached')"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert ("reached" in done.stdout) == reached


@pytest.mark.parametrize("flag", ["--resume", "--overwrite", None])
def test_a_second_start_is_refused_while_the_first_runs(
    flag: str | None, tmp_path: Path, tiny_bert: str, topics_jsonl: str
) -> None:
    words = [tiny_bert, topics_jsonl, *SETTINGS.split()]
    first = start(tmp_path, "run", words)
    while not (tmp_path / "run" / ".lock").exists():
        time.sleep(0.01)
    second = start(tmp_path, "run", [*words, *([flag] if flag else [])])
    output = finish(second, 2)
    assert f"{tmp_path / 'run'} is in use by process {first.pid} on host" in output
    assert "Traceback" not in output
    assert first.poll() is None
    wait_for_step(first, tmp_path / "run", 1)
    assert f"is in use by process {first.pid}" in finish(start(tmp_path, "run", [*words, "--resume"]), 2)
    first.kill()
    first.wait()
    process = start(tmp_path, "run", [*words, "--resume"])
    wait_for_step(process, tmp_path / "run", 2)
    assert process.poll() is None


def test_torchrun_restarts_resume_by_themselves(whole: Path, tmp_path: Path, tiny_bert: str, topics_jsonl: str) -> None:
    words = [tiny_bert, topics_jsonl, *SETTINGS.split(), "--overwrite"]
    process = start(tmp_path, "run", words)
    wait_for_step(process, tmp_path / "run", 90)
    process.kill()
    process.wait()
    output = finish(start(tmp_path, "run", words, TORCHELASTIC_RESTART_COUNT="1"))
    assert "resumed from" in output
    assert fingerprint(tmp_path / "run") == fingerprint(whole)


def copy(whole: Path, tmp_path: Path) -> Path:
    """A finished run's folder whose checkpoints end before the last step."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / f"step_{STEPS:09d}")
    return run


def resume(tmp_path: Path, model: str, data: str, *words: str) -> None:
    main([model, data, *SETTINGS.split(), "--save_dir", str(tmp_path), "--run_name", "run", "--resume", *words])


@pytest.mark.parametrize("harm", ["cut", "flip", "missing", "manifest", "list", "empty list"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    harm: str, whole: Path, tmp_path: Path, tiny_bert: str, topics_jsonl: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    last = run / "checkpoints" / f"step_{STEPS:09d}"
    victim = last / ("manifest.json" if harm in ("manifest", "list") else "sae_000.safetensors")
    content = bytearray(victim.read_bytes())
    if harm == "missing":
        victim.unlink()
    elif harm == "list":
        victim.write_text("[]")
    elif harm in ("flip", "empty list"):
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
        if harm == "empty list":
            (last / "manifest.json").write_text('{"sha256": {}}')
    else:
        victim.write_bytes(content[: len(content) // 2])
    resume(tmp_path, tiny_bert, topics_jsonl)
    printed = capfd.readouterr().err
    assert f"checkpoint {last} is damaged" in printed
    assert f"at step {STEPS - 40} of {STEPS}" in printed
    assert fingerprint(run) == fingerprint(whole)
    assert (run / "checkpoints" / f"damaged_{last.name}").exists()
    assert last.exists(), "the new checkpoint of that step is whole, and was not cleaned away"


def test_a_checkpoint_may_be_damaged_twice(whole: Path, tmp_path: Path, tiny_bert: str, topics_jsonl: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    newest = run / "checkpoints" / f"step_{STEPS:09d}"
    for _ in range(2):
        (newest / "manifest.json").write_text("{}x")
        resume(tmp_path, tiny_bert, topics_jsonl)
        assert fingerprint(run) == fingerprint(whole)
        assert newest.exists()


def test_a_checkpoint_of_another_version_is_refused(
    whole: Path, tmp_path: Path, tiny_bert: str, topics_jsonl: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(whole, tmp_path)
    for path in run.glob("checkpoints/step_*/state.json"):
        values = json.loads(path.read_text())
        path.write_text(json.dumps({**values, "format": 0}))
        remake_manifest(path.parent)
    with pytest.raises(SystemExit) as caught:
        resume(tmp_path, tiny_bert, topics_jsonl)
    assert caught.value.code == 2
    assert "has format 0, but this version of saetrain needs format" in capsys.readouterr().err


def rename_sae(checkpoint: Path, values: dict[str, Any]) -> None:
    for key in ("files", "losses"):
        values[key]["other"] = values[key].pop("encoder.layer.0")


def change_tensor(name: str, value: torch.Tensor | None) -> Callable[[Path, dict[str, Any]], None]:
    def change(checkpoint: Path, values: dict[str, Any]) -> None:
        path = checkpoint / values["files"]["encoder.layer.0"]
        tensors = load_file(path)
        tensors.pop(name)
        save_file(tensors if value is None else {**tensors, name: value}, path)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (rename_sae, "has no SAE encoder.layer.0"),
        (lambda checkpoint, values: (checkpoint / "sae_000.safetensors").write_bytes(b"?" * 99), "is not valid"),
        (change_tensor("coder.W_dec", None), "the tensors of encoder.layer.0 are not those of the run: 'W_dec'"),
        (change_tensor("coder.W_dec", torch.zeros(3)), "the tensors of encoder.layer.0 are not those of the run"),
    ],
)
def test_a_checkpoint_with_right_hashes_and_other_content_is_refused(
    change: Callable[[Path, dict[str, Any]], object],
    said: str,
    whole: Path,
    tmp_path: Path,
    tiny_bert: str,
    topics_jsonl: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = copy(whole, tmp_path)
    checkpoint = run / "checkpoints" / f"step_{last_checkpoint(run):09d}"
    values = json.loads((checkpoint / "state.json").read_text())
    change(checkpoint, values)
    (checkpoint / "state.json").write_text(json.dumps(values))
    remake_manifest(checkpoint)
    with pytest.raises(SystemExit) as caught:
        resume(tmp_path, tiny_bert, topics_jsonl)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_resume_refuses_when_every_checkpoint_is_damaged(
    whole: Path, tmp_path: Path, tiny_bert: str, topics_jsonl: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for manifest in run.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    before = (run / "metrics.jsonl").read_text()
    with pytest.raises(SystemExit):
        resume(tmp_path, tiny_bert, topics_jsonl)
    assert "every checkpoint in" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_text() == before


def test_resume_without_a_checkpoint_starts_fresh_and_says_so(
    tmp_path: Path, tiny_bert: str, topics_jsonl: str, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*SMALL.split(), "--max_tokens", "640", "--save_dir", str(tmp_path), "--run_name", "run"]
    main([tiny_bert, topics_jsonl, *words, "--resume"])
    assert "contains no checkpoint, so the run starts from the beginning" in capfd.readouterr().err
    assert (tmp_path / "run" / "sae" / "encoder.layer.0" / "cfg.json").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--k 5", "--k is 5 now and was 4"),
        ("--architecture batchtopk", "--architecture is batchtopk now and was topk"),
        ("--lr 0.01", "--lr is 0.01 now and was 0.001"),
        ("--shuffle_seed 1", "--shuffle_seed is 1"),
        ("--layers 3", "--layers is"),
        ("--batch_size 8", "--batch_size is 8"),
        ("--dead_window_tokens 9", "--dead_window_tokens is 9"),
        ("--buffer_tokens 128", "--buffer_tokens is 128"),
        ("--max_tokens 12800", "--max_tokens 12800 is less than"),
    ],
)
def test_settings_that_change_the_result_are_refused_by_name(
    words: str,
    named: str,
    whole: Path,
    tmp_path: Path,
    tiny_bert: str,
    topics_jsonl: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy(whole, tmp_path)
    before = fingerprint(tmp_path / "run")
    with pytest.raises(SystemExit) as caught:
        resume(tmp_path, tiny_bert, topics_jsonl, *words.split())
    assert caught.value.code == 2
    assert named in capsys.readouterr().err
    assert fingerprint(tmp_path / "run") == before


def test_another_text_or_model_is_refused(
    whole: Path, tmp_path: Path, tiny_bert: str, topics_jsonl: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copy(whole, tmp_path)
    other = tmp_path / "other.jsonl"
    other.write_text(Path(topics_jsonl).read_text().replace("yield", "wield"))
    with pytest.raises(SystemExit):
        resume(tmp_path, tiny_bert, str(other))
    assert "DATASET: its text is not" in capsys.readouterr().err
    model = tmp_path / "model"
    shutil.copytree(tiny_bert, model)
    from transformers import BertModel

    (model / "config.json").write_text((model / "config.json").read_text().replace('"gelu"', '"relu"'))
    with pytest.raises(SystemExit):
        resume(tmp_path, str(model), topics_jsonl)
    assert "MODEL: its configuration or code is not" in capsys.readouterr().err
    shutil.copy(Path(tiny_bert) / "config.json", model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "do_lower_case": False}))
    with pytest.raises(SystemExit):
        resume(tmp_path, str(model), topics_jsonl)
    assert "MODEL: its tokenizer is not" in capsys.readouterr().err
    changed = BertModel.from_pretrained(model)
    with torch.no_grad():
        changed.embeddings.word_embeddings.weight[5] += 1
    changed.save_pretrained(model)
    with pytest.raises(SystemExit):
        resume(tmp_path, str(model), topics_jsonl)
    assert "MODEL: its weights are not" in capsys.readouterr().err


def test_settings_that_cannot_change_the_result_are_taken(
    whole: Path, tmp_path: Path, tiny_bert: str, topics_jsonl: str
) -> None:
    run = copy(whole, tmp_path)
    copied = tmp_path / "renamed.jsonl"
    shutil.copy(topics_jsonl, copied)
    words = "--log_every 7 --save_every 1000 --eval_every 3 --dead_percentage_threshold 0.2"
    resume(tmp_path, tiny_bert, str(copied), *words.split(), "--split", "train[:100%]", "--text_column", "text")
    assert fingerprint(run) == fingerprint(whole)


def test_more_tokens_go_on_and_the_consequence_is_said(
    whole: Path, tmp_path: Path, tiny_bert: str, topics_jsonl: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    resume(tmp_path, tiny_bert, topics_jsonl, "--max_tokens", str(2 * STEPS * 128))
    assert (
        f"the decay of the learning rate moves to the last {LR_DECAY_SHARE:.0%} of the longer run"
        in capfd.readouterr().err
    )
    train = [r for r in records(run) if r["kind"] == "train"]
    assert [r["step"] for r in train] == list(range(1, 2 * STEPS + 1))
    undone = train[STEPS]["saes"]["encoder.layer.0"]["lr"]
    assert undone == pytest.approx(0.001 * lr_factor(STEPS, 2 * STEPS, STEPS // 20)), "the decay of the first end"
    before = fingerprint(run)
    resume(tmp_path, tiny_bert, topics_jsonl, "--max_tokens", str(2 * STEPS * 128))
    assert fingerprint(run) == before, "the same command resumes the longer run"


def test_a_longer_run_keeps_rates_and_windows_that_followed_its_length(
    tmp_path: Path, tiny_bert: str, topics_jsonl: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # Two widths, so that neither stands in the settings as a number.
    words = [tiny_bert, topics_jsonl, *SMALL.split(), "--save_dir", str(tmp_path), "--run_name", "run", "--lr", "auto"]
    words = [word for word in words if word not in ("--num_latents", "64")]
    words += ["--hookpoints", "encoder.layer.0.intermediate", "encoder.layer.1", "--max_tokens"]
    main([*words, "1280"])
    before = {name: state(tmp_path / "run")["resolved"][name] for name in ("lrs", "dead_windows", "warmup_steps")}
    assert len(set(before["lrs"].values())) == 2
    main([*words, "5120", "--resume"])
    after = state(tmp_path / "run")["resolved"]
    assert {name: after[name] for name in before} == before
    assert state(tmp_path / "run")["step"] == 80


def test_a_rate_that_was_given_is_not_left_for_the_rule_s(
    tmp_path: Path, tiny_bert: str, topics_jsonl: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = short_run(tmp_path, tiny_bert, topics_jsonl)
    main(words)
    with pytest.raises(SystemExit) as caught:
        main([*words, "--lr", "auto", "--resume"])
    assert caught.value.code == 2
    assert "--lr is auto now and was 0.001 when the run began" in capsys.readouterr().err


def state(run: Path) -> dict[str, Any]:
    """The values in the last checkpoint."""
    found: dict[str, Any] = json.loads((sorted((run / "checkpoints").glob("step_*"))[-1] / "state.json").read_text())
    return found


def test_a_config_of_the_run_resumes_it(whole: Path, tmp_path: Path) -> None:
    run = copy(whole, tmp_path)
    main(["--config", str(run / "config.yaml"), "--save_dir", str(tmp_path), "--run_name", "run", "--resume"])
    assert fingerprint(run) == fingerprint(whole)


def short_run(out: Path, model: str, text: str) -> list[str]:
    """The command line of 20 steps into ``out/run``."""
    return [model, text, *SMALL.split(), "--max_tokens", "1280", "--save_dir", str(out), "--run_name", "run"]


def test_finetuning_starts_where_the_saved_sae_ended(tmp_path: Path, tiny_bert: str, topics_jsonl: str) -> None:
    words = [tiny_bert, topics_jsonl, *SMALL.split(), "--lr", "4e-3", "--save_dir", str(tmp_path)]
    main([*words, "--max_tokens", "19200", "--run_name", "first"])
    path = str(tmp_path / "first" / "sae" / "encoder.layer.0")
    main([*words, "--max_tokens", "640", "--run_name", "second", "--finetune", path, "--lr", "1e-6"])
    last = next(r for r in records(tmp_path / "first") if r["kind"] == "final")["saes"]["encoder.layer.0"]
    train = [r["saes"]["encoder.layer.0"]["fvu"] for r in records(tmp_path / "second") if r["kind"] == "train"]
    assert sum(train) / len(train) == pytest.approx(last["fvu"], rel=0.15), "the folding was undone"
