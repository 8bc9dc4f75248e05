"""The ready-made pipelines run to their ends at a small size, and end where something in them fails."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import saetrain
from saetrain.config import config_class, flag_types
from saetrain.training.trainer import TrainSettings

ROOT = Path(__file__).parents[2]
TRAIN = "Train_sae_script.sh"
MULTI = "Train_sae_scripts_multiGPU.sh"
STUDY = "Train_sae_scripts_experiment.sh"
BOTH = "Train_sae_scripts_experiment_single_gpu_comparison.sh"
ALL = (TRAIN, MULTI, STUDY, BOTH)
SIZES = {"LAYERS": "0", "MAX_TOKENS": "512", "K": "4", "NUM_LATENTS": "64", "BATCH_SIZE": "2", "CTX_LEN": "32"}
FLAGS = ["--eval_tokens", "300", "--fit_tokens", "300", "--loss_tokens", "64", "--bootstrap", "4", "--log_every", "2"]
LAYER = "encoder.layer.0"
STUB = """#!/usr/bin/env bash
echo "$*" >> calls
echo "${OMP_NUM_THREADS:-none}" >> threads
code=$(sed -n "$(wc -l < calls)p" codes 2> /dev/null)
exit "${code:-0}"
"""
"""Stands for Python: writes down what it was given, and exits with the next of the ``codes``, or 0."""

Start = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def start(tmp_path: Path, tiny_bert: str, topics_jsonl: str) -> Start:
    """Runs a script in an empty folder, on a CPU."""

    def run(script: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHON": sys.executable,
            "PYTHONPATH": str(Path(inspect.getfile(saetrain)).parents[1]),
            "HF_DATASETS_CACHE": str(tmp_path / "cache"),
            "MODEL": tiny_bert,
            "DATASET": topics_jsonl,
            "N_GPUS": "0",
            **SIZES,
            **variables,
        }
        command = [str(ROOT / "scripts" / script), *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)

    return run


@pytest.fixture
def calls(tmp_path: Path, start: Start) -> Callable[..., list[str]]:
    """What a script would run, with a stub in Python's place."""
    stub = tmp_path / "stub"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def run(script: str, *words: str, code: int = 0, **variables: str) -> list[str]:
        unset = dict.fromkeys(("LAYERS", "MAX_TOKENS", "K", "NUM_LATENTS", "BATCH_SIZE", "CTX_LEN"), "")
        done = start(script, *words, PYTHON=str(stub), **{**unset, "MODEL": "m", "DATASET": "d", **variables})
        assert done.returncode == code, done.stderr
        return (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []

    return run


def whole(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def rows(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["saes"]


def held_against(row: dict[str, Any], run: Path) -> None:
    """A row of a table holds what the run's own assessment says."""
    entry = json.loads((run / "final_assessment.json").read_text())["saes"][row["sae"]]
    assert (row["run"], row["verdict"]) == (run.name, entry["verdict"])
    assert row["figures"]["explained_variance"]["value"] == entry["figures"]["explained_variance"]["value"]
    assert row["figures"]["dead_below_threshold"]["value"] == entry["figures"]["dead_below_threshold"]["value"]
    assert row["tokens_per_second"] > 0


def test_training_ends_with_a_summary(start: Start, tmp_path: Path) -> None:
    printed = whole(start(TRAIN, *FLAGS))
    run = tmp_path / "output" / "tiny-bert_sae"
    (row,) = rows(run / "summary.json")
    held_against(row, run)
    assert re.search(rf"^tiny-bert_sae +{LAYER} .* {row['verdict']} *$", printed, re.MULTILINE)
    assert (run / "sae" / LAYER / "cfg.json").exists()


@pytest.mark.soak
def test_several_processes(start: Start, tmp_path: Path) -> None:
    """As the second run of the script that compares one process with several."""
    printed = whole(start(MULTI, *FLAGS, PROCESSES="2", SAVE_DIR=str(tmp_path / "o u t"), RUN_NAME="multi"))
    (row,) = rows(tmp_path / "o u t" / "multi" / "summary.json")
    held_against(row, tmp_path / "o u t" / "multi")
    assert re.search(rf"^multi +{LAYER} .* {row['verdict']} *$", printed, re.MULTILINE)


@pytest.mark.soak
def test_dead_latent_study(start: Start, tmp_path: Path) -> None:
    printed = whole(start(STUDY, *FLAGS, LRS="0.002", AUXK_ALPHAS="0 0.03125", RUN_NAME="study"))
    study = tmp_path / "output" / "study"
    names = ["auxk_alpha0", "auxk_alpha0.03125"]
    table = rows(study / "comparison.json")
    for row, name in zip(table, names, strict=True):
        held_against(row, study / name)
    assert [row["settings"] for row in table] == [{"auxk_alpha": 0.0}, {"auxk_alpha": 0.03125}]
    assert f"all SAEs: SAE {LAYER}, model" in printed
    assert "lr 0.002" in " ".join(printed.split())


def test_one_process_and_several_compute_the_same(start: Start, tmp_path: Path) -> None:
    words = ["--compute_dtype", "float32", *FLAGS]
    done = start(BOTH, *words, RUN_NAME="both", GRAD_ACC_STEPS="2", PROCESSES="2")
    whole(done)
    study = tmp_path / "output" / "both"
    one, several = rows(study / "comparison.json")
    held_against(one, study / "one_process")
    held_against(several, study / "several_processes")
    for name, figure in one["figures"].items():
        assert several["figures"][name]["value"] == pytest.approx(figure["value"], rel=1e-4), name
    config = yaml.safe_load((study / "several_processes" / "config.yaml").read_text())
    assert (config["batch_size"], config["grad_acc_steps"]) == (2, 1)


def test_one_process_on_both_sides_is_said(calls: Callable[..., list[str]], start: Start) -> None:
    assert len(calls(BOTH, PROCESSES="1")) == 3
    assert "both runs use one process" in start(BOTH, "--dry_run", PYTHON="true", PROCESSES="1").stderr


@pytest.mark.parametrize("script", [TRAIN, MULTI])
def test_what_the_package_refuses_ends_the_script(start: Start, script: str) -> None:
    assert "--layrs: no such flag. Did you mean --layers" in refused(start(script, "--layrs", "3"))


@pytest.mark.parametrize("script", ALL)
def test_a_failing_command_ends_the_script_with_its_exit_code(
    calls: Callable[..., list[str]], tmp_path: Path, script: str
) -> None:
    (tmp_path / "codes").write_text("7\n")
    assert len(calls(script, code=7)) == 1


@pytest.mark.parametrize("script", [MULTI, BOTH])
def test_an_interpreter_that_is_missing_ends_the_script_with_the_shell_s_code(start: Start, script: str) -> None:
    done = start(script, PYTHON="/nonexistent", N_GPUS="")
    assert done.returncode == 127, done.stderr
    assert "N_GPUS=" not in done.stderr


@pytest.mark.parametrize(("script", "commands"), [(TRAIN, 2), (MULTI, 2), (STUDY, 3), (BOTH, 3)])
def test_a_failing_comparison_does_too(
    calls: Callable[..., list[str]], tmp_path: Path, script: str, commands: int
) -> None:
    (tmp_path / "codes").write_text("0\n" * (commands - 1) + "5\n")
    assert len(calls(script, code=5)) == commands


def test_variables_become_flags(calls: Callable[..., list[str]]) -> None:
    variables = {
        "LAYERS": "3 6", "MAX_TOKENS": "9", "K": "4", "EXPANSION_FACTOR": "8", "NUM_LATENTS": "64", "BATCH_SIZE": "5",
        "GRAD_ACC_STEPS": "7", "CTX_LEN": "32", "LR": "auto", "LOG_TO_WANDB": "true", "N_GPUS": "1",
    }  # fmt: skip
    train, *_ = calls(TRAIN, "--shuffle_seed", "1", **variables, SAVE_DIR="o", RUN_NAME="r")
    assert train == (
        "-m saetrain m d --layers 3 6 --max_tokens 9 --k 4 --expansion_factor 8 --num_latents 64 --batch_size 5 "
        "--grad_acc_steps 7 --ctx_len 32 --lr auto --log_to_wandb true --save_dir o --run_name r --shuffle_seed 1"
    )


def test_what_is_not_set_is_left_to_the_package_but_the_rate(calls: Callable[..., list[str]]) -> None:
    assert calls(TRAIN, N_GPUS="", EVAL_DATASET="e") == [
        "-m saetrain m d --lr auto --save_dir ./output --run_name m_sae",
        "-m saetrain evaluate ./output/m_sae --dataset e",
        "-m saetrain compare ./output/m_sae --out ./output/m_sae/summary.json",
    ]


@pytest.mark.parametrize(
    "words",
    ["--lr 0.1", "--lr=0.1", "--optimizer sgd", "--loss_fn kl", "--loss-fn=ce", "--finetune sae"],
)
def test_no_rate_is_chosen_for_a_run_that_the_rule_is_not_for(calls: Callable[..., list[str]], words: str) -> None:
    train, *_ = calls(TRAIN, *words.split(), N_GPUS="")
    assert "--lr auto" not in train


@pytest.mark.parametrize("words", ["--optimizer adam", "--loss_fn=mse", "--loss_fn fvu", "--run_name_like sgd"])
def test_the_rule_is_taken_where_it_holds(calls: Callable[..., list[str]], words: str) -> None:
    train, *_ = calls(TRAIN, *words.split(), N_GPUS="")
    assert "--lr auto" in train


@pytest.mark.parametrize("words", ["", "--optimizer sgd", "--loss-fn=ce", "--finetune sae"])
def test_a_study_tries_the_rule_where_it_holds(calls: Callable[..., list[str]], words: str) -> None:
    *runs, _ = calls(STUDY, *words.split(), AUXK_ALPHAS="0", N_GPUS="1")
    rates = [call.split("--lr ")[1].split(" --")[0] for call in runs]
    assert rates == (["0.001", "0.004"] if words else ["0.001 auto"])


def test_lists_span_a_grid(calls: Callable[..., list[str]]) -> None:
    lists = {"LRS": "1e-3 2e-3", "KS": "4 8", "NUM_LATENTS_LIST": "64", "N_GPUS": "1"}
    run, _ = calls(STUDY, AUXK_ALPHAS="0", **lists)
    assert run.startswith("-m saetrain m d --auxk_alpha 0 --lr 1e-3 2e-3 --k 4 8 --num_latents 64 --save_dir")
    assert run.endswith("--run_name auxk_alpha0")
    _, _, *runs, last = calls(STUDY, "--loss_fn", "kl", AUXK_ALPHAS="0", **lists)
    names = [f"auxk_alpha0_lr{lr}_k{k}_num_latents64" for lr in ("1e-3", "2e-3") for k in (4, 8)]
    assert [call.split("--run_name ")[1].split()[0] for call in runs] == names
    assert runs[1].startswith("-m saetrain m d --auxk_alpha 0 --lr 1e-3 --k 8 --num_latents 64 --save_dir")
    assert last.split() == ["-m", "saetrain", "compare", *(f"./output/m_dead_latents/{name}" for name in names),
                            "--out", "./output/m_dead_latents/comparison.json"]  # fmt: skip


@pytest.mark.parametrize(
    ("batch", "steps", "processes", "share"),
    [("", "", 4, (1, 1)), ("8", "6", 4, (4, 3)), ("6", "2", 4, (3, 1)), ("1", "8", 8, (1, 1)), ("3", "1", 1, (3, 1))],
)
def test_processes_share_the_global_batch(
    calls: Callable[..., list[str]], batch: str, steps: str, processes: int, share: tuple[int, int]
) -> None:
    first, *_ = calls(MULTI, BATCH_SIZE=batch, GRAD_ACC_STEPS=steps, N_GPUS=str(processes))
    assert f"--nproc_per_node {processes} -m saetrain m d" in first
    # Of a flag that is given twice the last one counts.
    assert first.rindex(f"--batch_size {share[0]} --grad_acc_steps {share[1]}") == first.rindex("--batch_size")


def test_processes_share_the_cores(calls: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "nproc").write_text("#!/bin/sh\necho 9\n")
    (tmp_path / "nproc").chmod(0o755)
    calls(MULTI, N_GPUS="4", BATCH_SIZE="4", OMP_NUM_THREADS="", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert (tmp_path / "threads").read_text().split()[0] == "2"


def test_defaults_that_are_shared_are_the_package_s() -> None:
    text = (ROOT / "scripts" / "settings.sh").read_text()
    assert f"BATCH_SIZE:-{TrainSettings.batch_size}}}" in text
    assert f"GRAD_ACC_STEPS:-{TrainSettings.grad_acc_steps}}}" in text


@pytest.mark.parametrize(
    ("script", "words", "variables", "message"),
    [
        (MULTI, "", {"BATCH_SIZE": "3", "PROCESSES": "2"}, "can't be divided evenly among 2 processes"),
        (BOTH, "", {"BATCH_SIZE": "3", "PROCESSES": "2"}, "can't be divided evenly among 2 processes"),
        (MULTI, "", {"N_GPUS": "two"}, "N_GPUS=two: must be a whole number, at least 1"),
        (BOTH, "", {"PROCESSES": "0"}, "PROCESSES=0: must be a whole number, at least 1"),
        (MULTI, "", {"GRAD_ACC_STEPS": "a[$(exit 9)]"}, "must be a whole number, at least 1"),
        (MULTI, "--batch-size=3", {}, "--batch_size: set the variable BATCH_SIZE instead"),
        (BOTH, "--grad_acc_steps 3", {}, "--grad_acc_steps: set the variable GRAD_ACC_STEPS instead"),
        (TRAIN, "--run_name x", {}, "--run_name: set the variable RUN_NAME instead"),
        (STUDY, "--save-dir=x", {}, "--save_dir: set the variable SAVE_DIR instead"),
        (TRAIN, "--config x.yaml", {"MODEL": ""}, "--config: also set the variable MODEL"),
        (MULTI, "--config x.yaml", {"BATCH_SIZE": ""}, "--config: also set the variable BATCH_SIZE"),
    ],
)
def test_what_a_script_refuses(
    start: Start, tmp_path: Path, script: str, words: str, variables: dict[str, str], message: str
) -> None:
    error = refused(start(script, *words.split(), **variables))
    assert error.startswith(f"{script}: error: ")
    assert message in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("script", "commands"), [(TRAIN, 1), (MULTI, 1), (STUDY, 2), (BOTH, 2)])
def test_a_dry_run_compares_nothing(calls: Callable[..., list[str]], script: str, commands: int) -> None:
    assert len(calls(script, "--dry-run", EVAL_DATASET="e")) == commands


@pytest.mark.parametrize("script", ALL)
def test_help_and_page_name_every_variable(start: Start, tmp_path: Path, script: str) -> None:
    shown = whole(start(script, "--k", "3", "--help"))
    assert not list(tmp_path.iterdir())
    text = (ROOT / "scripts" / script).read_text() + (ROOT / "scripts" / "settings.sh").read_text()
    page = (ROOT / "docs" / "pipelines.md").read_text()
    used = set(re.findall(r"\$\{([A-Z][A-Z_]+|K):-", text)) - {"OMP_NUM_THREADS", "WANDB_RUN_GROUP"}
    named = set(re.findall(r"^  ([A-Z][A-Z_]+|K) {2,}", shown, re.MULTILINE))
    shared = {"N_GPUS", "PROCESSES"} if script in (TRAIN, STUDY) else set()
    assert used - shared == named
    assert {name for name in used if f"`{name}`" not in page} == set()
    assert f"`{script}`" in page


def test_flags_of_the_scripts_exist() -> None:
    given = set()
    for script in (ROOT / "scripts").glob("*.sh"):
        given |= set(re.findall(r"(?:setting|vary|settings\+=\() ?(--\w+)", script.read_text()))
    assert {flag[2:] for flag in given} <= set(flag_types(config_class("topk")))
    assert len(given) > 10
