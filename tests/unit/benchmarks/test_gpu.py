"""The GPU benchmark without a GPU, and sparsify's step, with which it compares."""

from __future__ import annotations

import os
import site
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear

pytest.importorskip("triton")

from benchmarks.gpu import kernel_checks
from benchmarks.gpu.steps import SKEWED, STEP_BUILDERS, build_coder, builders_for
from benchmarks.gpu.timing import floor_ms
from benchmarks.peers import sparsify_gpu
from saetrain.training.steps.self_check import StepShape, StepVariant

ROOT = Path(__file__).parents[3]
ABSENT = ("tyro", "datasets", "pyarrow", "pandas", "wandb", "tensorboard", "rich", "psutil", "matplotlib", "pytest")
SMALL = StepShape(12, 40, 3, 50)


@pytest.mark.slow
def test_without_gpu_it_checks_kernels_and_lists_measurements(tmp_path: Path) -> None:
    """The environment has only torch, transformers, triton, numpy, safetensors and their dependencies."""
    for folder in {*site.getsitepackages(), *sys.path}:
        for path in Path(folder).glob("*") if Path(folder).name == "site-packages" else []:
            hidden = path.name.startswith(("__editable__", "_", *ABSENT)) or path.suffix == ".pth"
            if not hidden and not (tmp_path / path.name).exists():
                (tmp_path / path.name).symlink_to(path)
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    page = (ROOT / "docs" / "performance.md").read_text()
    (command,) = (line for line in page.splitlines() if line.startswith("benchmarks/gpu.sh"))
    done = subprocess.run(
        [*command.split(), "--out", str(tmp_path / "gpu.json")],
        cwd=ROOT, env={**env, "PYTHON": str(python)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("  correct: update against autograd") == 8
    assert done.stdout.count("(at most 1e-03)") == 6
    assert done.stdout.count("(at most 5e-02)") == 2
    assert "no GPU: nothing is timed" in done.stdout
    assert "step D=768 F=3072 k=32 N=4096: triton; torch; sparsify (without its kernels)" in done.stdout
    assert not (tmp_path / "gpu.json").exists()


def test_wrong_updates_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    off = {StepVariant("sparse"): 2e-3, StepVariant("dense"): float("nan"), StepVariant("dense", use_bf16=True): 2e-3}
    monkeypatch.setattr(kernel_checks, "measure_distances", lambda *_, **__: off)
    assert [check["ok"] for check in kernel_checks.check_kernels("cpu", quick=True)] == [False, False, True]


def test_floor_counts_product_and_weights() -> None:
    shape = StepShape(100, 1000, 3, 50)
    assert floor_ms(shape, {"flops_per_s": 1e9, "bytes_per_s": 1e30}) == pytest.approx(2 * 50 * 100 * 1000 / 1e6)
    assert floor_ms(shape, {"flops_per_s": 1e30, "bytes_per_s": 1e9}) == pytest.approx(200_000 * 26 / 1e6)


def test_gradients_of_sparsify_match_autograd() -> None:
    coder = build_coder(SMALL, "cpu")
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weight, bias = coder.W_enc.detach().T.contiguous().requires_grad_(), coder.b_enc.detach().clone().requires_grad_()
    values, indices = sparsify_gpu.Encode.apply(x, weight, bias, 3)
    values.pow(2).sum().backward()
    grads = [each.grad for each in (x, weight, bias)]
    for each in (x, weight, bias):
        each.grad = None
    linear(x, weight, bias).relu().gather(1, indices).pow(2).sum().backward()
    for found, each in zip(grads, (x, weight, bias), strict=True):
        torch.testing.assert_close(found, each.grad)


@pytest.mark.slow
def test_every_implementation_trains() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(50, 3, generator=generator) @ torch.randn(3, 12, generator=generator)
    peer = sparsify_gpu.Step(build_coder(SMALL, "cpu"), None)
    fvu = [peer(x) for _ in range(200)]
    assert fvu[-1] < 0.7 * fvu[0]
    for name in builders_for(SMALL, SMALL):
        if name != SKEWED:
            step = builders_for(SMALL, SMALL)[name](SMALL, "cpu")
            step(x)
            step(x)
            assert 0 < step.check_steps().get("fired", 1) <= 1


def test_skipped_steps_are_detected() -> None:
    step = STEP_BUILDERS["torch"](SMALL, "cpu")
    x = torch.randn(50, 12)
    step(x)
    step(x * float("nan"))
    with pytest.raises(AssertionError, match="1 of 2 steps were applied"):
        step.check_steps()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        ("--out nowhere/gpu.json", {}, "--out nowhere/gpu.json: the folder nowhere does not exist"),
        ("--minutes 0", {}, "--minutes 0.0: must be positive"),
        ("--quick", {"SPARSIFY": "nowhere"}, "SPARSIFY=nowhere: "),
        ("--shapes", {}, "unrecognized arguments: --shapes"),
    ],
)
def test_wrong_options_are_reported_at_once(
    words: str, environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    env = {**os.environ, **environment, "PYTHON": sys.executable}
    command = [str(ROOT / "benchmarks" / "gpu.sh"), *words.split()]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_missing_packages_are_named(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    python.chmod(0o755)
    command, env = [str(ROOT / "benchmarks" / "gpu.sh")], {**os.environ, "PYTHON": str(python)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "lacks torch transformers triton numpy safetensors; set PYTHON to another" in done.stderr
