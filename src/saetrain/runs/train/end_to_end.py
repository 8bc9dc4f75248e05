"""End-to-end losses: the loss of the model's predictions when the SAE's reconstruction replaces the activation.

Causal models predict the next token, masked models the masked tokens. Braun et al., Identifying functionally
important features with end-to-end sparse dictionary learning, arXiv 2405.12241.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saetrain.activations.extract import ActivationExtractor
from saetrain.activations.lm_batches import LMBatch, scored_log_probs
from saetrain.activations.lm_head import LMHeadModel, load_model_with_head
from saetrain.activations.normalize import Normalizer
from saetrain.activations.splice import replace_positions, splice_output
from saetrain.config import RunConfig
from saetrain.errors import SaetrainError, is_out_of_memory
from saetrain.losses import cross_entropy, kl_divergence
from saetrain.training.steps.base import MicroBatch
from saetrain.training.trainer import TrainSettings
from saetrain.types import TokenGroups


def load_lm_head_model(config: RunConfig) -> LMHeadModel:
    """Load the model with its head; SaetrainError if it has no head that predicts tokens."""
    head = load_model_with_head(config.model, config.base)
    if head.kind == "none":
        what = f"is a {head.architecture}" if head.architecture else "names no architecture"
        raise SaetrainError(
            f"--loss_fn {config.train.loss_fn}: model {config.model} {what} and has no head that predicts tokens; "
            "use mse or fvu"
        )
    return head


def require_one_hookpoint(config: RunConfig, hookpoints: list[str]) -> None:
    """Raise SaetrainError for several hookpoints, because SAEs that are spliced together affect one another."""
    if len(hookpoints) > 1:
        raise SaetrainError(
            f"--loss_fn {config.train.loss_fn} trains one SAE at a time, but {len(hookpoints)} hookpoints are "
            f"selected ({', '.join(hookpoints[:3])}{', …' if len(hookpoints) > 3 else ''}); start one run per hookpoint"
        )


def require_mask_token(config: RunConfig, head: LMHeadModel, tokenizer: Any) -> None:
    """Raise SaetrainError if the model predicts masked tokens and the tokenizer has no mask token."""
    if head.kind == "masked" and tokenizer.mask_token_id is None:
        raise SaetrainError(
            f"--loss_fn {config.train.loss_fn}: model {config.model} predicts masked tokens, but its tokenizer has no "
            "mask token; use mse or fvu"
        )


@dataclass(frozen=True)
class _Splice:
    """A batch with the clean model's output (m, V); ``splice_mask``: (B, S) bool, positions that are replaced."""

    lm_batch: LMBatch
    splice_mask: Tensor
    clean_log_probs: Tensor | None
    n_scored: int


class SplicedBatchBuilder:
    """Builds micro-batches whose loss is the model's own; ``normalizer``: that of the hookpoint."""

    def __init__(
        self, head: LMHeadModel, extractor: ActivationExtractor, normalizer: Normalizer, settings: TrainSettings
    ) -> None:
        self._head, self._extractor, self._normalizer, self._settings = head, extractor, normalizer, settings
        (self._hookpoint,) = extractor.capture.hookpoints
        self._module = head.base.module.get_submodule(self._hookpoint)

    def build_batch(
        self,
        lm_batch: LMBatch,
        step_tokens: int,
        step_scored: int,
        build_groups: Callable[[Tensor], TokenGroups] | None = None,
    ) -> MicroBatch:
        """Return the micro-batch of ``lm_batch``.

        ``step_tokens``, ``step_scored``: kept tokens and scored positions of the whole optimizer step, by which the
        losses are divided. ``build_groups`` returns the groups of the positions of the rows, (B, S) bool.
        """
        x_BSD, clean_log_probs = self._run_clean_model(lm_batch)
        raw_ND = x_BSD[lm_batch.keep_mask]
        within_limits = self._extractor.mask_within_limits({self._hookpoint: raw_ND}, lm_batch.kept_docs)
        within_limits_N = torch.from_numpy(within_limits).to(x_BSD.device)
        splice_mask = lm_batch.keep_mask.clone()
        splice_mask[lm_batch.keep_mask] = within_limits_N
        splice = _Splice(lm_batch, splice_mask, clean_log_probs, max(step_scored, 1))
        x_ND = raw_ND[within_limits_N]
        groups = None if build_groups is None else build_groups(splice_mask)
        return MicroBatch(x_ND, x_ND, partial(self._loss_terms, splice), max(step_tokens, 1), groups)

    @torch.no_grad()
    def _run_clean_model(self, lm_batch: LMBatch) -> tuple[Tensor, Tensor | None]:
        """Return the activation (B, S, D), and for `kl` the clean model's log-probabilities (m, V)."""
        try:
            if self._settings.loss_fn == "ce":
                return self._extractor.capture(lm_batch.input_ids, lm_batch.attention_mask)[self._hookpoint], None
            seen: list[Tensor] = []

            def record_activation(x_BSD: Tensor) -> Tensor:
                seen.append(x_BSD)
                return x_BSD

            with splice_output(self._module, record_activation):
                log_probs = scored_log_probs(self._head, lm_batch)
            return seen[0], log_probs
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            rows, length = lm_batch.input_ids.shape
            raise SaetrainError(
                f"out of memory while the model read {rows} x {length} tokens: lower "
                f"{self._settings.suggest_smaller_batch()}"
            ) from error

    def _loss_terms(self, splice: _Splice, y_hat_ND: Tensor, coder_terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the model's loss, as a mean over the step's scored positions, and the coder's terms that are kept."""
        rows_ND = self._normalizer.denormalize(y_hat_ND)
        with splice_output(self._module, lambda x_BSD: replace_positions(x_BSD, splice.splice_mask, rows_ND)):
            log_probs = scored_log_probs(self._head, splice.lm_batch)
        if splice.clean_log_probs is None:
            loss = cross_entropy(log_probs, splice.lm_batch.targets)
        else:
            loss = kl_divergence(splice.clean_log_probs, log_probs)
        terms = {self._settings.loss_fn: loss / splice.n_scored, **coder_terms}
        recon = terms.pop("recon")
        if self._settings.e2e_recon_weight:
            terms["recon"] = self._settings.e2e_recon_weight * recon
        return terms
