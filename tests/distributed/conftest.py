"""Real process groups: the ranks of a run as forked processes or under torchrun, and what its runs leave on disk."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.processes import ForkedCommand

STEPS = 30
SIZES = (
    "--k 4 --num_latents 64 --ctx_len 32 --eval_tokens 400 --assess false --log_every 1 --compute_dtype float32 "
    "--buffer_tokens 2048 --dead_window_tokens 600"
)
PEER_EXIT_S = 60
"""Seconds in which the other ranks must exit after one rank is gone."""


class Pollable(Protocol):
    """A process, or several."""

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""


class Ranks:
    """The processes of one run, by rank."""

    def __init__(self, commands: list[ForkedCommand]) -> None:
        self.commands = commands

    def poll(self) -> int | None:
        """Return the largest exit code, or None while a rank runs."""
        codes = [command.poll() for command in self.commands]
        return None if None in codes else max(code for code in codes if code is not None)

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to every rank."""
        for command in self.commands:
            command.send_signal(number)

    def finish(self, code: int | None = 0, timeout_s: float = 300) -> str:
        """Wait for all ranks, check each exit code (None: any but 0), and return their outputs, rank 0 first."""
        deadline = time.monotonic() + timeout_s
        codes = [command.wait(max(deadline - time.monotonic(), 1)) for command in self.commands]
        output = self.read_output()
        assert all(found == code if code is not None else found for found in codes), (codes, output)
        return output

    def read_output(self) -> str:
        """Return what the ranks have printed, rank 0 first."""
        return "".join(command.read_output() for command in self.commands)


class Launcher:
    """Starts runs below ``folder``."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.home = folder, folder
        self.environment = {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(cache)}

    def _words(self, name: str, words: Sequence[str]) -> list[str]:
        # The last value of a repeated flag counts.
        return [*words[:2], *SIZES.split(), *words[2:], "--save_dir", str(self.folder), "--run_name", name]

    def start(
        self,
        n_ranks: int,
        name: str,
        words: Sequence[str],
        prepare: Callable[[], object] | None = None,
        store: dist.TCPStore | None = None,
    ) -> Ranks:
        """Start the ranks; ``prepare`` is called in each of them.

        With ``store`` the ranks use it, as they use torchrun's. Otherwise rank 0 serves the store.
        """
        port = str(free_port() if store is None else store.port)
        commands = []
        for rank in range(n_ranks):
            environment = dict(self.environment)
            if n_ranks > 1:
                numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n_ranks, "LOCAL_WORLD_SIZE": n_ranks}
                environment |= {key: str(value) for key, value in numbers.items()}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                environment |= {} if store is None else {"TORCHELASTIC_USE_AGENT_STORE": "True"}
            commands.append(ForkedCommand(self._words(name, words), environment, self.home, prepare))
        return Ranks(commands)

    def start_torchrun(
        self, name: str, words: Sequence[str], arguments: Sequence[str], program: Sequence[str] = ("-m", "saetrain")
    ) -> subprocess.Popen[str]:
        """Start ``torchrun ARGUMENTS PROGRAM WORDS``."""
        command = [sys.executable, "-m", "torch.distributed.run", *arguments, *program, *self._words(name, words)]
        environment = {**os.environ, **self.environment}
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, cwd=self.home, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )

    def run(self, n_ranks: int, name: str, words: Sequence[str], prepare: Callable[[], object] | None = None) -> Path:
        """Start the ranks, wait for them, and return the run directory."""
        self.start(n_ranks, name, words, prepare).finish()
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


def finish_torchrun(process: subprocess.Popen[str], code: int | None, timeout_s: float = 300) -> str:
    """Wait for torchrun, check its exit code (None: any but 0), and return the output."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"still running after {timeout_s} s: {process.communicate()[0]}") from None
    assert process.returncode == code if code is not None else process.returncode, output
    return output


def torchrun_workers(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """Return {rank: process} of a torchrun."""
    children = psutil.Process(process.pid).children()
    return {int(child.environ()["RANK"]): child for child in children if "RANK" in child.environ()}


def steps_done(run: Path) -> int:
    """Last step in the metrics file, whole lines only."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def wait_for_step(process: Pollable, run: Path, step: int) -> None:
    """Wait until the metrics file of ``run`` contains ``step``."""
    while steps_done(run) < step:
        assert process.poll() is None, "the run ended early"
        time.sleep(0.005)


def weights(run: Path) -> dict[str, torch.Tensor]:
    """{SAE/tensor: value} of every SAE that the run left."""
    out = {
        f"{path.relative_to(run / 'sae')}/{name}": value.float()
        for file in ("sae_weights.safetensors", "saetrain.safetensors")
        for path in sorted((run / "sae").rglob(file))
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
            undefined = {name for name, value in figures.items() if value is None}
            assert {name for name, value in after["saes"][sae].items() if value is None} == undefined
            compared = {name: value for name, value in figures.items() if not name.endswith(("_random", "step_ms"))}
            compared = {name: value for name, value in compared.items() if name not in undefined}
            found_figures = {name: after["saes"][sae][name] for name in compared}
            assert found_figures == pytest.approx(compared, rel=20 * tolerance, abs=2e-6), sae
