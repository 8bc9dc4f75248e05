"""Architectures in one file each, named on the command line: train, resume, several ranks, evaluate, save, load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import saetrain
from saetrain.cli import main
from saetrain.coders import CODERS, architecture_name
from saetrain.types import Site
from tests.architectures.abs_topk import AbsTopK
from tests.integration.test_resume import fingerprint
from tests.processes import ForkedCommand, finish

ARCHITECTURES = {
    "tests.architectures.relu_l1:ReluL1": "encoder.layer.1",
    "tests.architectures.abs_topk:AbsTopK": "encoder.layer.1",
    "tests.architectures.threshold:Threshold": "encoder.layer.1.intermediate",
    "batchtopk": "encoder.layer.1",
}
"""{architecture: hookpoint}; Threshold is a transcoder, whose output is twice as wide as its input."""
WORDS = (
    "--k 6 --num_latents 96 --batch_size 4 --ctx_len 64 --max_tokens 10240 --buffer_tokens 2048 --lr 0.003 "
    "--eval_tokens 1000 --log_every 1 --save_every 20 --loss_tokens 512 --bootstrap 20 --compute_dtype float32"
)
STEPS = 40

pytestmark = pytest.mark.slow


def records(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def hookpoint(architecture: str) -> str:
    return ARCHITECTURES[architecture]


@pytest.fixture(scope="module")
def words(architecture: str, hookpoint: str, tiny_bert: str, topics_jsonl: str) -> list[str]:
    """The command without the run's folder."""
    return [tiny_bert, topics_jsonl, "--architecture", architecture, "--hookpoints", hookpoint, *WORDS.split()]


@pytest.fixture(scope="module")
def run_dir(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("architecture")
    main([*words, "--save_dir", str(folder), "--run_name", "run"])
    return folder / "run"


def test_the_loss_falls_and_the_verdict_is_written(run_dir: Path, hookpoint: str) -> None:
    lines = records(run_dir)
    losses = [line["saes"][hookpoint]["loss"] for line in lines if line["kind"] == "train"]  # type: ignore[index]
    assert len(losses) == STEPS
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert [line["kind"] for line in lines][-2:] == ["final", "assessment"]
    assessment = json.loads((run_dir / "final_assessment.json").read_text())
    assert assessment["saes"][hookpoint]
    assert "ce_recovered_mean" in json.dumps(assessment) or "final_hidden_error" in json.dumps(assessment)


def test_saved_and_loaded_it_gives_the_same_codes(run_dir: Path, architecture: str, hookpoint: str) -> None:
    folder = run_dir / "sae" / hookpoint
    sae = saetrain.load(folder)
    assert architecture_name(type(sae.coder)) == architecture
    weights = sorted(folder.glob("*.safetensors"))
    held = {"batchtopk": ["sae_weights.safetensors", "saetrain.safetensors"]}.get(
        architecture, ["saetrain.safetensors"]
    )
    assert [path.name for path in weights] == held
    assert {path.name for path in folder.iterdir()} == {"README.md", "cfg.json", "config.yaml", *held}
    assert sae.coder.state_dict().keys() == {name for path in weights for name in load_file(path)}
    x = torch.randn(50, sae.coder.d_in, generator=torch.Generator().manual_seed(0))
    codes = sae.encode(x)
    assert len(codes) == 50
    assert torch.equal(codes.select_tokens(slice(10, 20)).to_dense(), codes.to_dense()[10:20])
    assert torch.equal(codes.l0_per_token(), (codes.to_dense() != 0).sum(dim=1))
    torch.testing.assert_close(sae.decode(codes), codes.to_dense() @ sae.coder.W_dec + sae.coder.b_dec)
    # The code of a token does not depend on the batch.
    torch.testing.assert_close(sae.encode(x[3:4]).to_dense(), codes.to_dense()[3:4])


def test_formats_that_cannot_hold_it_are_logged(
    run_dir: Path, capsys: pytest.CaptureFixture[str], words: list[str], architecture: str, hookpoint: str
) -> None:
    main([*words, "--save_dir", str(run_dir.parent), "--run_name", "run", "--resume", "--assess", "false"])
    printed = capsys.readouterr().err
    for name in ("sparsify",) if architecture in CODERS else ("SAELens", "sparsify"):
        assert f"{hookpoint}: not saved for {name}: saetrain writes only topk" in printed
    assert printed.count("not saved for") == (1 if architecture in CODERS else 2)


def test_resumed_it_ends_with_the_same_bits(run_dir: Path, tmp_path: Path, words: list[str]) -> None:
    words = [*words, "--save_dir", str(tmp_path), "--run_name", "run", "--assess", "false"]
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
    # saetrain's own architectures need no import.
    is_own_code = architecture not in CODERS
    output = finish(ForkedCommand([*words]), 2 if is_own_code else 0)
    assert (f"pass --architecture {architecture}" in output) == is_own_code
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


def test_a_transcoder_reads_the_input_of_a_module(tmp_path: Path, tiny_bert: str, topics_jsonl: str) -> None:
    architecture = "tests.architectures.threshold:Threshold"
    words = [tiny_bert, topics_jsonl, "--architecture", architecture, "--hookpoints", "encoder.layer.[01].intermediate"]
    main([*words, *WORDS.split(), "--save_dir", str(tmp_path), "--run_name", "run"])
    folder = tmp_path / "run" / "sae" / "encoder.layer.0.intermediate"
    sae = saetrain.load(folder)
    assert (sae.coder.d_in, sae.coder.d_out) == (32, 64)
    assert sae.metadata.site == Site(("encoder.layer.0.intermediate:in",), ("encoder.layer.0.intermediate",))
    (encoded,) = sae.encode_text("assert is a keyword")
    assert encoded.codes.n_latents == 96
    figures = json.loads((tmp_path / "run" / "final_assessment.json").read_text())["saes"]
    assert set(figures) == {f"encoder.layer.{layer}.intermediate" for layer in range(2)}


def test_a_start_that_cannot_keep_the_groups_is_refused(tmp_path: Path, tiny_bert: str, topics_jsonl: str) -> None:
    words = [tiny_bert, topics_jsonl, "--architecture", "batchtopk", "--layers", "1", *WORDS.split()]
    words += ["--max_tokens", "1024", "--assess", "false", "--save_dir", str(tmp_path), "--run_name", "run"]
    output = finish(ForkedCommand([*words, "--group_tokens", "96"]), 2)
    assert "error: --group_tokens 96: a micro-batch of 256 activations (batch_size 4 x ctx_len 64 x 1 ranks)" in output
    assert "pass a multiple of 3 as --batch_size, or another --group_tokens" in output
    finish(ForkedCommand(words))
    before = fingerprint(tmp_path / "run")
    words = [*words, "--resume", "--max_tokens", "2048"]
    output = finish(ForkedCommand([*words, "--batch_size", "2", "--grad_acc_steps", "2"]), 2)
    assert "error: --resume: --group_tokens 256: a micro-batch of 128 activations" in output
    assert "pass a multiple of 4 as --batch_size, and --grad_acc_steps to keep the optimizer step" in output
    output = finish(ForkedCommand([*words, "--group_tokens", "128"]), 2)
    assert "--group_tokens is 128 now and was 256" in output
    assert "Traceback" not in output
    assert fingerprint(tmp_path / "run") == before
    finish(ForkedCommand(words))
    assert "group_tokens: 256" in (tmp_path / "run" / "config.yaml").read_text()
    assert len(records(tmp_path / "run")) > 8
