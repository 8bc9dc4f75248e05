"""``saetrain demo`` at a small size prints what is stored on disk."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import saetrain
from saetrain.cli import main
from saetrain.runs import demo
from tests.processes import ForkedCommand

SMALL = "--eval_tokens 3000 --fit_tokens 2000 --loss_tokens 0 --bootstrap 10 --buffer_tokens 4096"


@pytest.fixture
def small_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the demo score on fewer tokens and train in a forked process."""

    def train(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        assert command[1:3] == ["-m", "saetrain"]
        process = ForkedCommand([*command[3:], *SMALL.split()])
        return subprocess.CompletedProcess(command, process.wait(), process.read_output())

    monkeypatch.setattr(demo.subprocess, "run", train)


@pytest.mark.usefixtures("small_demo")
def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A single test, because the demo takes long and must not run once per check."""
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **options: None, raising=False)
    main(["demo", "--folder", str(tmp_path), "--max_tokens", "8192", "--texts", "150"])
    printed = capsys.readouterr().out
    texts_are_real_distinct_and_enough(tmp_path)
    the_printed_command_can_be_copied(printed, tmp_path)
    figures_are_those_on_disk(printed, tmp_path)
    shown_latents_follow_the_rule(printed, tmp_path)
    page = tmp_path / "minilm_layer3" / "report.html"
    assert f"Open {page}." in printed
    assert page.stat().st_size > 500_000


def texts_are_real_distinct_and_enough(folder: Path) -> None:
    rows = {split: read(folder / "text" / f"{split}.jsonl") for split in ("train", "test")}
    texts = [" ".join(row["text"].casefold().split()) for split in rows.values() for row in split]
    assert len(texts) == len(set(texts)) > 5000
    assert sum(map(len, texts)) > 2_000_000
    assert 0.05 < len(rows["test"]) / len(texts) < 0.15


def the_printed_command_can_be_copied(printed: str, folder: Path) -> None:
    from saetrain.cli import parse_train

    command = re.search(r"^\S+ -m saetrain (.*?)\n\n", printed, re.DOTALL | re.MULTILINE)
    assert command is not None, printed
    config = parse_train(command[1].replace("\\\n", " ").split())
    assert (config.dataset[0], config.where.layers, config.sae.k) == (str(folder / "text"), (3,), 32)


def figures_are_those_on_disk(printed: str, folder: Path) -> None:
    path = folder / "minilm_layer3" / "sae" / "encoder.layer.3"
    figures = json.loads((path / "cfg.json").read_text())["saetrain"]["held_out_figures"]
    assert figures["l0"] == pytest.approx(32, abs=0.01)
    assert re.search(rf"fvu +{figures['fvu']:.3f} ", printed), printed
    assert re.search(r"l0 +32\.00 .* of 3,072", printed), printed
    for file in ("cfg.json", "sae_weights.safetensors", "sae.safetensors"):
        assert f"kB  {path / file}" in printed
    assert saetrain.load(path).num_latents == 3072


def shown_latents_follow_the_rule(printed: str, folder: Path) -> None:
    shown = re.findall(r"^  latent (\d+): fires on (\d+) tokens .* strength ([\d.]+)\n((?:.*«.*\n)+)", printed, re.M)
    assert 1 <= len(shown) <= 6, printed
    assert len({number for number, *_ in shown}) == len(shown)
    known = {row["name"] for row in read(folder / "text" / "test.jsonl")}
    for _, count, strength, lines in shown:
        values = [float(line.split()[0]) for line in lines.splitlines()]
        assert 5 <= int(count) <= 200
        assert len(values) == 4
        assert values == sorted(values, reverse=True)
        assert sum(values) / 4 == pytest.approx(float(strength), abs=0.02)
        for line in lines.splitlines():
            assert re.search(r"«[^»]+»", line)
            assert any(line.endswith("  " + name) for name in known), line


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--texts", "0"], "--texts 0: must be at least 1"), ([], "the model of the demo is missing; run pip install")],
)
def test_what_the_demo_lacks_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as caught:
        main(["demo", *words])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"saetrain: error: {message}")
