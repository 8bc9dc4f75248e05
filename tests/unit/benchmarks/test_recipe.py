"""The comparison of recipes: scores, tables, pages, and which runs are repeated."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import saetrain_runner
from benchmarks.recipe import ablation, defaults, page, rule, task_runner
from benchmarks.recipe.components import AXES, COMPONENTS, IDLE
from benchmarks.recipe.report import comparison_table, draw_comparison
from benchmarks.recipe.results import Results
from benchmarks.recipe.saetrain import fit_sae
from benchmarks.recipe.sweep import TOOLS, Comparison, is_settled
from benchmarks.recipe.task import Batches, Task
from benchmarks.recipe.worker import score_sae
from saetrain.coders import base
from saetrain.optim import build, schedule
from saetrain.training.steps import native

MAKE = functools.partial(Task, site="minilm-3", latents=96, k=4, tokens=16)
TASK = MAKE(tool="saetrain", steps=8, seed=1)


def results(folder: Path) -> Results:
    return Results(folder / "results.json", "benchmarks.recipe", ["--seeds", "1"])


def result(fvu: float, lr: float = 0.01, never_fired: float = 0.0) -> dict[str, Any]:
    return {"fvu": fvu, "never_fired": never_fired, "dead_by_window": 0.25, "l0": 4.0, "seconds": 1.0, "lr": lr}


def test_scores_match_their_definition() -> None:
    """Rows are halved; latent 0 fires everywhere, 1 where the row's first entry is positive, 2 nowhere."""
    held_out = torch.randn(3000, 5, generator=torch.Generator().manual_seed(0)) + 1

    def rebuild(rows: Tensor) -> tuple[Tensor, Tensor]:
        first = rows[:, 0] > 0
        return rows / 2, torch.stack([torch.ones_like(first), first, torch.zeros_like(first)], dim=1)

    found = score_sae(rebuild, held_out, [-held_out.abs()[:7]])
    error = (held_out / 2).double().square().sum()
    variance = (held_out - held_out.double().mean(dim=0)).square().sum()
    assert found["fvu"] == pytest.approx(float(error / variance))
    assert found["never_fired"] == pytest.approx(1 / 3)
    assert found["dead_by_window"] == pytest.approx(2 / 3), "latent 1 is silent on the last batches"
    assert found["l0"] == pytest.approx(1 + float((held_out[:, 0] > 0).double().mean()))


def test_each_pass_of_batches_shuffles_all_rows() -> None:
    rows = torch.arange(50.0).unsqueeze(1)
    batches = list(Batches(rows, dataclasses.replace(TASK, steps=6)))
    passes = [torch.cat(batches[:3]), torch.cat(batches[3:])]
    assert all(len(set(each.flatten().tolist())) == 48 for each in passes)
    assert not torch.equal(*passes)
    assert not torch.equal(batches[0], Batches(rows, dataclasses.replace(TASK, seed=2))[0])


def filled(found: Results, gap: float) -> Comparison:
    """A comparison of two seeds that is complete for ours and sparsify's Adam, and where sae-lens fails."""
    comparison = Comparison(MAKE, (8,), (1, 2))
    for task in comparison.default_tasks(TOOLS[0], 8):
        found.add(task, result(0.1 + task.seed / 1000))
    adam = next(tool for tool in TOOLS if tool.name == "sparsify adam")
    for lr, fvu in ((0.004, 0.3), (0.008, 0.1 + gap), (0.016, 0.3)):
        for task in comparison.default_tasks(adam, 8)[: 2 if lr == 0.008 else 1]:
            found.add(dataclasses.replace(task, lr=lr), result(fvu + task.seed / 1000, lr, 0.5))
    for task in comparison.default_tasks(next(tool for tool in TOOLS if tool.name == "sae-lens"), 8):
        found.add(task, {"error": "ValueError: too short"})
    return comparison


@pytest.mark.parametrize("gap", [0.02, -0.02])
def test_table_compares_saetrain_with_the_best_tool(tmp_path: Path, gap: float) -> None:
    found = results(tmp_path)
    text = comparison_table(filled(found, gap), found).replace("\n", " ")
    assert "| 8 | saetrain | 0.01, `--lr auto` | 0.1015 (0.1010 to 0.1020) |" in text
    assert f"| 8 | sparsify adam | 0.008, best | {0.1015 + gap:.4f}" in text
    assert "| 8 | sae-lens | none, default | fails: ValueError: too short |" in text
    word = "below" if gap > 0 else "above"
    sentence = (
        f"After 8 steps, saetrain's FVU is 0.0200 {word} that of the best other tool (sparsify adam at 0.008, best). "
    )
    assert sentence + "Its share of latents that never fire is 0.0%, compared with 50.0%." in text


def test_plot_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = results(tmp_path)
    draw_comparison(filled(found, 0.02), found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_results_round_trip_with_command_and_commit(tmp_path: Path) -> None:
    first = results(tmp_path)
    first.add(TASK, result(0.5))
    (entry,) = results(tmp_path).runs
    assert entry[0] == TASK
    assert entry[1]["commit"]
    assert '"python -m benchmarks.recipe --seeds 1"' in (tmp_path / "results.json").read_text()


def test_rule_is_measured_again_after_its_rate_changes(tmp_path: Path) -> None:
    found, tasks = results(tmp_path), [TASK, dataclasses.replace(TASK, latents=192)]
    found.add(tasks[0], result(0.5, rule.rule_rate(tasks[0])))
    found.add(tasks[1], result(0.5, 2 * rule.rule_rate(tasks[1])))
    rule.discard_stale(tasks, found)
    assert [task for task, _ in found.runs] == [tasks[0]]


def test_results_of_other_commits_are_named_or_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = results(tmp_path)
    found.runs.append((TASK, {**result(0.5), "commit": "abcdef0"}))
    found.discard_if_again([TASK], again=False)
    assert "some results are from other commits (abcdef0; now" in capsys.readouterr().out
    assert found.get(TASK)
    found.discard_if_again([TASK], again=True)
    assert found.get(TASK) is None


def test_defaults_and_rule_use_the_same_batches() -> None:
    default, auto = defaults.default_tasks("minilm-3")
    assert (default.lr, default.k, default.latents, default.tokens) == (0.001, 192, 12288, 2048)
    assert default.options == {"weight_decay": 0.0}
    assert auto == dataclasses.replace(default, lr=None, options={})


def test_each_component_has_a_row(tmp_path: Path) -> None:
    found = results(tmp_path)
    for steps in ablation.FACTORS:
        for component in (None, *COMPONENTS):
            for number, task in enumerate(ablation.ablation_tasks(component, steps)):
                found.add(task, result(0.2 - number / 100, task.lr or 0.0))
    text = ablation.ablation_table(found)
    assert {AXES, IDLE} <= COMPONENTS.keys()
    assert all(f"| {component} | " in text for component in ("(complete recipe)", *COMPONENTS))
    assert text.count("0.1800") == text.count("0.2000") == len(COMPONENTS) + 1


@pytest.mark.parametrize("component", COMPONENTS)
def test_each_component_can_be_switched_off(component: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(200, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 7.0)
    for module, names in (
        (build, ("BETAS", "ENCODER_LR_RATIO")),
        (schedule, ("LR_DECAY_SHARE",)),
        (native, ("BETAS", "ENCODER_LR_RATIO")),
        (base, ("ENCODER_INIT_NORM",)),
        (base.SparseCoder, ("updates_idle_latents",)),
        (saetrain_runner, ("DEFAULT_DEAD_BIAS_LIFT",)),
    ):
        for name in names:
            # The component is switched on again after the test.
            monkeypatch.setattr(module, name, getattr(module, name))
    task = dataclasses.replace(TASK, latents=100, k=2, steps=80, lr=0.01)
    found = []
    for options in ({}, {"without": component}):
        rebuild, _ = fit_sae(dataclasses.replace(task, options=options), Batches(rows, task))
        found.append(rebuild(rows)[0])
    assert not torch.allclose(*found, rtol=1e-3, atol=1e-3)


def test_sweep_is_settled_once_neighbours_are_known() -> None:
    assert not is_settled({})
    assert not is_settled({0.01: 0.2, 0.02: 0.1})
    assert is_settled({0.01: 0.2, 0.02: 0.1, 0.04: 0.3})


@pytest.mark.parametrize("path", page.PAGES, ids=lambda path: path.parent.name)
def test_pages_hold_the_tables_of_the_results(path: Path) -> None:
    assert page.fill_tables(path) == path.read_text()


def test_killed_run_leaves_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killer = tmp_path / "python"
    killer.write_text(f"#!{sys.executable}\nimport os\nos.kill(os.getpid(), 9)\n")
    killer.chmod(0o755)
    monkeypatch.setattr(task_runner, "find_python", lambda tool: killer)
    with pytest.raises(SystemExit, match="ended by signal 9"):
        task_runner.run_task(TASK, tmp_path, 1)
