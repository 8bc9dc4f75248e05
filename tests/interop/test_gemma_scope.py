"""An SAE in the layout of Gemma Scope, next to SAELens' reader of Gemma Scope: `make test-interop`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from saetrain.interop.formats import load_sae
from tests.interop.outputs import compare_outputs

pytestmark = pytest.mark.interop

F = 512
REPO, PLACE = "google/gemma-scope-2b-pt-res", "layer_3/width_16k/average_l0_20"


def test_saetrain_and_saelens_read_the_same_sae(
    tmp_path: Path, activations: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.loading import pretrained_sae_loaders as loaders

    folder, width = tmp_path / REPO / PLACE, activations.shape[1]
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    W_dec = generator.standard_normal((F, width)).astype(np.float32)
    W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
    thresholds = generator.uniform(0.5, 2, F).astype(np.float32)
    biases = {"b_enc": 0.1 * generator.standard_normal(F), "b_dec": generator.standard_normal(width)}
    arrays = {"W_enc": W_dec.T, "W_dec": W_dec, "threshold": thresholds, **biases}
    np.savez(folder / "params.npz", **{name: value.astype(np.float32) for name, value in arrays.items()})

    monkeypatch.setattr(
        loaders, "hf_hub_download", lambda **request: str(tmp_path / request["repo_id"] / PLACE / request["filename"])
    )
    config, state, _ = loaders.gemma_2_sae_huggingface_loader(REPO, PLACE)
    sizes = {"d_in": width, "d_sae": F, "apply_b_dec_to_input": config["apply_b_dec_to_input"]}
    theirs = JumpReLUSAE(JumpReLUSAEConfig(**sizes))
    theirs.load_state_dict(state)
    coder, metadata = load_sae(folder)
    assert (metadata.model, metadata.hook_name) == (f"google/{config['model_name']}", config["hook_name"])
    assert (metadata.ctx_len, metadata.prepend_bos) == (config["context_size"], config["prepend_bos"])
    with torch.no_grad():
        compare_outputs(coder, theirs.encode(activations), theirs(activations), activations).check()
