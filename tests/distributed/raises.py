"""Faults for tests: steps that raise or hang, text that never arrives, a slow model, and slow checkpoints."""

from __future__ import annotations

import ctypes
import os
import time
from typing import Any

from saetrain.activations.extract import ActivationExtractor
from saetrain.cli import main
from saetrain.data.sharded import ShardedSequences
from saetrain.distributed import env, heartbeat
from saetrain.runs.train import checkpointing
from saetrain.training.sae_state import SaeState


def install_faults() -> None:
    """Install the faults that the environment names in this process.

    On rank 1, step RAISES_AT raises, and step HANGS_AT hangs unless torchrun has restarted the run. Writing a
    checkpoint takes SAVES_IN seconds.
    """
    forward_backward, save_checkpoint = SaeState.forward_backward, checkpointing.save_checkpoint

    def raise_at_step(self: SaeState, batch: Any, progress: Any) -> None:
        if os.environ["RANK"] == "1" and progress.step == int(os.environ.get("RAISES_AT", "-1")):
            raise ValueError("made to fail")
        hangs = os.environ["RANK"] == "1" and progress.step == int(os.environ.get("HANGS_AT", "-1"))
        if hangs and not env.restart_count():
            wait_for_device()
        forward_backward(self, batch, progress)

    def save_slowly(*arguments: Any) -> Any:
        time.sleep(float(os.environ.get("SAVES_IN", "0")))
        return save_checkpoint(*arguments)

    SaeState.forward_backward = raise_at_step  # type: ignore[method-assign]
    checkpointing.save_checkpoint = save_slowly


def install_quick_heartbeat() -> None:
    """Let silent ranks count as dead after 8 s instead of 20, and the stacks of blocked ones be printed after 5 s."""
    heartbeat.BEAT_INTERVAL_S, heartbeat.PEER_TIMEOUT_S, heartbeat.BLOCKED_PYTHON_S = 0.5, 8.0, 5.0


def install_frequent_beats() -> None:
    """Let each rank report its phase 20 times per second, because tiny runs do 45 steps in less than one second."""
    heartbeat.BEAT_INTERVAL_S = 0.05


def wait_for_device() -> None:
    """Hang."""
    time.sleep(1000)


def install_dead_file_server() -> None:
    """Let rank 0 wait forever for the text of its second pools, which another thread reads."""
    install_quick_heartbeat()
    read = ShardedSequences.read

    def read_from_dead_server(self: ShardedSequences, shard: int, cursor: Any, tokens: int) -> Any:
        if os.environ["RANK"] == "0" and cursor != self.start_cursor:
            time.sleep(1000)
        return read(self, shard, cursor, tokens)

    ShardedSequences.read = read_from_dead_server  # type: ignore[method-assign]


def install_lock_holder() -> None:
    """Let step 50 of rank 1 call C code that never returns and holds Python's lock."""
    install_quick_heartbeat()
    forward_backward = SaeState.forward_backward

    def hold_python_lock(self: SaeState, batch: Any, progress: Any) -> None:
        if os.environ["RANK"] == "1" and progress.step == 50:
            ctypes.PyDLL(None).sleep(1000)
        forward_backward(self, batch, progress)

    SaeState.forward_backward = hold_python_lock  # type: ignore[method-assign]


def install_slow_model() -> None:
    """Let each of the first 12 model batches of rank 1 take half a second."""
    capture, n_batches = ActivationExtractor._capture_activations, 0

    def capture_slowly(self: ActivationExtractor, *inputs: Any) -> Any:
        nonlocal n_batches
        n_batches += 1
        if os.environ["RANK"] == "1" and n_batches <= 12:
            time.sleep(0.5)
        return capture(self, *inputs)

    ActivationExtractor._capture_activations = capture_slowly  # type: ignore[method-assign]


if __name__ == "__main__":
    install_faults()
    main()
