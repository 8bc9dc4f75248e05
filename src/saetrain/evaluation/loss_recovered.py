"""Loss recovered: how much worse the model predicts when reconstructions replace its activations at a hookpoint.

Causal models are scored by cross-entropy and KL of the next token, masked models by those of the masked tokens.
Models without such a head are scored by their pooled output and final hidden state. All variants (SAE, ablations,
baselines) are spliced in at the same positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saetrain.activations.capture import batch_by_length, pad_batch
from saetrain.activations.lm_head import LMHeadModel, token_log_probs
from saetrain.activations.splice import replace_positions, splice_output
from saetrain.data.mlm_masking import select_masked_positions
from saetrain.errors import SaetrainError
from saetrain.evaluation.bootstrap import AT_MOST_ONE, COSINE_RANGE, NON_NEGATIVE, DocumentSums, Formula, ValueRange
from saetrain.types import TokenSequence

MAX_LOGITS = 1 << 26
"""Largest number of logits per batch, tokens times V; bounds the memory."""
MIN_ABLATION_NATS = 0.05
"""Loss increase of an ablation, in nats, below which a ratio to it is mostly noise."""

ReplaceFn = Callable[[Tensor], Tensor]
"""Maps activations (N, D) to their replacement."""
CLEAN_VARIANT, SAE_VARIANT, ZERO_VARIANT, MEAN_VARIANT = "clean", "sae", "zero", "mean"


@dataclass(frozen=True)
class SplicePolicy:
    """The replaced positions: those in ``keep_mask`` of a sequence, (S,) bool, with a norm up to ``norm_limit``."""

    keep_mask: Callable[[TokenSequence], np.ndarray]
    norm_limit: float = float("inf")

    def splice_mask(self, x_BSD: Tensor, keep_BS: Tensor) -> Tensor:
        """Return the mask of the replaced positions, (B, S) bool."""
        return keep_BS & (x_BSD.float().norm(dim=-1) <= self.norm_limit)


@dataclass(frozen=True)
class LMBatch:
    """A batch of B sequences for the model, with the positions that are replaced and those that are scored.

    ``keep_mask`` (B, S) marks positions that may be replaced, ``scored_mask`` (B, S) the N positions whose output is
    scored. ``targets`` (N,) are the correct tokens there, and ``doc_ids`` (N,) their documents.
    """

    input_ids: Tensor
    attention_mask: Tensor
    keep_mask: Tensor
    scored_mask: Tensor
    targets: Tensor
    doc_ids: np.ndarray


class LossScorer:
    """Scores variants {name: replacement} of the activation at one hookpoint; sums are kept per document."""

    def __init__(
        self,
        head: LMHeadModel,
        hookpoint: str,
        variants: Mapping[str, ReplaceFn],
        policy: SplicePolicy,
        replicates: int,
        seed: int,
    ) -> None:
        self._head, self._variants, self._policy = head, variants, policy
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
        self.n_tokens += len(lm_batch.doc_ids)

    def _run_spliced(self, lm_batch: LMBatch, variant: str) -> Tensor:
        """Return the model's outputs with the activation replaced by ``variant``."""

        def replace_activation(x_BSD: Tensor) -> Tensor:
            mask_BS = self._policy.splice_mask(x_BSD, lm_batch.keep_mask)
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
        self.token_sums.add(lm_batch.doc_ids, {name: value.cpu() for name, value in terms.items()})

    def _add_hidden_errors(self, lm_batch: LMBatch, clean_BSD: Tensor) -> None:
        mask_BS = lm_batch.scored_mask
        clean_pooled = _mean_pool(clean_BSD, mask_BS)
        terms = {"tokens": torch.ones(len(lm_batch.doc_ids)), "norm": clean_BSD[mask_BS].double().pow(2).sum(dim=1)}
        first_tokens = np.cumsum([0, *mask_BS.sum(dim=1).tolist()[:-1]])
        sequence_terms = {"sequences": torch.ones(len(mask_BS))}
        for name in self._variants:
            hidden_BSD = self._run_spliced(lm_batch, name)
            terms[f"error_{name}"] = (hidden_BSD[mask_BS].double() - clean_BSD[mask_BS].double()).pow(2).sum(dim=1)
            sequence_terms[f"cosine_{name}"] = torch.cosine_similarity(
                _mean_pool(hidden_BSD, mask_BS), clean_pooled, dim=1
            )
        self.token_sums.add(lm_batch.doc_ids, {name: value.cpu() for name, value in terms.items()})
        self.sequence_sums.add(
            lm_batch.doc_ids[first_tokens], {name: value.cpu() for name, value in sequence_terms.items()}
        )


def _mean_pool(hidden_BSD: Tensor, mask_BS: Tensor) -> Tensor:
    """Return the mean over the tokens of each sequence, (B, D) in fp64, the usual pooling of sentence encoders."""
    weights = mask_BS.double().unsqueeze(-1)
    return (hidden_BSD.double() * weights).sum(dim=1) / weights.sum(dim=1)


def model_outputs(head: LMHeadModel, lm_batch: LMBatch) -> Tensor:
    """Return the log-probabilities at the scored positions, (N, V) in fp32; without a head, the states (B, S, D)."""
    if head.kind == "none":
        return head.compute_final_hidden(lm_batch.input_ids, lm_batch.attention_mask)
    return token_log_probs(head.compute_logits(lm_batch.input_ids, lm_batch.attention_mask)[lm_batch.scored_mask])


def iter_lm_batches(
    head: LMHeadModel,
    sequences: Iterable[TokenSequence],
    policy: SplicePolicy,
    mask_id: int | None,
    batch_tokens: int,
    seed: int,
) -> Iterator[LMBatch]:
    """Yield batches over ``sequences`` that score next tokens (causal model) or masked tokens (masked model).

    Args:
        head: the model, which decides what is scored.
        sequences: sequences of tokens.
        policy: positions that are replaced.
        mask_id: id of the mask token; required by masked models.
        batch_tokens: largest number of tokens per batch; fewer if the logits would be too large.
        seed: seed of the masked positions.

    Raises:
        SaetrainError: if the model is masked and ``mask_id`` is None.
    """
    sequences = list(sequences)
    vocabulary = head.base.config.get_text_config().vocab_size
    max_batch_tokens = batch_tokens if head.kind == "none" else min(batch_tokens, max(1, MAX_LOGITS // vocabulary))
    for indices in batch_by_length(sequences, max_batch_tokens):
        lm_batch = _build_lm_batch(head, [sequences[index] for index in indices], policy, mask_id, seed)
        if len(lm_batch.doc_ids):
            yield lm_batch


def _build_lm_batch(
    head: LMHeadModel, chosen: list[TokenSequence], policy: SplicePolicy, mask_id: int | None, seed: int
) -> LMBatch:
    input_ids, attention_mask = pad_batch(chosen, head.base.device)
    keep_BS, scored_BS = np.zeros(input_ids.shape, dtype=bool), np.zeros(input_ids.shape, dtype=bool)
    targets, docs = [], []
    for row, sequence in enumerate(chosen):
        keep_BS[row, : len(sequence)] = policy.keep_mask(sequence)
        if head.kind == "causal":
            scored_S = np.arange(len(sequence)) < len(sequence) - 1
            row_targets, row_docs = sequence.ids[1:], sequence.doc[1:]
        else:
            scored_S = (
                select_masked_positions(sequence, seed) if head.kind == "masked" else np.ones(len(sequence), dtype=bool)
            )
            row_targets, row_docs = sequence.ids[scored_S], sequence.doc[scored_S]
        scored_BS[row, : len(sequence)] = scored_S
        targets.append(row_targets)
        docs.append(row_docs)
    scored_mask = torch.from_numpy(scored_BS).to(input_ids.device)
    if head.kind == "masked":
        if mask_id is None:
            raise SaetrainError(f"model {head.base.name}: its tokenizer has no mask token, so the loss can't be scored")
        input_ids = input_ids.masked_fill(scored_mask, mask_id)
    return LMBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        keep_mask=torch.from_numpy(keep_BS).to(input_ids.device),
        scored_mask=scored_mask,
        targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)).to(input_ids.device),
        doc_ids=np.concatenate(docs),
    )


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


def keep_all_tokens(sequence: TokenSequence) -> np.ndarray:
    """Return a mask (S,) that is true everywhere, for policies that replace all positions."""
    return np.ones(len(sequence), dtype=bool)
