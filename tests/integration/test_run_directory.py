"""The run's folder: never overwritten by accident, said early when it can't be written, and --dry_run leaves none."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from saetrain.cli import main
from saetrain.runs import text_data

TINY = "--k 4 --num_latents 64 --batch_size 2 --ctx_len 32 --eval_tokens 500 --assess false --max_tokens 512"


def run(out: Path, model: str, data: str, *words: str) -> None:
    main([model, data, *TINY.split(), "--save_dir", str(out), "--run_name", "run", *words])


def refused(capsys: pytest.CaptureFixture[str], out: Path, *words: str) -> str:
    """The message of a run that exits with 2 before it loads a model that does not exist."""
    with pytest.raises(SystemExit) as caught:
        run(out, "no-such-model", "no-such-data", *words)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_an_existing_run_is_refused_and_overwrite_replaces_it(
    tmp_path: Path, tiny_bert: str, topics_jsonl: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, tiny_bert, topics_jsonl)
    (tmp_path / "run" / "mine.txt").write_text("x")
    capsys.readouterr()
    message = refused(capsys, tmp_path)
    assert "already exists and is not empty" in message
    assert "--resume" in message
    assert "--overwrite" in message
    run(tmp_path, tiny_bert, topics_jsonl, "--overwrite")
    assert (tmp_path / "run" / "mine.txt").exists(), "only what a run writes is deleted"


def test_metrics_without_a_checkpoint_are_set_aside_until_overwrite(
    tmp_path: Path, tiny_bert: str, topics_jsonl: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    run(tmp_path, tiny_bert, topics_jsonl)
    earlier = []
    for number in (1, 2):
        earlier.append((folder / "metrics.jsonl").read_text())
        shutil.rmtree(folder / "checkpoints")
        capfd.readouterr()
        run(tmp_path, tiny_bert, topics_jsonl, "--resume")
        kept = folder / f"metrics.jsonl.{number}"
        assert f"the metrics of the earlier start are kept in {kept}" in capfd.readouterr().err
    assert [(folder / f"metrics.jsonl.{number}").read_text() for number in (1, 2)] == earlier
    (folder / "metrics.jsonl.mine").write_text("x")
    run(tmp_path, tiny_bert, topics_jsonl, "--overwrite")
    assert [path.name for path in folder.glob("metrics.jsonl.*")] == ["metrics.jsonl.mine"]


def test_overwrite_deletes_nothing_unless_the_new_run_can_begin(
    tmp_path: Path, tiny_bert: str, topics_jsonl: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, tiny_bert, topics_jsonl)
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    refused(capsys, tmp_path, "--overwrite")
    with pytest.raises(SystemExit):
        run(tmp_path, tiny_bert, topics_jsonl, "--overwrite", "--k", "999999")
    with pytest.raises(SystemExit):
        run(tmp_path, tiny_bert, topics_jsonl, "--overwrite", "--finetune", "nowhere")
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == before


def test_a_folder_of_somebody_else_is_not_taken_for_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("mine: 1")
    for flag in ("--overwrite", "--resume"):
        assert "contains files but no run of saetrain" in refused(capsys, tmp_path, flag)


def test_a_failed_start_leaves_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_overwrite_that_was_cut_short_is_finished_by_the_next_start(
    tmp_path: Path, tiny_bert: str, topics_jsonl: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, tiny_bert, topics_jsonl, "--layers", "0", "2")
    # As a kill leaves it that comes when deleting has begun.
    (tmp_path / "run" / ".overwriting").touch()
    capsys.readouterr()
    run(tmp_path, tiny_bert, topics_jsonl, "--layers", "2", "--resume")
    said = capsys.readouterr()
    assert "was interrupted, so the run starts from the beginning" in said.err + said.out
    assert [path.name for path in (tmp_path / "run" / "sae").iterdir()] == ["encoder.layer.2"]
    assert not (tmp_path / "run" / ".overwriting").exists()


def test_overwrite_deletes_only_what_is_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    assert "contains files but no run of saetrain" in refused(capsys, tmp_path, "--overwrite")
    assert (tmp_path / "run" / "thesis.tex").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert "--save_dir" in refused(capsys, tmp_path / "file" / "below")


def test_names_are_made_from_model_layers_k_and_width(tmp_path: Path, tiny_bert: str, topics_jsonl: str) -> None:
    main([tiny_bert, topics_jsonl, *TINY.split(), "--save_dir", str(tmp_path), "--layers", "1", "5"])
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-bert_layer1-5_k4_f64"]


def test_dry_run_prints_the_plan_and_leaves_nothing(
    tmp_path: Path, tiny_bert: str, topics_jsonl: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(out, tiny_bert, topics_jsonl, "--dry_run", "--layers", "0", "3", "--lr", "5")
    printed = capsys.readouterr().out
    assert printed.count("that --lr auto would use for") == 1
    for word in ("encoder.layer.0", "encoder.layer.3", "memory", "disk", "steps", "tokens/s", "time"):
        assert word in printed
    assert "steps       8 of 64 tokens = 512 tokens" in printed
    phases = re.findall(r"^(?:time|    ) +(\d+):(\d\d)  (\w+)", printed, re.MULTILINE)
    names = ["reading", "filling", "training", "scoring", "in"]
    assert [phase for _, _, phase in phases] == names
    *each, total = (60 * int(minutes) + int(seconds) for minutes, seconds, _ in phases)
    assert total == pytest.approx(sum(each), abs=len(each))
    assert not out.exists()


def test_dry_run_of_a_large_text_estimates_from_a_sample(
    tmp_path: Path,
    tiny_bert: str,
    topics_jsonl: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokens = {}
    words = [
        tiny_bert,
        topics_jsonl,
        *TINY.split(),
        "--dry_run",
        "--save_dir",
        str(tmp_path / "out"),
        "--assess",
        "true",
        "--ablate_latents",
        "2",
    ]
    for size in (4_000_000, 200_000):
        monkeypatch.setattr(text_data, "DRY_RUN_BYTES", size)
        monkeypatch.setattr(text_data, "MIN_DRY_RUN_ROWS", 2)
        main(words)
        printed = capsys.readouterr()
        tokens[size] = int(re.search(r"^text +([\d,]+) tokens", printed.out, re.M)[1].replace(",", ""))  # type: ignore[index]
        assert bool(re.search(r"--dry_run tokenizes a sample of \d+ of \d+ rows", printed.err)) == (size < 4_000_000)
        for phase in (
            "assessing the SAEs next to baselines",
            "collecting features on 512 tokens",
            "ablating up to 2 latents per SAE",
            "writing the report",
        ):
            assert phase in printed.out
    assert tokens[200_000] == pytest.approx(tokens[4_000_000], rel=0.4)


def test_sparsify_layout_can_be_switched_off(tmp_path: Path, tiny_bert: str, topics_jsonl: str) -> None:
    run(tmp_path, tiny_bert, topics_jsonl, "--save_sparsify", "false")
    folder = tmp_path / "run" / "sae" / "encoder.layer.0"
    assert sorted(path.name for path in folder.iterdir()) == [
        "cfg.json",
        "config.yaml",
        "sae_weights.safetensors",
    ]
