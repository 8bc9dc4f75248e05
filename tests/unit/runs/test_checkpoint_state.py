"""A checkpoint whose manifest was made again is still checked: its step, its files, and the types of its state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from saetrain.atomic_io import hash_file
from saetrain.runs.train.checkpoint_state import CheckpointState
from saetrain.training.checkpoint import find_checkpoint_damage, find_newest_valid, load_checkpoint, save_checkpoint

VALUES: dict[str, Any] = {
    "settings": {
        "batch_size": 2,
        "grad_acc_steps": 1,
        "max_tokens": 640,
        "data_shards": 2,
        "lr_warmup_steps": 1,
        "weight_decay": None,
        "dead_window_tokens": None,
        "model_batch_tokens": 4096,
        "kernels": "torch",
        "compute_dtype": "float32",
        "num_latents": 64,
        "device": "cpu",
        "k": 4,
    },
    "identity": {"model_weights_sha256": "a", "model_config": "b", "tokenizer": "c", "text": "d"},
    "normalizers": {"h.0": {"scale": 1, "variance": 2.5}},
    "norm_limits": {"h.0": 3.5},
    "resolved": {
        "kernels": {"h.0": {"kernels": "torch", "compute_dtype": "float32"}},
        "lrs": {"h.0": 1e-3},
        "steps": 10,
        "dead_windows": {"h.0": 100},
        "warmup_steps": 1,
        "tokens_per_step": 64,
        "placement": {"owners": {}, "reason": ""},
    },
    "losses": {"h.0": [1.0, 0.5]},
    "ended": {},
    "buffer": {"0": [0, 64, 3, 0], "1": [0, 64, 3, 0]},
    "logs": {},
    "world_size": 1,
    "asked_batch": [2, 1],
    "asked_lr": "auto",
}


def save(folder: Path, step: int) -> Path:
    tensors = {name: {"w": torch.full((4,), float(step))} for name in ("h.0", "normalizer:h.0")}
    return save_checkpoint(folder, step, tensors, VALUES)


def remake_manifest(checkpoint: Path) -> None:
    files = [path for path in checkpoint.iterdir() if path.name != "manifest.json"]
    (checkpoint / "manifest.json").write_text(json.dumps({"sha256": {path.name: hash_file(path) for path in files}}))


def change_state(checkpoint: Path, keys: str, value: Any) -> None:
    """Set the entry at the dotted ``keys``, or delete it for the value ``...``."""
    path = checkpoint / "state.json"
    state = entry = json.loads(path.read_text())
    *parents, last = keys.split("/")
    for key in parents:
        entry = entry[key]
    entry.pop(last)
    if value is not ...:
        entry[last] = value
    path.write_text(json.dumps(state))
    remake_manifest(checkpoint)


@pytest.mark.parametrize("key", sorted([*VALUES, "format", "step", "files"]))
def test_a_missing_key_is_damage(key: str, tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 3)
    assert find_checkpoint_damage(checkpoint, CheckpointState) is None
    change_state(checkpoint, key, ...)
    assert find_checkpoint_damage(checkpoint, CheckpointState) == f"state.json: {key}: Field required"


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        ("step", -3, "is of step -3"),
        ("step", 4, "is of step 4"),
        ("step", 3.0, "step: Input should be a valid integer"),
        ("step", "3", "step: Input should be a valid integer"),
        ("step", True, "step: Input should be a valid integer"),
        ("step", 10**6, "step 1000000 is above the 10 steps of the run"),
        ("step", 10**30, "above the 10 steps"),
        ("files/h.0", "../sae_000.safetensors", "lists other files than the folder contains"),
        ("files/h.0", "/etc/passwd", "lists other files than the folder contains"),
        ("files/h.0", "sae_001.safetensors", "lists other files than the folder contains"),
        ("files/h.0", ..., "files, losses and normalizers are not of the same SAEs"),
        ("losses/h.0", ..., "files, losses and normalizers are not of the same SAEs"),
        ("losses/h.0", [None], "losses.h.0.0: Input should be a valid number"),
        ("settings/batch_size", "2", "settings.batch_size: Input should be a valid integer"),
        ("settings/device", ..., "settings.device: Field required"),
        ("resolved/steps", ..., "resolved.steps: Field required"),
        ("resolved/placement", [], "resolved.placement: Input should be an object"),
        ("identity/text", ..., "identity.text: Field required"),
        ("buffer/1", ..., "buffer does not have the 2 shards"),
        ("buffer/1", [0, -1, 0, 0], "buffer has a shard without a position"),
        ("world_size", 0, "the number of processes is below 1"),
        ("asked_lr", "fast", "asked_lr"),
    ],
)
def test_a_wrong_value_is_damage(keys: str, value: Any, said: str, tmp_path: Path) -> None:
    checkpoint = save(tmp_path, 3)
    change_state(checkpoint, keys, value)
    assert said in str(find_checkpoint_damage(checkpoint, CheckpointState))


def list_one_file(checkpoint: Path) -> None:
    digest = hash_file(checkpoint / "state.json")
    (checkpoint / "manifest.json").write_text(json.dumps({"sha256": {"state.json": digest}}))


@pytest.mark.parametrize(
    "harm",
    [
        lambda checkpoint: (checkpoint / "manifest.json").write_text('{"sha256": {}}'),
        list_one_file,
        lambda checkpoint: change_state(checkpoint, "step", -4),
        lambda checkpoint: change_state(checkpoint, "identity", ...),
        lambda checkpoint: (checkpoint / "state.json").unlink(),
        lambda checkpoint: [(checkpoint / "state.json").unlink(), remake_manifest(checkpoint)],
        lambda checkpoint: [(checkpoint / "state.json").write_text("[" * 9999), remake_manifest(checkpoint)],
        lambda checkpoint: [(checkpoint / "state.json").write_bytes(b"\xff"), remake_manifest(checkpoint)],
    ],
)
def test_the_checkpoint_before_a_damaged_one_is_used(harm: Any, tmp_path: Path) -> None:
    save(tmp_path, 3)
    last = save(tmp_path, 4)
    (tmp_path / "step_mine").mkdir()
    harm(last)
    found, remarks = find_newest_valid(tmp_path, CheckpointState)
    assert found is not None
    assert load_checkpoint(found).values["step"] == 3
    assert len(remarks) == 1
    assert f"checkpoint {last} is damaged" in remarks[0]
