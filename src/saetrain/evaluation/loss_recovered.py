"""Loss recovered: how much worse the model predicts when reconstructions replace its activations at a hookpoint.

Causal models are scored by cross-entropy and KL of the next token, masked models by those of the masked tokens.
Models without such a head are scored by their pooled output and final hidden state. All variants (SAE, ablations,
baselines) are spliced in at the same positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from saetrain.activations.lm_batches import LMBatch, scored_log_probs
from saetrain.activations.lm_head import LMHeadModel
from saetrain.activations.splice import replace_positions, splice_output
from saetrain.evaluation.bootstrap import AT_MOST_ONE, COSINE_RANGE, NON_NEGATIVE, DocumentSums, Formula, ValueRange

MIN_ABLATION_NATS = 0.05
"""Loss increase of an ablation, in nats, below which a ratio to it is mostly noise."""

ReplaceFn = Callable[[Tensor], Tensor]
"""Maps activations (N, D) to their replacement."""
CLEAN_VARIANT, SAE_VARIANT, ZERO_VARIANT, MEAN_VARIANT = "clean", "sae", "zero", "mean"


class LossScorer:
    """Scores variants {name: replacement} of the activation at one hookpoint; sums are kept per document."""

    def __init__(
        self,
        head: LMHeadModel,
        hookpoint: str,
        variants: Mapping[str, ReplaceFn],
        norm_limit: float,
        replicates: int,
        seed: int,
    ) -> None:
        self._head, self._variants, self._norm_limit = head, variants, norm_limit
        self._hookpoint_module = head.base.module.get_submodule(hookpoint)
        self.token_sums = DocumentSums(replicates, seed)
        self.sequence_sums = DocumentSums(replicates, seed)
        """Sums over sequences instead of tokens, for pooled outputs."""
        self.n_tokens = 0

    @torch.no_grad()
    def add(self, lm_batch: LMBatch, clean_outputs: Tensor) -> None:
        """Add a batch; ``clean_outputs`` is the result of :func:`model_outputs` without a splice."""
        if self._head.kind == "none":
            self._add_hidden_errors(lm_batch, clean_outputs)
        else:
            self._add_losses(lm_batch, clean_outputs)
        self.n_tokens += len(lm_batch.target_docs)

    def _run_spliced(self, lm_batch: LMBatch, variant: str) -> Tensor:
        """Return the model's outputs with the activation replaced by ``variant``."""

        def replace_activation(x_BSD: Tensor) -> Tensor:
            mask_BS = lm_batch.keep_mask & (x_BSD.float().norm(dim=-1) <= self._norm_limit)
            return replace_positions(x_BSD, mask_BS, self._variants[variant](x_BSD[mask_BS].float()))

        with splice_output(self._hookpoint_module, replace_activation):
            return model_outputs(self._head, lm_batch)

    def _add_losses(self, lm_batch: LMBatch, clean_log_probs: Tensor) -> None:
        targets = lm_batch.targets.unsqueeze(1)
        terms = {
            "tokens": torch.ones(len(targets)),
            f"ce_{CLEAN_VARIANT}": -clean_log_probs.gather(1, targets).squeeze(1),
        }
        for name in self._variants:
            log_probs = self._run_spliced(lm_batch, name)
            terms[f"ce_{name}"] = -log_probs.gather(1, targets).squeeze(1)
            terms[f"kl_{name}"] = (clean_log_probs.exp() * (clean_log_probs - log_probs)).sum(dim=1)
        self.token_sums.add(lm_batch.target_docs, {name: value.cpu() for name, value in terms.items()})

    def _add_hidden_errors(self, lm_batch: LMBatch, clean_BSD: Tensor) -> None:
        mask_BS = lm_batch.scored_mask
        clean_pooled = _mean_pool(clean_BSD, mask_BS)
        terms = {"tokens": torch.ones(len(lm_batch.target_docs)), "norm": clean_BSD[mask_BS].double().pow(2).sum(dim=1)}
        first_tokens = np.cumsum([0, *mask_BS.sum(dim=1).tolist()[:-1]])
        sequence_terms = {"sequences": torch.ones(len(mask_BS))}
        for name in self._variants:
            hidden_BSD = self._run_spliced(lm_batch, name)
            terms[f"error_{name}"] = (hidden_BSD[mask_BS].double() - clean_BSD[mask_BS].double()).pow(2).sum(dim=1)
            sequence_terms[f"cosine_{name}"] = torch.cosine_similarity(
                _mean_pool(hidden_BSD, mask_BS), clean_pooled, dim=1
            )
        self.token_sums.add(lm_batch.target_docs, {name: value.cpu() for name, value in terms.items()})
        self.sequence_sums.add(
            lm_batch.target_docs[first_tokens], {name: value.cpu() for name, value in sequence_terms.items()}
        )


def _mean_pool(hidden_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """Return the mean over the tokens of each sequence, (B, D) in fp64, the usual pooling of sentence encoders."""
    weights = mask_BS.double().unsqueeze(-1)
    return (hidden_BSD.double() * weights).sum(dim=1) / weights.sum(dim=1)


def model_outputs(head: LMHeadModel, lm_batch: LMBatch) -> Tensor:
    """Return the log-probabilities at the scored positions, (N, V) in fp32; without a head, the states (B, S, D)."""
    if head.kind == "none":
        return head.compute_final_hidden(lm_batch.input_ids, lm_batch.attention_mask)
    return scored_log_probs(head, lm_batch)


def loss_formulas(variant: str) -> dict[str, Formula]:
    """Return the formulas of ``variant`` for models that predict tokens.

    Loss recovered is relative to two ablations, which replace the activation by zero and by the mean.
    """

    def mean_per_token(name: str) -> Formula:
        return lambda sums: sums[name] / sums["tokens"]

    ce, kl, clean = (
        mean_per_token(f"ce_{variant}"),
        mean_per_token(f"kl_{variant}"),
        mean_per_token(f"ce_{CLEAN_VARIANT}"),
    )

    def ce_recovered(ablation: str) -> Formula:
        ablated_ce = mean_per_token(f"ce_{ablation}")
        return lambda sums: (ablated_ce(sums) - ce(sums)) / (ablated_ce(sums) - clean(sums))

    def kl_recovered(ablation: str) -> Formula:
        ablated_kl = mean_per_token(f"kl_{ablation}")
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


MODEL_FORMULAS: dict[str, Formula] = {
    "ce_clean": lambda sums: sums[f"ce_{CLEAN_VARIANT}"] / sums["tokens"],
    "ce_zero": lambda sums: sums[f"ce_{ZERO_VARIANT}"] / sums["tokens"],
    "ce_mean": lambda sums: sums[f"ce_{MEAN_VARIANT}"] / sums["tokens"],
    "kl_zero": lambda sums: sums[f"kl_{ZERO_VARIANT}"] / sums["tokens"],
    "kl_mean": lambda sums: sums[f"kl_{MEAN_VARIANT}"] / sums["tokens"],
}
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
