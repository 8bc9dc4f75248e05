"""The effect of single latents on the model's loss, by ablation, with intervals over documents (--ablate_latents)."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saetrain.activations.lm_batches import LMBatch, LMBatchBuilder, scored_log_probs
from saetrain.activations.lm_head import LMHeadModel
from saetrain.config import FeaturesConfig
from saetrain.distributed import record_progress
from saetrain.errors import SaetrainError
from saetrain.evaluation.bootstrap import NON_NEGATIVE, UNBOUNDED, DocumentSums, Formula
from saetrain.features.collect import limit_tokens
from saetrain.logs.console import log_rank0
from saetrain.runs.evaluate.setup import EvalContext
from saetrain.sae import SAE
from saetrain.settings import DEFAULT_LOSS_TOKENS
from saetrain.splicing import splice
from saetrain.types import ModelBatch, batch_by_length

LOSS_NAMES = {"causal": "ce_increase", "masked": "kl", "none": "final_hidden_error"}
"""{kind of head: what an ablation changes}."""


@dataclass(frozen=True)
class Ablation:
    """``effects`` (latents, 3) of the ablated ``latents``: value, low and high, nan without an interval."""

    latents: np.ndarray
    effects: np.ndarray
    seconds: float


def choose_ablated_latents(counts: np.ndarray, wanted: int) -> np.ndarray:
    """Return ``wanted`` of the latents that fire, evenly over the ranks of their firing ``counts`` (F,)."""
    alive = np.flatnonzero(counts)
    ranked = alive[np.argsort(counts[alive], kind="stable")]
    wanted = min(wanted, len(ranked))
    return ranked[(2 * np.arange(wanted) + 1) * len(ranked) // (2 * max(wanted, 1))]


@torch.no_grad()
def measure_loss_effects(
    context: EvalContext, name: str, batches: Iterable[ModelBatch], counts: np.ndarray, config: FeaturesConfig
) -> Ablation:
    """Ablate latents of the SAE ``name`` on the first tokens of ``batches``, and print what it costs.

    ``counts`` (F,): how often each latent fires.
    """
    started, head, scoring = time.perf_counter(), context.head, context.config.scoring
    site, saved = context.sites[name], context.loaded.saes[name]
    if len(site.outputs) != 1:
        raise SaetrainError(f"--ablate_latents: {name} reconstructs {len(site.outputs)} hookpoints, not a single one")
    if head.kind == "masked" and context.tokenizer.mask_token_id is None:
        raise SaetrainError("--ablate_latents: the model predicts masked tokens, but its tokenizer has no mask token")
    sae = SAE(saved.coder, saved.metadata.with_site(site, context.extractor.norm_limits), saved.folder)
    latents = choose_ablated_latents(counts, config.features.ablate_latents)
    sums = {int(latent): DocumentSums(scoring.bootstrap, scoring.eval_seed) for latent in latents}
    builder = LMBatchBuilder(head, context.extractor.keep, context.tokenizer.mask_token_id)
    tokens = context.token_budget(config.features.ablate_tokens, DEFAULT_LOSS_TOKENS)
    limit = builder.limit_batch_tokens(context.extractor.batch_tokens)
    n_tokens = n_passes = 0
    for group in limit_tokens(batches, context.extractor.keep, tokens):
        for batch in builder.iterate_batches(batch_by_length(group, limit), scoring.eval_seed):
            n_passes += _add_effects(context, sae, batch, sums)
            n_tokens += int(batch.attention_mask.sum())
    effects = np.array([_estimate_effect(each, head) for each in sums.values()]).reshape(-1, 3)
    seconds = time.perf_counter() - started
    log_rank0(
        f"{name}: ablated {len(latents)} latents on {n_tokens:,} tokens in {n_passes} forward passes, {seconds:.0f} s"
    )
    return Ablation(latents, effects, seconds)


def _add_effects(context: EvalContext, sae: SAE, batch: LMBatch, sums: dict[int, DocumentSums]) -> int:
    """Add a batch to the sums of each latent, and return the number of forward passes."""
    head, site = context.head, sae.metadata.site
    assert site is not None
    mask_BS = batch.keep_mask
    captured = context.extractor.capture(batch.input_ids, batch.attention_mask)
    for hookpoint in site.hookpoints:
        limit = context.extractor.norm_limits.get(hookpoint, float("inf"))
        mask_BS = mask_BS & (captured[hookpoint].float().norm(dim=-1) <= limit)
    x_ND, _ = site.select_xy({hookpoint: captured[hookpoint][mask_BS].float() for hookpoint in site.hookpoints})
    fires = sae.coder.encode(x_ND).firing_counts() > 0
    clean, n_passes = _run_model(head, batch), 1
    for latent, total in sums.items():
        record_progress()
        ablated = clean
        # A latent that does not fire in the batch changes nothing.
        if fires[latent]:
            with splice(head.module, sae, ablate=[latent], positions=mask_BS):
                ablated = _run_model(head, batch)
            n_passes += 1
        total.add(
            batch.target_docs, {key: value.cpu() for key, value in _token_terms(head, batch, clean, ablated).items()}
        )
    return n_passes


def _run_model(head: LMHeadModel, batch: LMBatch) -> Tensor:
    """Return the log-probabilities (m, V) at the m scored positions, or the final hidden states (m, D) there."""
    if head.kind == "none":
        return head.compute_final_hidden(batch.input_ids, batch.attention_mask)[batch.scored_mask].double()
    return scored_log_probs(head, batch)


def _token_terms(head: LMHeadModel, batch: LMBatch, clean: Tensor, ablated: Tensor) -> dict[str, Tensor]:
    """Return the terms per scored token of the effect of an ablation."""
    ones = torch.ones(len(clean))
    if head.kind == "none":
        return {"error": (ablated - clean).square().sum(dim=1), "norm": clean.square().sum(dim=1)}
    if head.kind == "masked":
        return {"effect": (clean.exp() * (clean - ablated)).sum(dim=1), "tokens": ones}
    targets = batch.targets.unsqueeze(1)
    return {"effect": (clean - ablated).gather(1, targets).squeeze(1), "tokens": ones}


def _estimate_effect(sums: DocumentSums, head: LMHeadModel) -> list[float]:
    formula: Formula = lambda each: each["effect"] / each["tokens"]  # noqa: E731
    if head.kind == "none":
        formula = lambda each: (each["error"] / each["norm"]).sqrt()  # noqa: E731
    found = sums.estimate_metric(formula, UNBOUNDED if head.kind == "causal" else NON_NEGATIVE)
    return [found.value, found.low, found.high]
