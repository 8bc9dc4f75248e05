"""Benchmarks run end to end with tiny sizes: processes, samples, results files and tables."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks import quality, ranks
from benchmarks.recipe import task_runner
from benchmarks.recipe.activations import SITES, Site
from benchmarks.recipe.sweep import next_rates
from benchmarks.recipe.worker import train_and_score
from benchmarks.report import BEGIN, END, fill_page, format_report
from benchmarks.results_file import MAX_LINE, write_results
from benchmarks.summary import read_rows

ROOT = Path(__file__).parents[2]


def test_quick_run_writes_results_and_tables(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--kernels", "reference", "--rounds", "1"]
    command += ["--cases", "step", "end_to_end", "--only", "F=200", "BERT", "--threads", "1", "--out", str(out)]
    # Other tests run at the same time, and no sample may be dropped because of them.
    command += ["--max_other_cpu", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=True)

    results = json.loads(out.read_text())
    assert results["machine"]["cpu"]
    assert "torch" in results["versions"]
    assert [case["group"] for case in results["cases"]] == ["step", "end_to_end"]
    for case in results["cases"]:
        for row in read_rows(case):
            assert "error" not in row.tool, row.tool
            assert row.tool["peak_bytes"] > 0
            assert row.tool["seconds_per_step"] == [row.rounds[0]]
            assert row.rounds[0] > 0

    table = format_report(results)
    assert "| saetrain reference fp32 | " in table
    assert "speed over the floor, bf16 model" in table
    assert table.strip() == done.stdout.strip()

    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    fill_page(page, table)
    assert page.read_text() == f"before\n{BEGIN}\n\n{table}\n{END}\nafter\n"


def test_quick_run_of_several_processes(tmp_path: Path) -> None:
    out = tmp_path / "ranks.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "benchmarks.ranks", "--quick", "--rounds", "1", "--precisions", "fp32", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=True)
    metrics = json.loads(out.read_text())["metrics"]
    assert ranks.format_table(metrics) in done.stdout
    weak = metrics["fp32"]["weak"]
    # Each step communicates the gradients of both weights and little else: one message of flags, two of tensors.
    assert 1 < weak["bytes"] / metrics["fp32"]["bound_bytes"] < 1.1
    assert (weak["calls"], weak["control_calls"]) == (2, 1)
    assert 0 < weak["waiting"] < 1


def test_results_files_are_compact(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    results = {"figures": [{"fvu": 0.123456789123, "steps": [400] * 5}] * 20, "long": ["x" * MAX_LINE, 1.0]}
    write_results(path, results)
    assert len(path.read_text().splitlines()) == 20 + 8
    assert json.loads(path.read_text())["figures"][0]["fvu"] == 0.12345679
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]
    for file in (ROOT / "benchmarks" / "results").glob("*.json"):
        write_results(path, json.loads(file.read_text()))
        assert path.read_text() == file.read_text(), f"{file.name} has another format"


def test_performance_page_holds_the_measurements() -> None:
    page, results = (ROOT / "benchmarks" / "performance.md").read_text(), ROOT / "benchmarks" / "results"
    assert f"{BEGIN}\n\n{format_report(json.loads((results / 'peers.json').read_text()))}\n{END}" in page
    for path in results.glob("quality-*.json"):
        assert quality.format_table(json.loads(path.read_text())["metrics"]) in page


def test_page_holds_the_measured_scaling_of_several_processes() -> None:
    page = (ROOT / "benchmarks" / "distributed.md").read_text()
    results = json.loads((ROOT / "benchmarks" / "results" / "ranks.json").read_text())
    assert ranks.format_table(results["metrics"]) in page


def test_sweep_ends_once_neighbours_are_known() -> None:
    tried: dict[float, float] = {}
    order = []
    while rates := next_rates(tried, 0.01):
        order.append(rates)
        # The best of these is 0.04.
        tried.update({rate: abs(math.log2(rate / 0.035)) for rate in rates})
    assert order == [[0.01], [0.02, 0.005], [0.04], [0.08]]
    assert next_rates({0.02: 1.0, 0.01: float("inf"), 0.04: float("inf")}, 0.5) == [], "a rate that fails is worse"


@pytest.fixture
def small_site(monkeypatch: pytest.MonkeyPatch, tiny_bert: str, topics_jsonl: str) -> None:
    """Let the site minilm-3 mean a small model and a short text."""
    site = Site(lambda: Path(tiny_bert), lambda folder: Path(topics_jsonl), 3, 32)
    monkeypatch.setitem(SITES, "minilm-3", site)


@pytest.mark.usefixtures("small_site")
def test_quick_comparison_of_recipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each run is a process of its own."""
    words = ["--tools", "saetrain", "--latents", "96", "--k", "4", "--tokens", "256", "--steps", "4", "12"]
    words += ["--seeds", "1", "2", "--processes", "2"]
    results = run_recipe("benchmarks.recipe.__main__", tmp_path, words, monkeypatch)
    printed = capsys.readouterr().out
    assert len(results["runs"]) == 4
    fvu = {(run["task"]["steps"], run["task"]["seed"]): run["result"]["fvu"] for run in results["runs"]}
    assert fvu[12, 1] < fvu[4, 1] < 1
    assert fvu[12, 1] != fvu[12, 2]
    assert "| 12 | saetrain | " in printed
    assert "`--lr auto`" in printed
    run_recipe("benchmarks.recipe.__main__", tmp_path, words, monkeypatch)
    assert capsys.readouterr().out == printed[printed.index("| steps") :], "finished tasks must not run again"


@pytest.mark.usefixtures("small_site")
def test_quick_sweep_of_the_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The runs are in this process, because the comparison of recipes covers processes."""
    monkeypatch.setattr(task_runner, "run_task", lambda task, activations, threads: train_and_score(activations, task))
    words = ["--sites", "minilm-3", "--latents", "96", "--k", "4", "--tokens", "256", "--steps", "12", "--batches"]
    results = run_recipe("benchmarks.recipe.rule", tmp_path, [*words, "--processes", "1"], monkeypatch)
    printed = capsys.readouterr().out
    rates = sorted(run["task"]["lr"] for run in results["runs"] if "lr" in run["task"])
    assert len(rates) >= 3
    assert all(b / a == pytest.approx(2) for a, b in pairwise(rates))
    assert "| minilm-3 | 96 | 4 | 256 | 12 | " in printed
    assert "Within 0.004 of the best fixed rate: " in printed


def run_recipe(module: str, folder: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a comparison over few tokens, and return its results file."""
    out = folder / "results.json"
    sizes = ["--train_tokens", "4000", "--held_out_tokens", "500"]
    monkeypatch.setattr(sys, "argv", [module, *words, *sizes, "--folder", str(folder), "--out", str(out)])
    importlib.import_module(module).main()
    return json.loads(out.read_text())
