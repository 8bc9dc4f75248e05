"""Runs in which a loss jumps or is not finite: stopped, or gone on with, and what is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from saetrain.cli import main
from saetrain.training.sae_state import SaeState
from saetrain.training.steps.base import MicroBatch
from tests.integration.test_interrupted import short_run
from tests.integration.test_resume import last_checkpoint, records


def poisoned(monkeypatch: pytest.MonkeyPatch, step: int, factor: float) -> None:
    """Make the activations of one step large (or not finite) behind the buffer, as a broken model run would."""
    take, calls = SaeState.forward_backward, iter(range(1, 10_000))

    def micro_step(self: SaeState, batch: MicroBatch, ctx: Any) -> None:
        take(self, MicroBatch.of_sae(batch.x_ND * factor) if next(calls) == step else batch, ctx)

    monkeypatch.setattr(SaeState, "forward_backward", micro_step)


@pytest.mark.parametrize("factor", [50.0, float("nan"), float("inf")])
def test_a_spike_stops_the_run_and_keeps_the_last_checkpoint(
    factor: float,
    tmp_path: Path,
    tiny_bert: str,
    topics_jsonl: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    poisoned(monkeypatch, 17, factor)
    words = short_run(tmp_path, tiny_bert, topics_jsonl)
    with pytest.raises(SystemExit) as caught:
        main([*words, "--save_every", "10"])
    assert caught.value.code == 2
    assert "the loss of step 17 is" in capsys.readouterr().err
    facts = json.loads((tmp_path / "run" / "spike.json").read_text())
    assert (facts["step"], facts["sae"]) == (17, "encoder.layer.0")
    assert len(facts["shards"]) == 16
    assert last_checkpoint(tmp_path / "run") == 10
    assert [r["step"] for r in records(tmp_path / "run")] == list(range(1, 17))


def test_weights_that_are_ruined_end_the_run_and_are_not_saved(
    tmp_path: Path, tiny_bert: str, topics_jsonl: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate far too high ruins the weights in one update, which the next loss shows."""
    words = short_run(tmp_path, tiny_bert, topics_jsonl)
    words += ["--save_every", "1", "--lr", "1e12", "--lr_warmup_steps", "0"]
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([*words, "--resume", "--on_spike", "skip"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "10 steps in a row were skipped, so the weights are ruined" in said
    assert "Traceback" not in said
    assert not list((tmp_path / "run").glob("sae/*/cfg.json"))
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*"))
    assert left
    assert left[-1] <= "step_000000002", "nothing is saved behind a step that was left out"


def test_of_two_checkpoints_the_one_before_a_spike_goes(
    tmp_path: Path,
    tiny_bert: str,
    topics_jsonl: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    poisoned(monkeypatch, 17, float("nan"))
    words = short_run(tmp_path, tiny_bert, topics_jsonl)
    with pytest.raises(SystemExit):
        main([*words, "--save_every", "8"])
    assert "The checkpoint of step 16 may be the cause, so it is set aside" in capsys.readouterr().err
    assert last_checkpoint(tmp_path / "run") == 8
    assert (tmp_path / "run" / "checkpoints" / "suspect_step_000000016").exists()


def test_a_spike_can_be_skipped(
    tmp_path: Path,
    tiny_bert: str,
    topics_jsonl: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    poisoned(monkeypatch, 17, 50.0)
    words = short_run(tmp_path, tiny_bert, topics_jsonl)
    main([*words, "--on_spike", "skip"])
    assert "the step is skipped" in capfd.readouterr().err
    fvu = {r["step"]: r["saes"]["encoder.layer.0"]["fvu"] for r in records(tmp_path / "run") if r["kind"] == "train"}
    assert fvu[17] > 100
    assert fvu[18] < 1.5, "the weights did not take the step"


@pytest.mark.parametrize("save_every", [8, 1000])
def test_in_a_grid_a_spike_ends_one_sae_and_the_others_finish(
    save_every: int,
    tmp_path: Path,
    tiny_bert: str,
    topics_jsonl: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*short_run(tmp_path, tiny_bert, topics_jsonl), "--save_every", str(save_every)]
    words += ["--assess", "true", "--report", "false", "--feature_tokens", "0", "--k", "4"]
    main([*words, "--run_name", "alone"])
    # Each step takes one call per SAE, in their order, so this is the second SAE's in step 17.
    poisoned(monkeypatch, 2 * 17, float("nan"))
    with pytest.raises(SystemExit) as caught:
        main([*words, "8"])
    assert caught.value.code == 3
    said = capsys.readouterr()
    kept = 8 if save_every == 8 else 16
    ended = f"this SAE ends here with the weights of step {kept}, and the others continue (--on_spike stop)"
    assert ended in said.err
    assert "1 of 2 SAEs ended at a loss spike (encoder.layer.0/k8 at step 17)" in said.err
    run = tmp_path / "run"
    described = json.loads((run / "sae" / "encoder.layer.0" / "k8" / "cfg.json").read_text())["saetrain"]
    assert (described["steps"], described["diverged_step"]) == (kept, 17)
    verdicts = json.loads((run / "final_assessment.json").read_text())["saes"]
    assert verdicts["encoder.layer.0/k8"]["verdict"] == "diverged"
    assert f"diverged at step 17; these are the weights of step {kept}" in said.out
    last = [r["saes"] for r in records(run) if r["kind"] == "train"][-1]
    assert list(last) == ["encoder.layer.0/k4"]
    weights = "encoder.layer.0/sae_weights.safetensors"
    assert (run / "sae" / "encoder.layer.0" / "k4" / "sae_weights.safetensors").read_bytes() == (
        tmp_path / "alone" / "sae" / weights
    ).read_bytes()


def test_a_resumed_grid_leaves_an_ended_sae_alone(
    tmp_path: Path, tiny_bert: str, topics_jsonl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*short_run(tmp_path, tiny_bert, topics_jsonl), "--save_every", "8", "--k", "4", "8"]
    with monkeypatch.context() as patch:
        poisoned(patch, 2 * 17, float("nan"))
        with pytest.raises(SystemExit):
            main(words)
    weights = tmp_path / "run" / "sae" / "encoder.layer.0" / "k8" / "sae_weights.safetensors"
    before = weights.read_bytes()
    with pytest.raises(SystemExit) as caught:
        main([*words, "--resume"])
    assert caught.value.code == 3
    assert weights.read_bytes() == before
