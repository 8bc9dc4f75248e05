"""The benchmark runs end to end in tiny sizes: processes, samples, results file, tables, and the page's section."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks import predict, ranks
from benchmarks.report import BEGIN, END, fill, report
from benchmarks.rows import rows

ROOT = Path(__file__).parents[2]


def test_a_quick_run_leaves_results_and_tables(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--paths", "reference", "--rounds", "1"]
    command += ["--cases", "step", "end_to_end", "--only", "F=200", "BERT", "--threads", "1", "--out", str(out)]
    # Other tests run beside this one, and no sample may be dropped for that.
    command += ["--others_limit", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=True)

    results = json.loads(out.read_text())
    assert results["machine"]["cpu"]
    assert "torch" in results["cases"][0]["tools"][0]["versions"]
    assert [case["group"] for case in results["cases"]] == ["step", "end_to_end"]
    for case in results["cases"]:
        for row in rows(case):
            assert "error" not in row.tool, row.tool
            assert all(sample["peak_bytes"] > 0 and min(sample["seconds"]) > 0 for sample in row.tool["samples"])
            assert row.tool["samples"]

    table = report(results)
    assert table.strip() == done.stdout.strip()
    assert "| ours reference fp32 | " in table
    assert "share of the speed of the floor, bf16 model" in table

    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    fill(page, table)
    assert page.read_text() == f"before\n{BEGIN}\n\n{table}\n{END}\nafter\n"


def test_a_quick_run_of_several_processes(tmp_path: Path) -> None:
    out = tmp_path / "ranks.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "benchmarks.ranks", "--quick", "--rounds", "1", "--precisions", "fp32", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=True)
    figures = json.loads(out.read_text())["figures"]
    assert ranks.table(figures) in done.stdout
    weak = figures["fp32"]["weak"]
    # Both weights' gradients once a step, and little else, in one message of numbers and two of tensors.
    assert 1 < weak["bytes"] / figures["fp32"]["bound_bytes"] < 1.1
    assert (weak["calls"], weak["control_calls"]) == (2, 1)
    assert 0 < weak["waiting"] < 1


def test_the_page_of_several_processes_holds_what_was_measured() -> None:
    page = (ROOT / "docs" / "distributed.md").read_text()
    assert ranks.table(json.loads((ROOT / "benchmarks" / "results" / "ranks.json").read_text())["figures"]) in page
    assert predict.table() in page
