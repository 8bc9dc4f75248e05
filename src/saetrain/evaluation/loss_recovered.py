"""Loss recovered: how much worse the model predicts when reconstructions replace its activations at a hookpoint.

Causal models are scored by cross-entropy and KL of the next token, masked models by those of the masked tokens.
Models without such a head are scored by their pooled output and final hidden state. All variants (SAE, ablations,
baselines) are spliced in at the same positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from saetrain.activations.capture import ActivationCapture
from saetrain.activations.lm_batches import LMBatch, scored_log_probs
from saetrain.activations.lm_head import LMHeadModel
from saetrain.activations.splice import replace_positions, splice_output
from saetrain.evaluation.baselines import PCA_RECONSTRUCTION, RANDOM_DECODER
from saetrain.evaluation.bootstrap import (
    AT_MOST_ONE,
    COSINE_RANGE,
    NON_NEGATIVE,
    UNBOUNDED,
    DocumentSums,
    Formula,
    ValueRange,
)
from saetrain.evaluation.evaluator import EvalTarget, MetricResult

MIN_ABLATION_NATS = 0.05
"""Loss increase of an ablation, in nats, below which a ratio to it is mostly noise."""

ReplaceFn = Callable[[Tensor, Tensor], Tensor]
"""Maps coder inputs (N, D_in) and the activations that the coder reconstructs (N, D_out) to their replacement."""
CLEAN_VARIANT, SAE_VARIANT, ZERO_VARIANT, MEAN_VARIANT = "clean", "sae", "zero", "mean"
BASELINE_VARIANTS = (RANDOM_DECODER, PCA_RECONSTRUCTION, MEAN_VARIANT)


@torch.no_grad()
def evaluate_losses(
    targets: Mapping[str, EvalTarget],
    head: LMHeadModel,
    batches: Iterable[LMBatch],
    norm_limits: Mapping[str, float],
    replicates: int,
    seed: int,
    on_progress: Callable[[int], object] = lambda tokens: None,
) -> dict[str, dict[str, MetricResult]]:
    """Return {SAE: metrics} of the model's loss over ``batches`` with each SAE spliced in.

    Args:
        targets: the coders by name, each with baselines; one that reconstructs several hookpoints gets no metrics.
        head: the model.
        batches: at their kept positions the activation is replaced.
        norm_limits: {hookpoint: largest norm of an activation that is replaced}; hookpoints may be missing.
        replicates: number of resamplings of the documents per interval.
        seed: seed of the resamplings.
        on_progress: called with the number of tokens after each batch.
    """
    sums = {
        name: _LossSums(head, target, norm_limits, replicates, seed)
        for name, target in targets.items()
        if len(target.site.outputs) == 1
    }
    for batch in batches:
        clean_outputs = _run_model(head, batch)
        for each in sums.values():
            each.add(batch, clean_outputs)
        on_progress(int(batch.attention_mask.sum()))
    return {name: each.collect_metrics() for name, each in sums.items()}


def _run_model(head: LMHeadModel, batch: LMBatch) -> Tensor:
    """Return the log-probabilities at the scored positions, (m, V) in fp32; without a head, the states (B, S, D)."""
    if head.kind == "none":
        return head.compute_final_hidden(batch.input_ids, batch.attention_mask)
    return scored_log_probs(head, batch)


class _LossSums:
    """Sums over documents of the losses of each variant of the activation at the hookpoint of one SAE."""

    def __init__(
        self, head: LMHeadModel, target: EvalTarget, norm_limits: Mapping[str, float], replicates: int, seed: int
    ) -> None:
        coder, baselines = target.coder, target.baselines
        assert baselines is not None, "the loss is scored with baselines"
        self._head, self._site, self._norm_limits = head, target.site, norm_limits
        self._variants: dict[str, ReplaceFn] = {
            SAE_VARIANT: lambda x, y: coder.decode(coder.encode(x), x),
            ZERO_VARIANT: lambda x, y: torch.zeros_like(y),
            MEAN_VARIANT: lambda x, y: baselines.mean.expand_as(y),
            RANDOM_DECODER: lambda x, y: baselines.random_decoder(y),
            PCA_RECONSTRUCTION: lambda x, y: baselines.pca(y),
        }
        self._output_module = head.base.module.get_submodule(target.site.y_name)
        # The outputs of the replaced module do not change its inputs, so these are captured once per batch.
        self._capture = None if target.site.is_sae else ActivationCapture(head.base, list(target.site.inputs))
        self._token_sums = DocumentSums(replicates, seed)
        self._sequence_sums = DocumentSums(replicates, seed)
        """Sums over sequences instead of tokens, for pooled outputs."""
        self._n_tokens = self._n_sequences = 0
        self._inputs: dict[str, Tensor] = {}

    def add(self, batch: LMBatch, clean_outputs: Tensor) -> None:
        """Add a batch; ``clean_outputs`` is the result of :func:`_run_model` without a splice."""
        self._inputs = {} if self._capture is None else self._capture(batch.input_ids, batch.attention_mask)
        if self._head.kind == "none":
            self._add_hidden_errors(batch, clean_outputs)
        else:
            self._add_losses(batch, clean_outputs)
        self._n_tokens += len(batch.targets)
        self._n_sequences += len(batch.input_ids)

    def _run_spliced(self, batch: LMBatch, variant: str) -> Tensor:
        """Return the model's outputs with the activation replaced by ``variant``."""

        def replace_activation(y_BSD: Tensor) -> Tensor:
            captured, mask_BS = {**self._inputs, self._site.y_name: y_BSD}, batch.keep_mask
            for name, value_BSD in captured.items():
                mask_BS = mask_BS & (value_BSD.float().norm(dim=-1) <= self._norm_limits.get(name, float("inf")))
            x_ND, y_ND = self._site.select_xy({name: value[mask_BS].float() for name, value in captured.items()})
            return replace_positions(y_BSD, mask_BS, self._variants[variant](x_ND, y_ND))

        with splice_output(self._output_module, replace_activation):
            return _run_model(self._head, batch)

    def _add_losses(self, batch: LMBatch, clean_log_probs: Tensor) -> None:
        targets = batch.targets.unsqueeze(1)
        terms = {
            "tokens": torch.ones(len(targets)),
            f"ce_{CLEAN_VARIANT}": -clean_log_probs.gather(1, targets).squeeze(1),
        }
        for name in self._variants:
            log_probs = self._run_spliced(batch, name)
            terms[f"ce_{name}"] = -log_probs.gather(1, targets).squeeze(1)
            terms[f"kl_{name}"] = (clean_log_probs.exp() * (clean_log_probs - log_probs)).sum(dim=1)
        self._token_sums.add(batch.target_docs, {name: value.cpu() for name, value in terms.items()})

    def _add_hidden_errors(self, batch: LMBatch, clean_BSD: Tensor) -> None:
        mask_BS = batch.scored_mask
        clean_pooled = _mean_pool(clean_BSD, mask_BS)
        terms = {"tokens": torch.ones(len(batch.targets)), "norm": clean_BSD[mask_BS].double().pow(2).sum(dim=1)}
        first_tokens = np.cumsum([0, *mask_BS.sum(dim=1).tolist()[:-1]])
        sequence_terms = {"sequences": torch.ones(len(mask_BS))}
        for name in self._variants:
            hidden_BSD = self._run_spliced(batch, name)
            terms[f"error_{name}"] = (hidden_BSD[mask_BS].double() - clean_BSD[mask_BS].double()).pow(2).sum(dim=1)
            sequence_terms[f"cosine_{name}"] = torch.cosine_similarity(
                _mean_pool(hidden_BSD, mask_BS), clean_pooled, dim=1
            )
        self._token_sums.add(batch.target_docs, {name: value.cpu() for name, value in terms.items()})
        self._sequence_sums.add(
            batch.target_docs[first_tokens], {name: value.cpu() for name, value in sequence_terms.items()}
        )

    def collect_metrics(self) -> dict[str, MetricResult]:
        """Return the metrics, each with its baselines; none without a batch."""
        if not self._n_tokens:
            return {}
        if self._head.kind == "none":
            return {
                **_estimate_with_baselines(self._token_sums, hidden_formulas, self._n_tokens),
                **_estimate_with_baselines(self._sequence_sums, pooled_formulas, self._n_sequences),
            }
        model_metrics = {
            name: MetricResult(self._token_sums.estimate_metric(formula, METRIC_RANGES[name]), self._n_tokens)
            for name, formula in MODEL_FORMULAS.items()
        }
        return {**model_metrics, **_estimate_with_baselines(self._token_sums, loss_formulas, self._n_tokens)}


def _mean_pool(hidden_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """Return the mean over the tokens of each sequence, (B, D) in fp64, the usual pooling of sentence encoders."""
    weights = mask_BS.double().unsqueeze(-1)
    return (hidden_BSD.double() * weights).sum(dim=1) / weights.sum(dim=1)


def _estimate_with_baselines(
    sums: DocumentSums, formulas: Callable[[str], dict[str, Formula]], count: int
) -> dict[str, MetricResult]:
    """Return each metric of the SAE with its baselines; that of the mean is the ablation by the mean."""
    out = {}
    for name in formulas(SAE_VARIANT):
        estimates = {
            variant: sums.estimate_metric(formulas(variant)[name], METRIC_RANGES.get(name, UNBOUNDED))
            for variant in (SAE_VARIANT, *BASELINE_VARIANTS)
        }
        flag = "small denominator" if has_small_denominator(sums.full_sums, name) else ""
        out[name] = MetricResult(estimates.pop(SAE_VARIANT), count, estimates, flag)
    return out


def _mean_per_token(name: str) -> Formula:
    return lambda sums: sums[name] / sums["tokens"]


def loss_formulas(variant: str) -> dict[str, Formula]:
    """Return the formulas of ``variant`` for models that predict tokens.

    Loss recovered is relative to two ablations, which replace the activation by zero and by the mean.
    """
    ce, kl, clean = (_mean_per_token(name) for name in (f"ce_{variant}", f"kl_{variant}", f"ce_{CLEAN_VARIANT}"))

    def ce_recovered(ablation: str) -> Formula:
        ablated_ce = _mean_per_token(f"ce_{ablation}")
        return lambda sums: (ablated_ce(sums) - ce(sums)) / (ablated_ce(sums) - clean(sums))

    def kl_recovered(ablation: str) -> Formula:
        ablated_kl = _mean_per_token(f"kl_{ablation}")
        return lambda sums: 1 - kl(sums) / ablated_kl(sums)

    return {
        "ce_spliced": ce,
        "delta_ce": lambda sums: ce(sums) - clean(sums),
        "ce_recovered_zero": ce_recovered(ZERO_VARIANT),
        "ce_recovered_mean": ce_recovered(MEAN_VARIANT),
        "kl": kl,
        "kl_recovered_zero": kl_recovered(ZERO_VARIANT),
        "kl_recovered_mean": kl_recovered(MEAN_VARIANT),
    }


MODEL_FORMULAS = {name: _mean_per_token(name) for name in ("ce_clean", "ce_zero", "ce_mean", "kl_zero", "kl_mean")}
"""Formulas of the model without an SAE: clean and ablated."""
METRIC_RANGES: dict[str, ValueRange] = {
    **dict.fromkeys((*MODEL_FORMULAS, "ce_spliced", "kl", "final_hidden_error"), NON_NEGATIVE),
    **dict.fromkeys(("kl_recovered_zero", "kl_recovered_mean"), AT_MOST_ONE),
    "pooled_cosine": COSINE_RANGE,
}
"""Range of each metric that has one."""


def has_small_denominator(sums: Mapping[str, Tensor], name: str) -> bool:
    """Return whether metric ``name`` is a ratio to an ablation that costs less than ``MIN_ABLATION_NATS``."""
    if "_recovered_" not in name:
        return False
    family, ablation = name.split("_recovered_")
    ablation_cost = MODEL_FORMULAS[f"{family}_{ablation}"](sums) - (
        MODEL_FORMULAS["ce_clean"](sums) if family == "ce" else 0.0
    )
    return bool(abs(ablation_cost) < MIN_ABLATION_NATS)


def hidden_formulas(variant: str) -> dict[str, Formula]:
    """Return the formulas of ``variant`` over tokens, for models that do not predict tokens."""
    return {"final_hidden_error": lambda sums: (sums[f"error_{variant}"] / sums["norm"]).sqrt()}


def pooled_formulas(variant: str) -> dict[str, Formula]:
    """Return the formulas of ``variant`` over sequences, for models that do not predict tokens."""
    return {"pooled_cosine": lambda sums: sums[f"cosine_{variant}"] / sums["sequences"]}
