"""Places for fuzz tests: a tiny model, a run and a folder of tokens, made once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tests.preloaded  # noqa: F401 (forks need no imports)
from saetrain.cli import parse_command, parse_evaluate
from saetrain.config import CompareConfig, TokenizeConfig
from tests.fuzz.harness import cases, check_command

TRAIN = (
    "--k 4 --num_latents 64 --batch_size 2 --ctx_len 32 --eval_tokens 300 --max_tokens 640 --device cpu "
    "--kernels torch --loss_tokens 64 --bootstrap 2 --fit_tokens 300 --dtype float32"
)


# The first use of a parser takes long.
parse_command(CompareConfig, "compare", ["run"])
parse_command(TokenizeConfig, "tokenize", ["model", "text", "out"])
parse_evaluate(["sae"])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the number of cases of each test, also of those that ran in other processes."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    counts = {
        report.nodeid.split("::")[-1]: dict(report.user_properties)["cases"]
        for report in reports
        if dict(getattr(report, "user_properties", ())).get("cases")
    }
    for name, count in counts.items():
        terminalreporter.write_line(f"{name}: {count} cases")
    if counts:
        terminalreporter.write_line(f"fuzz tests: {sum(counts.values())} cases in all")


@pytest.fixture(autouse=True)
def _report_cases(request: pytest.FixtureRequest) -> Iterator[None]:
    before = len(cases)
    yield
    request.node.user_properties.append(("cases", len(cases) - before))


@pytest.fixture(scope="session")
def one_layer(tmp_path_factory: pytest.TempPathFactory, minilm: str) -> Path:
    """Folder of a BERT of one layer and width 16."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("fuzz-model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    BertModel(BertConfig(**sizes, max_position_embeddings=64)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, one_layer: Path, topics: list[str]) -> Path:
    """A finished run with checkpoints, metrics, an SAE and an assessment; its text is next to it."""
    folder = tmp_path_factory.mktemp("fuzz-run")
    rows = "".join(json.dumps({"text": text[:4000]}) + "\n" for text in topics[:12])
    (folder / "text.jsonl").write_text(rows)
    words = [str(one_layer), "text.jsonl", *TRAIN.split(), "--save_every", "5", "--save_dir", ".", "--run_name", "run"]
    assert check_command(words, folder, may_write=["run"]).code == 0
    return folder / "run"


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder to run commands in."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)
