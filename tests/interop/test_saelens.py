"""SAEs of all architectures between saetrain and the real SAELens: `make test-interop`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saetrain.cli import main
from saetrain.coders import CODERS, architecture_name
from saetrain.config import EvaluateConfig
from saetrain.evaluation.evaluator import ScoreSettings
from saetrain.interop.formats import load_sae
from saetrain.runs.evaluate.load_saes import load_saes
from saetrain.runs.evaluate.run import build_eval_context, fit_targets, open_eval_texts, score_text
from tests.interop.outputs import compare_outputs

pytestmark = pytest.mark.interop

D, F, K = 384, 512, 8
METADATA = {"model_name": "m", "hook_name": "blocks.3.hook_resid_post", "context_size": 64, "prepend_bos": False}


def load_with_saelens(folder: Path) -> Any:
    from sae_lens import SAE

    return SAE.load_from_disk(str(folder))


@pytest.fixture(scope="module", params=CODERS)
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, minilm: str, topics_jsonl: str
) -> Path:
    """The SAE folder of a short run of each architecture."""
    out = tmp_path_factory.mktemp("run")
    main(
        f"{minilm} {topics_jsonl} --architecture {request.param} --layers 3 --k {K} --num_latents {F} --lr 0.002 "
        "--max_tokens 8192 --batch_size 8 --ctx_len 64 --eval_tokens 4000 --assess false --kernels torch "
        f"--save_dir {out} --run_name run".split()
    )
    return out / "run" / "sae" / "encoder.layer.3"


def test_saelens_reads_what_saetrain_writes(trained: Path) -> None:
    """On the tokens of an evaluation, with the L0 that it reports."""
    config = EvaluateConfig(path=str(trained), scoring=ScoreSettings(bootstrap=0, loss_tokens=0, fit_tokens=2000))
    context = build_eval_context(config, load_saes(config.path), None)
    (text,), fit_batches = open_eval_texts(context)
    scores = score_text(context, text, fit_targets(context, fit_batches)).scores["encoder.layer.3"]
    sequences = text.sequences.iterate_batches(text.indices, context.extractor.batch_tokens)
    parts = [
        batch.values["encoder.layer.3"][torch.from_numpy(batch.token_class == 0)]
        for batch in context.extractor.iterate_labelled(sequences)
    ]
    x, (coder, _), theirs = torch.cat(parts).float(), load_sae(trained), load_with_saelens(trained)
    reported = scores.metrics["l0"]
    assert reported.count == len(x)
    agreement = compare_outputs(coder, theirs.encode(x), theirs(x), x)
    agreement.check()
    assert agreement.l0_theirs == pytest.approx(reported.estimate.value, rel=1e-6)


CONFIGS: dict[str, dict[str, Any]] = {
    "standard": {},
    "gated": {},
    "topk": {"k": K},
    "abstopk": {"k": K},
    "batchtopk": {"k": K, "topk_threshold_lr": 0.2},
    "matryoshka_batchtopk": {"k": K, "topk_threshold_lr": 0.2, "matryoshka_widths": [64, 128]},
    "jumprelu": {"jumprelu_bandwidth": 0.5},
}
"""{architecture of SAELens: settings of a short training}."""


def train_with_saelens(architecture: str, x_ND: Tensor, **settings: Any) -> Any:
    """Return an SAE that SAELens has trained for a few steps."""
    from sae_lens.registry import get_sae_training_class
    from sae_lens.saes.sae import SAEMetadata, TrainStepInput

    torch.manual_seed(0)
    sae_class, config_class = get_sae_training_class(architecture)
    settings = {**CONFIGS[architecture], **settings}
    sae = sae_class(config_class(d_in=D, d_sae=F, metadata=SAEMetadata(**METADATA), **settings))
    optimizer = torch.optim.Adam(sae.parameters(), lr=2e-3)
    coefficients = dict.fromkeys(sae.get_coefficients(), 0.1)
    for batch in x_ND[:2000].split(200):
        dead = torch.zeros(F, dtype=torch.bool)
        output = sae.training_forward_pass(TrainStepInput(batch, coefficients, dead, 0, False))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    return sae


def save_both(sae: Any, folder: Path) -> tuple[Path, Path]:
    """Save an SAE for inference and as a checkpoint, and return both folders."""
    inference, checkpoint = folder / "inference", folder / "checkpoint"
    sae.save_model(checkpoint)
    sae.save_inference_model(inference)
    return inference, checkpoint


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("subtracts", [True, False])
def test_saetrain_reads_what_saelens_writes(
    architecture: str, subtracts: bool, tmp_path: Path, activations: Tensor
) -> None:
    """For inference and as a checkpoint of the training, which equal each other."""
    sae = train_with_saelens(architecture, activations, apply_b_dec_to_input=subtracts)
    inference, checkpoint = save_both(sae, tmp_path)
    theirs = load_with_saelens(inference)
    for folder, name in ((inference, type(theirs).__name__.removesuffix("SAE").lower()), (checkpoint, architecture)):
        coder, metadata = load_sae(folder)
        assert architecture_name(type(coder)) == name.removesuffix("_batchtopk")
        assert (metadata.model, metadata.hook_name, metadata.ctx_len) == ("m", METADATA["hook_name"], 64)
        compare_outputs(coder, theirs.encode(activations), theirs(activations), activations).check()


def test_the_norms_of_the_decoder_take_part_in_the_selection(tmp_path: Path, activations: Tensor) -> None:
    for architecture in ("topk", "abstopk"):
        sae = train_with_saelens(architecture, activations)
        sae.W_dec.data *= torch.rand(F, 1) + 0.5
        _, checkpoint = save_both(sae, tmp_path / architecture)
        assert json.loads((checkpoint / "cfg.json").read_text())["rescale_acts_by_decoder_norm"]
        theirs = load_with_saelens(checkpoint)
        compare_outputs(load_sae(checkpoint)[0], theirs.encode(activations), theirs(activations), activations).check()


def test_the_levels_of_a_checkpoint_are_read(tmp_path: Path, activations: Tensor) -> None:
    _, checkpoint = save_both(train_with_saelens("matryoshka_batchtopk", activations), tmp_path)
    assert load_sae(checkpoint)[0].prefix_sizes == (64, 128, F)


@pytest.mark.parametrize(
    "early",
    [
        {"hook_point": "blocks.8.hook_resid_pre", "d_in": D, "d_sae": F, "dtype": "torch.float32"},
        {"architecture": "standard", "hook_name": "blocks.8.hook_resid_pre", "activation_fn_str": "relu", "d_in": D}
        | {"d_sae": F, "dtype": "float32", "apply_b_dec_to_input": False, "normalize_activations": False},
        {"hook_name": "blocks.8.hook_resid_pre", "activation_fn": "topk", "activation_fn_kwargs": {"k": K}, "d_in": D}
        | {"d_sae": F, "dtype": "float32", "normalize_activations": "none"},
    ],
)
def test_configurations_of_earlier_versions(tmp_path: Path, activations: Tensor, early: dict[str, Any]) -> None:
    """As SAELens reads them, with the weights of today."""
    folder, _ = save_both(train_with_saelens("standard", activations), tmp_path)
    (folder / "cfg.json").write_text(json.dumps({**early, "model_name": "gpt2-small", "context_size": 128}))
    coder, metadata = load_sae(folder)
    theirs = load_with_saelens(folder)
    assert (metadata.model, metadata.hook_name, metadata.ctx_len) == ("gpt2-small", "blocks.8.hook_resid_pre", 128)
    compare_outputs(coder, theirs.encode(activations), theirs(activations), activations).check()
