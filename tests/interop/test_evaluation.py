"""Our figures beside those of the real SAELens and the real SAEBench: one SAE, one model, the same tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from saetrain.cli import main
from saetrain.config import EvaluateConfig
from saetrain.evaluation.evaluator import ScoreSettings
from saetrain.interop.formats import save_sae
from saetrain.runs.evaluate.load_saes import load_saes
from saetrain.runs.evaluate.run import (
    EvalContext,
    EvalText,
    build_eval_context,
    fit_targets,
    open_eval_texts,
    score_text,
)

pytestmark = pytest.mark.interop

SHARED = Path(__file__).parents[2] / ".." / "shared" / "models" / "tiny-gpt2"
CTX_LEN = 64
BATCH = 16
"""Windows that the other tools take at once; the last batch is smaller."""


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: str, topics: list[str]) -> str:
    """A GPT-2 whose loss is far below that of guessing: the shared one, else a small one trained for a minute."""
    if SHARED.exists():
        return str(SHARED.resolve())
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "trained-gpt2"
    tokenizer = AutoTokenizer.from_pretrained(tiny_gpt2)
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    ids = torch.tensor(tokenizer("\n".join(topics))["input_ids"])
    windows = ids[: len(ids) // CTX_LEN * CTX_LEN].view(-1, CTX_LEN)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        batch = windows[torch.randint(len(windows), (32,), generator=generator)]
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@dataclass(frozen=True)
class Ours:
    """What we say of the SAE in ``folder``, over all tokens of ``windows`` (n, CTX_LEN)."""

    folder: Path
    windows: torch.Tensor
    figures: dict[str, float]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory, language_model: str, topics_jsonl: str) -> Ours:
    """The figures of ``saetrain evaluate`` with all positions replaced and no token left out."""
    out = tmp_path_factory.mktemp("run")
    main(
        f"{language_model} {topics_jsonl} --layers 2 --k 16 --num_latents 1024 --max_tokens 40000 --lr auto "
        f"--batch_size 8 --ctx_len {CTX_LEN} --eval_tokens 1000 --assess false --save_dir {out} --run_name run".split()
    )
    folder = out / "run" / "sae" / "h.2"
    scoring = ScoreSettings(splice_positions="all", bootstrap=0, loss_tokens=6000, fit_tokens=2000)
    config = EvaluateConfig(
        path=str(folder), eval_tokens=6000, exclude_special_tokens="false", exclude_sinks="false", scoring=scoring
    )
    setting = build_eval_context(config, load_saes(config.path), None)
    (text,), fit = open_eval_texts(setting)
    # The other tools take windows of one length.
    numbers = text.indices[[len(text.sequences[int(number)]) == CTX_LEN for number in text.indices]]
    text = dataclasses.replace(text, indices=numbers)
    fewer_than_k_fire(setting, text)
    scores = score_text(setting, text, fit_targets(setting, fit)).scores["h.2"]
    windows = torch.stack([torch.from_numpy(text.sequences[int(number)].ids).long() for number in numbers])
    assert scores.metrics["explained_variance"].count == windows.numel()
    assert scores.metrics["ce_clean"].count == windows[:, 1:].numel()
    return Ours(folder, windows, {name: figure.estimate.value for name, figure in scores.metrics.items()})


def fewer_than_k_fire(setting: EvalContext, text: EvalText) -> None:
    """Lower the SAE's bias, on disk too, so that a fifth of what fires falls below zero: L0 then varies."""
    sae = setting.loaded.saes["h.2"]
    sequences = text.sequences.iterate_batches(text.indices, setting.extractor.batch_tokens)
    batches = setting.extractor.iterate_labelled(sequences)
    x = torch.cat([batch.values["h.2"] for batch in batches])
    sae.coder.b_enc -= sae.coder.encode(x).values.flatten()[:100_000].quantile(0.2)
    save_sae(sae.folder, sae.coder, sae.metadata)


@pytest.fixture(scope="module")
def sae(ours: Ours) -> Any:
    """The same SAE as SAELens reads it."""
    from sae_lens import SAE

    return SAE.load_from_disk(str(ours.folder))


@pytest.fixture(scope="module")
def hooked(language_model: str, ours: Ours) -> Any:
    """The same model in TransformerLens, its weights neither folded nor centred."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    from transformers import AutoModelForCausalLM

    source = AutoModelForCausalLM.from_pretrained(language_model).eval()
    config = HookedTransformerConfig(
        n_layers=source.config.n_layer,
        d_model=source.config.n_embd,
        d_head=source.config.n_embd // source.config.n_head,
        n_heads=source.config.n_head,
        d_mlp=4 * source.config.n_embd,
        n_ctx=source.config.n_positions,
        d_vocab=source.config.vocab_size,
        eps=source.config.layer_norm_epsilon,
        act_fn=source.config.activation_function,
        normalization_type="LN",
        device="cpu",
    )
    model = HookedTransformer(config).eval()
    model.load_and_process_state_dict(
        convert_gpt2_weights(source, config), fold_ln=False, center_writing_weights=False, center_unembed=False,
        fold_value_biases=False,
    )  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(model(ours.windows[:4]), source(ours.windows[:4]).logits, atol=1e-3, rtol=1e-4)
    return model


class Store:
    """What both tools ask of an activation store: the next batch of token ids."""

    def __init__(self, windows: torch.Tensor) -> None:
        self._batches: Iterator[torch.Tensor] = iter(windows.split(BATCH))
        self.batches = -(-len(windows) // BATCH)

    def get_batch_tokens(self, batch_size: int) -> torch.Tensor:
        assert batch_size == BATCH, batch_size
        return next(self._batches)


LOSSES = {
    "ce_clean": "ce_loss_without_sae",
    "ce_spliced": "ce_loss_with_sae",
    "ce_zero": "ce_loss_with_ablation",
    "ce_recovered_zero": "ce_loss_score",
}
ACTIVATIONS = {"l0": "l0", "cosine": "cossim", "norm_ratio": "l2_ratio"}


def agree(ours: dict[str, float], theirs: dict[str, float], names: dict[str, str]) -> None:
    assert {name: theirs[name_there] for name, name_there in names.items()} == pytest.approx(
        {name: ours[name] for name in names}, rel=1e-4
    )


def kl_where_a_token_follows(parts: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Both tools average KL over all positions; we only where cross-entropy is defined, which excludes the last."""
    return {
        name: float(torch.cat([part[there][:, :-1].flatten() for part in parts]).mean())
        for name, there in (("kl", "kl_div_with_sae"), ("kl_zero", "kl_div_with_ablation"))
    }


def test_the_sae_is_worth_comparing(ours: Ours) -> None:
    figures = ours.figures
    assert 8 < figures["l0"] < 15
    assert 0.02 < figures["alive"] < 0.98
    assert 0.3 < figures["explained_variance"] < 0.98
    assert figures["ce_clean"] + 0.02 < figures["ce_spliced"] < figures["ce_zero"] - 0.02


def test_saelens_agrees_on_losses(ours: Ours, sae: Any, hooked: Any) -> None:
    from sae_lens.evals import get_downstream_reconstruction_metrics, get_recons_loss
    from sae_lens.training.activation_scaler import ActivationScaler

    store = Store(ours.windows)
    theirs = get_downstream_reconstruction_metrics(
        sae, hooked, store, ActivationScaler(), compute_kl=True, compute_ce_loss=True, n_batches=store.batches,
        eval_batch_size_prompts=BATCH,
    )  # fmt: skip
    agree(ours.figures, theirs, LOSSES)
    parts = [
        get_recons_loss(sae, hooked, ActivationScaler(), batch, compute_kl=True, compute_ce_loss=False)
        for batch in ours.windows.split(BATCH)
    ]
    kl = kl_where_a_token_follows(parts)
    agree(ours.figures, kl, {"kl": "kl", "kl_zero": "kl_zero"})
    assert ours.figures["kl_recovered_zero"] == pytest.approx(1 - kl["kl"] / kl["kl_zero"], rel=1e-3)
    assert theirs["kl_div_with_sae"] != pytest.approx(kl["kl"], rel=1e-6), "theirs is over all positions"


def saelens_activations(sae: Any, hooked: Any, windows: torch.Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    from sae_lens.evals import get_sparsity_and_variance_metrics
    from sae_lens.training.activation_scaler import ActivationScaler

    store = Store(windows)
    with torch.no_grad():
        figures, by_latent = get_sparsity_and_variance_metrics(
            sae, hooked, store, ActivationScaler(), n_batches=store.batches, compute_l2_norms=True,
            compute_sparsity_metrics=True, compute_variance_metrics=True, compute_featurewise_density_statistics=True,
            eval_batch_size_prompts=BATCH, model_kwargs={},
        )  # fmt: skip
    return figures, by_latent


def test_saelens_agrees_on_activations(ours: Ours, sae: Any, hooked: Any) -> None:
    from sae_lens.evals import get_featurewise_weight_based_metrics

    theirs, by_latent = saelens_activations(sae, hooked, ours.windows)
    agree(ours.figures, theirs, {**ACTIVATIONS, "explained_variance": "explained_variance"})
    assert theirs["mse"] == pytest.approx(ours.figures["mse"] * sae.cfg.d_in, rel=1e-3), "theirs is summed over D"
    # A mean of the batches' ratios; the windows are many enough for it to be near the ratio of the sums.
    assert theirs["relative_reconstruction_bias"] == pytest.approx(ours.figures["reconstruction_bias"], rel=5e-3)
    density = torch.tensor(by_latent["feature_density"])
    for name, least in (("alive", 0.0), ("density_over_1_percent", 0.01), ("density_over_10_percent", 0.1)):
        # A latent whose activation is 1e-7 on its only token may fire in one and not in the other.
        assert float((density > least).float().mean()) == pytest.approx(ours.figures[name], abs=1 / len(density) + 1e-9)
    cosines = get_featurewise_weight_based_metrics(sae)["encoder_decoder_cosine_sim"]
    assert sum(cosines) / len(cosines) == pytest.approx(ours.figures["encoder_decoder_cosine"], rel=1e-5)


def test_saelens_explained_variance_is_one_over_all_tokens_not_per_batch(ours: Ours, sae: Any, hooked: Any) -> None:
    """SAELens from 6.19 on sums over all batches, so how they are cut changes nothing; its `legacy` figure differs."""
    few, _ = saelens_activations(sae, hooked, ours.windows[:8])
    whole, _ = saelens_activations(sae, hooked, ours.windows)
    assert whole["explained_variance"] == pytest.approx(ours.figures["explained_variance"], rel=1e-3)
    assert whole["explained_variance_legacy"] != pytest.approx(ours.figures["explained_variance"], rel=1e-3)
    assert few["explained_variance"] != pytest.approx(whole["explained_variance"], rel=1e-4), "other tokens"


def test_saebench_agrees(ours: Ours, sae: Any, hooked: Any) -> None:
    core = pytest.importorskip("sae_bench.evals.core.main", reason="pip install --no-deps sae-bench==0.6.0 tabulate")
    # Release 0.6.0 looks for these where SAELens 5 had them.
    sae.cfg.hook_name, sae.cfg.hook_head_index, sae.cfg.hook_layer = "blocks.2.hook_resid_post", None, 2
    sae.cfg.architecture_str = "topk"
    store = Store(ours.windows)
    losses = core.get_downstream_reconstruction_metrics(
        sae, hooked, store, compute_kl=True, compute_ce_loss=True, n_batches=store.batches,
        eval_batch_size_prompts=BATCH,
    )  # fmt: skip
    agree(ours.figures, losses, LOSSES)
    parts = [
        core.get_recons_loss(sae, hooked, batch, None, compute_kl=True, compute_ce_loss=False)
        for batch in ours.windows.split(BATCH)
    ]
    agree(ours.figures, kl_where_a_token_follows(parts), {"kl": "kl", "kl_zero": "kl_zero"})
    store = Store(ours.windows)
    with torch.no_grad():
        theirs, by_latent = core.get_sparsity_and_variance_metrics(
            sae, hooked, store, n_batches=store.batches, compute_l2_norms=True, compute_sparsity_metrics=True,
            compute_variance_metrics=True, compute_featurewise_density_statistics=True,
            eval_batch_size_prompts=BATCH, model_kwargs={},
        )  # fmt: skip
        by_latent |= core.get_featurewise_weight_based_metrics(sae)
    agree(ours.figures, theirs, ACTIVATIONS)
    misc = core.calculate_misc_metrics(by_latent)
    latents = sae.cfg.d_sae
    assert misc["frac_alive"] == pytest.approx(ours.figures["alive"], abs=1 / latents + 1e-9)
    assert misc["freq_over_1_percent"] == pytest.approx(ours.figures["density_over_1_percent"], abs=1 / latents + 1e-9)
    assert misc["freq_over_10_percent"] == pytest.approx(
        ours.figures["density_over_10_percent"], abs=1 / latents + 1e-9
    )
    assert misc["average_max_decoder_cosine_sim"] == pytest.approx(ours.figures["decoder_max_cosine"], rel=1e-4)
    # Its explained variance subtracts the square of a mean of squares: docs/metrics.md.
    assert theirs["explained_variance"] != pytest.approx(ours.figures["explained_variance"], rel=1e-3)
