"""Checkpoints: what is saved is loaded, in memory that gives the same bits as the memory of a new tensor."""

from __future__ import annotations

from pathlib import Path

import torch

from saetrain.training.checkpoint import load_checkpoint, save_checkpoint


def test_loaded_tensors_are_equal_and_aligned(tmp_path: Path) -> None:
    # In the file, one of these starts at an address that is not a multiple of 16.
    tensors = {f"t{size}": torch.randn(size) for size in (3, 33, 65, 129)}
    found = load_checkpoint(save_checkpoint(tmp_path, 7, {"sae": tensors}, {})).tensors["sae"]
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(found[name], value)
        assert found[name].data_ptr() % 16 == 0, name
