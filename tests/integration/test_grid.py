"""Runs that train a grid of SAEs: each has the bits of a run that trains it alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from saetrain import load
from saetrain.cli import main
from tests.integration.test_resume import calibrate_on_few_tokens, records

SIZES = "--layers 0 1 --k 4 8 --batch_size 2 --ctx_len 32 --eval_tokens 500 --buffer_tokens 1024 --max_tokens 2560"
ARCHITECTURES = ["topk", "batchtopk", "matryoshka", "jumprelu", "standard", "abstopk"]
GRID = ["--architecture", *ARCHITECTURES, "--num_latents", "48", "64", "--lr", "auto"]
POINTS = [f"{name}_f{size}_k{k}" for k in (4, 8) for name in ARCHITECTURES for size in (48, 64)]
WEIGHTS = ("sae_weights.safetensors", "saetrain.safetensors")


def read_weights(sae: Path) -> list[bytes]:
    return [(sae / name).read_bytes() for name in WEIGHTS if (sae / name).exists()]


@pytest.fixture(scope="module")
def words(tiny_bert: str, topics_jsonl: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    calibrate_on_few_tokens()
    out = str(tmp_path_factory.mktemp("out"))
    return [tiny_bert, topics_jsonl, *SIZES.split(), *GRID, "--assess", "false", "--save_dir", out]


@pytest.fixture(scope="module")
def run(words: list[str]) -> Path:
    main([*words, "--run_name", "grid", "--save_every", "10"])
    return Path(words[-1]) / "grid"


def test_a_grid_trains_every_combination(run: Path) -> None:
    found = {path.parent.relative_to(run / "sae").as_posix() for path in run.rglob("cfg.json")}
    assert found == {f"encoder.layer.{layer}/{point}" for layer in (0, 1) for point in POINTS}
    sae = load(str(run / "sae" / "encoder.layer.1" / "jumprelu_f48_k8"))
    assert "architecture=jumprelu, d_in=32, d_sae=48, k=8" in repr(sae)
    last = [line["saes"] for line in records(run) if line["kind"] == "train"][-1]
    assert last.keys() == found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_sae_has_the_bits_of_a_run_with_its_settings(architecture: str, run: Path) -> None:
    point = f"{architecture}_f64_k4"
    settings = run / "sae" / "encoder.layer.0" / point / "config.yaml"
    content = yaml.safe_load(settings.read_text())
    assert (content["architecture"], content["k"], content["num_latents"], content["grid"]) == (architecture, 4, 64, [])
    main(["--config", str(settings), "--run_name", f"alone-{point}"])
    for layer in (0, 1):
        alone = run.parent / f"alone-{point}" / "sae" / f"encoder.layer.{layer}"
        assert read_weights(alone) == read_weights(run / "sae" / f"encoder.layer.{layer}" / point)


def test_a_resumed_grid_ends_with_the_same_bits(run: Path, words: list[str]) -> None:
    resumed = run.parent / "resumed"
    shutil.copytree(run, resumed)
    shutil.rmtree(resumed / "sae")
    last = sorted((resumed / "checkpoints").iterdir())[-1]
    shutil.rmtree(last)
    main([*words, "--run_name", "resumed", "--save_every", "10", "--resume"])
    for sae in (run / "sae").rglob("cfg.json"):
        place = sae.parent.relative_to(run)
        assert read_weights(sae.parent) == read_weights(resumed / place)


def test_a_changed_grid_is_not_resumed(run: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*words, "--k", "4", "16", "--run_name", "grid", "--resume"])
    assert caught.value.code == 2
    assert "--resume: --grid is" in capsys.readouterr().err


def test_a_dry_run_counts_every_sae(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main([*words, "--run_name", "planned", "--dry_run"])
    said = capsys.readouterr().out
    assert said.count("\nSAE  ") == 2 * len(POINTS)
    assert "encoder.layer.1/jumprelu_f48_k8: jumprelu, width 32, 48 latents, k 8" in said


def test_a_grid_that_does_not_fit_is_refused_with_a_split_that_does(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from saetrain.runs.train import memory

    total: list[int] = []
    count = memory.required_memory_bytes
    with monkeypatch.context() as patch:
        patch.setattr(memory, "required_memory_bytes", lambda *args: total.append(count(*args)) or total[-1])
        main([*words, "--run_name", "planned", "--dry_run"])
    capsys.readouterr()
    monkeypatch.setattr(memory, "available_memory_bytes", lambda device: max(total) - 1)
    with pytest.raises(SystemExit) as caught:
        main([*words, "--run_name", "planned", "--dry_run"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "48 SAEs of 48, 64 latents over 2 hookpoints: need about" in said
    assert "train the SAEs in 2 runs: (1) encoder.layer.0/topk_f48_k4" in said
