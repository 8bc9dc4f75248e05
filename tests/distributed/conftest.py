"""Real process groups: saetrain under torchrun, and what its runs leave behind."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

STEPS = 50
SIZES = (
    "--k 4 --num_latents 64 --ctx_len 32 --eval_tokens 400 --assess false --log_every 1 --compute_dtype float32 "
    "--buffer_tokens 2048 --dead_window_tokens 600"
)
ENDS_S = 60
"""Seconds in which the others must end when one process is gone."""


class Launcher:
    """Starts runs below ``folder``."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.home = folder, folder
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(cache)}

    def start(
        self,
        processes: int,
        name: str,
        words: Sequence[str],
        *,
        restarts: int = 0,
        program: Sequence[str] = (),
        agent: Sequence[str] = (),
    ) -> subprocess.Popen[str]:
        """``processes`` of them; one runs without torchrun.

        ``program`` stands in the place of ``-m saetrain``, ``agent`` in that of torchrun's own words.
        """
        # Of a flag that is given twice the last one counts.
        run = [*(program or ("-m", "saetrain")), *words[:2], *SIZES.split(), *words[2:]]
        run += ["--save_dir", str(self.folder), "--run_name", name]
        launch = ["-m", "torch.distributed.run", *(agent or ("--standalone", "--nproc_per_node", str(processes)))]
        command = [sys.executable, *(launch if processes > 1 else ())]
        if restarts:
            command += ["--max_restarts", str(restarts), "--monitor_interval", "0.1"]
        # torchrun takes a program's file as it is, Python its own words.
        return subprocess.Popen(
            [*command, *run],
            cwd=self.home,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, processes: int, name: str, words: Sequence[str]) -> Path:
        """Start and wait for the end; gives the run's folder."""
        ended(self.start(processes, name, words), 0)
        return self.folder / name


@pytest.fixture(scope="session")
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def launcher(tmp_path: Path, datasets_cache: Path) -> Launcher:
    return Launcher(tmp_path, datasets_cache)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def ended(process: subprocess.Popen[str], code: int | None, within: float = 300) -> str:
    """What the process printed; ``code`` None: any but 0."""
    try:
        output, _ = process.communicate(timeout=within)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"not at an end within {within} s: {process.communicate()[0]}") from None
    assert process.returncode == code if code is not None else process.returncode, output
    return output


def workers(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """{rank: process} of a torchrun."""
    children = psutil.Process(process.pid).children()
    return {int(child.environ()["RANK"]): child for child in children if "RANK" in child.environ()}


def steps_done(run: Path) -> int:
    """Last step in the metrics file, whole lines only."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    while steps_done(run) < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)


def weights(run: Path) -> dict[str, torch.Tensor]:
    """{SAE/tensor: value} of every SAE that the run left."""
    out = {
        f"{path.parent.relative_to(run / 'sae')}/{name}": value
        for path in sorted((run / "sae").rglob("sae.safetensors"))
        for name, value in load_file(path).items()
    }
    assert out
    return out


def bits(run: Path) -> dict[str, str]:
    """The same as hashes."""
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in weights(run).items()}


def records(run: Path) -> list[dict[str, Any]]:
    """The metrics' lines."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_run(one: Path, several: Path, tolerance: float = 1e-5, steps: int = STEPS) -> None:
    """Weights to a relative ``tolerance``, and every figure of every step."""
    expected, found = weights(one), weights(several)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        error = float((found[name] - value).norm() / value.norm())
        assert error < tolerance, (name, error)
    lines = list(zip(records(one), records(several), strict=True))
    assert len(lines) > steps // 2
    for before, after in lines:
        assert [before[key] for key in ("kind", "step", "tokens")] == [after[key] for key in ("kind", "step", "tokens")]
        for sae, figures in before["saes"].items():
            compared = {name: value for name, value in figures.items() if not name.endswith("_random")}
            assert after["saes"][sae] == pytest.approx(
                {**after["saes"][sae], **compared}, rel=20 * tolerance, abs=2e-6
            ), sae
