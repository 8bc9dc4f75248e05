"""Whole runs by Triton's kernels: figures, spikes and resuming are those of the other kernels."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from saetrain.cli import main
from tests.integration.test_resume import fingerprint, last_checkpoint, records
from tests.integration.test_spikes import poisoned

# Small, for the interpreter is slow.
SMALL = "--k 2 --num_latents 16 --batch_size 1 --ctx_len 8 --eval_tokens 100 --buffer_tokens 32 --assess false "
SMALL += "--max_tokens 96 --log_every 100 --compute_dtype float32 --dead_window_tokens 15 --auxk_alpha 0.03"
STEPS = 12
HALF = ("--compute_dtype", "bfloat16")


def words(out: Path, model: str, text: str, name: str, kernels: str, *more: str) -> list[str]:
    device = ["--device", "cuda" if torch.cuda.is_available() else "cpu"]
    return [
        model,
        text,
        *SMALL.split(),
        *device,
        "--kernels",
        kernels,
        "--save_dir",
        str(out),
        "--run_name",
        name,
        *more,
    ]


def stopped(command: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 2


def last(run: Path) -> dict[str, float]:
    return dict(records(run)[-1]["saes"]["encoder.layer.0"])


def test_a_run_and_its_second_half_alone(tmp_path: Path, tiny_bert: str, topics_jsonl: str) -> None:
    """The same figures as by PyTorch's kernels, and resumed the same bits."""
    for name, kernels in (("triton", "triton"), ("torch", "torch")):
        main(words(tmp_path, tiny_bert, topics_jsonl, name, kernels, "--save_every", "6", *HALF))
    own, plain = last(tmp_path / "triton"), last(tmp_path / "torch")
    assert own["fvu"] == pytest.approx(plain["fvu"], rel=1e-2)
    assert own["l0"] == plain["l0"]
    whole = fingerprint(tmp_path / "triton")
    for path in (tmp_path / "triton" / "checkpoints").glob(f"step_*{STEPS}"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    assert last_checkpoint(tmp_path / "triton") == 6
    main(words(tmp_path, tiny_bert, topics_jsonl, "triton", "triton", "--save_every", "6", "--resume", *HALF))
    assert fingerprint(tmp_path / "triton") == whole


@pytest.mark.parametrize(("step", "due"), [(7, "--save_every"), (9, "--log_every"), (STEPS, "--save_every")])
def test_a_spike_stops_the_run_where_the_other_kernels_do(
    step: int, due: str, tmp_path: Path, tiny_bert: str, topics_jsonl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heard of two steps later, or where something is saved or logged before."""
    found: list[dict[str, Any]] = []
    for kernels in ("triton", "torch"):
        poisoned(monkeypatch, step, math.nan)
        stopped(words(tmp_path, tiny_bert, topics_jsonl, kernels, kernels, "--save_every", "4", due, "4"))
        monkeypatch.undo()
        found.append(json.loads((tmp_path / kernels / "spike.json").read_text()))
        assert found[-1]["step"] == step
    assert found[0]["shards"] == found[1]["shards"]
    kept = [sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir()) for name in ("triton", "torch")]
    assert kept[0] == kept[1]


def test_a_spike_that_is_skipped_leaves_the_same_behind(
    tmp_path: Path,
    tiny_bert: str,
    topics_jsonl: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for kernels in ("triton", "torch"):
        poisoned(monkeypatch, 7, math.nan)
        main(words(tmp_path, tiny_bert, topics_jsonl, kernels, kernels, "--on_spike", "skip"))
        monkeypatch.undo()
        assert "the loss of step 7 is nan; the step is skipped" in capfd.readouterr().err
    assert last(tmp_path / "triton")["fvu"] == pytest.approx(last(tmp_path / "torch")["fvu"], rel=1e-3)
