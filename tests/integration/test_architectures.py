"""Architectures in one file each, named on the command line: train, resume, several ranks, evaluate, save, load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import saetrain
from saetrain.cli import main
from tests.architectures.abs_topk import AbsTopK
from tests.integration.test_resume import fingerprint
from tests.processes import ForkedCommand, finish

ARCHITECTURES = {
    "relu_l1": "tests.architectures.relu_l1:ReluL1",
    "abs_topk": "tests.architectures.abs_topk:AbsTopK",
    "threshold": "tests.architectures.threshold:Threshold",
}
WORDS = (
    "--layers 1 --k 6 --num_latents 96 --batch_size 4 --ctx_len 64 --max_tokens 10240 --buffer_tokens 2048 --lr 0.003 "
    "--eval_tokens 1000 --log_every 1 --save_every 20 --loss_tokens 512 --bootstrap 20 --compute_dtype float32"
)
STEPS = 40

pytestmark = pytest.mark.slow


def records(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return ARCHITECTURES[request.param]


@pytest.fixture(scope="module")
def run_dir(architecture: str, tiny_bert: str, topics_jsonl: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("architecture")
    words = [tiny_bert, topics_jsonl, "--architecture", architecture, *WORDS.split(), "--save_dir", str(folder)]
    main([*words, "--run_name", "run"])
    return folder / "run"


def test_the_loss_falls_and_the_verdict_is_written(run_dir: Path) -> None:
    lines = records(run_dir)
    losses = [line["saes"]["encoder.layer.1"]["loss"] for line in lines if line["kind"] == "train"]  # type: ignore[index]
    assert len(losses) == STEPS
    assert losses[-1] < 0.85 * losses[0]
    assert [line["kind"] for line in lines][-2:] == ["final", "assessment"]
    assessment = json.loads((run_dir / "final_assessment.json").read_text())
    assert "encoder.layer.1" in json.dumps(assessment)


def test_saved_and_loaded_it_gives_the_same_codes(run_dir: Path, architecture: str) -> None:
    folder = run_dir / "sae" / "encoder.layer.1"
    sae = saetrain.load(folder)
    assert f"{type(sae.coder).__module__}:{type(sae.coder).__name__}" == architecture
    assert sorted(path.name for path in folder.iterdir()) == ["cfg.json", "sae_weights.safetensors"]
    assert sae.coder.state_dict().keys() == load_file(folder / "sae_weights.safetensors").keys()
    x = torch.randn(50, sae.coder.d_in, generator=torch.Generator().manual_seed(0))
    codes = sae.encode(x)
    assert len(codes) == 50
    assert torch.equal(codes.select_tokens(slice(10, 20)).to_dense(), codes.to_dense()[10:20])
    assert torch.equal(codes.l0_per_token(), (codes.to_dense() != 0).sum(dim=1))
    torch.testing.assert_close(sae.decode(codes), codes.to_dense() @ sae.coder.W_dec + sae.coder.b_dec)
    # The code of a token does not depend on the batch.
    torch.testing.assert_close(sae.encode(x[3:4]).to_dense(), codes.to_dense()[3:4])


def test_formats_that_cannot_hold_it_are_logged(
    run_dir: Path, capsys: pytest.CaptureFixture[str], tiny_bert: str, topics_jsonl: str, architecture: str
) -> None:
    words = [tiny_bert, topics_jsonl, "--architecture", architecture, *WORDS.split(), "--save_dir", str(run_dir.parent)]
    main([*words, "--run_name", "run", "--resume", "--assess", "false"])
    printed = capsys.readouterr().err
    for name in ("SAELens", "sparsify"):
        assert f"encoder.layer.1: not saved for {name}: saetrain writes only TopK in this format" in printed


def test_resumed_it_ends_with_the_same_bits(
    run_dir: Path, tmp_path: Path, tiny_bert: str, topics_jsonl: str, architecture: str
) -> None:
    words = [tiny_bert, topics_jsonl, "--architecture", architecture, *WORDS.split(), "--save_dir", str(tmp_path)]
    words += ["--run_name", "run", "--assess", "false"]
    process = ForkedCommand(words)
    path = tmp_path / "run" / "checkpoints" / "step_000000020" / "manifest.json"
    while not path.exists():
        assert process.poll() is None, process.read_output()
    process.kill()
    process.wait()
    finish(ForkedCommand([*words, "--resume"]))
    assert fingerprint(tmp_path / "run") == fingerprint(run_dir)


def test_evaluate_imports_it_only_on_request(
    run_dir: Path, tmp_path: Path, architecture: str, topics_jsonl: str
) -> None:
    words = ["evaluate", str(run_dir), "--out", str(tmp_path), "--eval_tokens", "500"]
    output = finish(ForkedCommand([*words]), 2)
    assert f"pass --architecture {architecture}" in output
    assert "Traceback" not in output
    finish(ForkedCommand([*words, "--architecture", architecture]))
    assert (tmp_path / "final_assessment.json").exists()


def test_train_in_python_takes_a_class_and_returns_the_saes(tmp_path: Path, tiny_bert: str, topics_jsonl: str) -> None:
    settings = {"layers": [1], "k": 6, "num_latents": 96, "batch_size": 4, "ctx_len": 64, "max_tokens": 2560}
    settings |= {"buffer_tokens": 1024, "eval_tokens": 500, "save_dir": str(tmp_path), "loss_tokens": 128}
    saes = saetrain.train(tiny_bert, topics_jsonl, architecture=AbsTopK, **settings)
    assert list(saes) == ["encoder.layer.1"]
    assert isinstance(saes["encoder.layer.1"].coder, AbsTopK)
    with pytest.raises(
        saetrain.SaetrainError, match=r"saetrain\.train: there is no setting 'layer'\. Did you mean layers"
    ):
        saetrain.train(tiny_bert, topics_jsonl, layer=1)
