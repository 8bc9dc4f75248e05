"""Loss recovered, the real one: what the model's predictions lose when an activation is replaced by its reconstruction.

Causal models: cross-entropy and KL of the next token. Masked ones: of masked tokens alone. Models without such a head:
the pooled output and the final hidden state. Every variant is spliced in at the same positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saetrain.activations.capture import length_batches, pad_batch
from saetrain.activations.head import HeadModel, token_log_probs
from saetrain.activations.splice import put, spliced
from saetrain.data.masking import masked_positions
from saetrain.errors import SaetrainError
from saetrain.evaluation.bootstrap import AT_MOST_ONE, COSINE, NOT_NEGATIVE, DocumentSums, Formula, Range
from saetrain.types import TokenSequence

LOGITS = 1 << 26
"""Numbers of the vocabulary's logits that are held at once."""
SMALL_NATS = 0.05
"""Loss of an ablation below which a ratio to it is noise."""

Replace = Callable[[Tensor], Tensor]
"""Activations (n, D) -> what stands in their place."""
CLEAN, SAE, ZERO, MEAN = "clean", "sae", "zero", "mean"


@dataclass(frozen=True)
class SplicePolicy:
    """Which positions are replaced: those that ``keep`` names, (S,) bool of a sequence, up to a norm of ``limit``."""

    keep: Callable[[TokenSequence], np.ndarray]
    limit: float = float("inf")

    def where(self, x_BSD: Tensor, keep_BS: Tensor) -> Tensor:
        """(B, S) bool."""
        return keep_BS & (x_BSD.float().norm(dim=-1) <= self.limit)


@dataclass(frozen=True)
class Question:
    """One batch for the model: its input, and which outputs are scored against what.

    ``keep`` (B, S) positions that may be replaced; ``scored`` (B, S) positions whose output counts; ``targets`` (n,)
    the right tokens there; ``docs`` (n,) whose they are.
    """

    ids: Tensor
    mask: Tensor
    keep: Tensor
    scored: Tensor
    targets: Tensor
    docs: np.ndarray


class LossScorer:
    """Scores variants {name: replacement} of the activation at one hookpoint; sums of each are kept by document."""

    def __init__(
        self,
        head: HeadModel,
        hookpoint: str,
        variants: Mapping[str, Replace],
        policy: SplicePolicy,
        replicates: int,
        seed: int,
    ) -> None:
        self._head, self._variants, self._policy = head, variants, policy
        self._module = head.base.module.get_submodule(hookpoint)
        self.sums = DocumentSums(replicates, seed)
        self.pooled = DocumentSums(replicates, seed)
        """Sums over sequences instead of tokens."""
        self.tokens = 0

    @torch.no_grad()
    def add(self, question: Question, clean: Tensor) -> None:
        """Count a batch; ``clean`` is what :func:`answer` gave without a splice."""
        if self._head.kind == "none":
            self._add_hidden(question, clean)
        else:
            self._add_losses(question, clean)
        self.tokens += len(question.docs)

    def _spliced(self, question: Question, variant: str) -> Tensor:
        """The model's answer with ``variant`` in the activation's place."""

        def replace(x_BSD: Tensor) -> Tensor:
            where = self._policy.where(x_BSD, question.keep)
            return put(x_BSD, where, self._variants[variant](x_BSD[where].float()))

        with spliced(self._module, replace):
            return answer(self._head, question)

    def _add_losses(self, question: Question, clean: Tensor) -> None:
        targets = question.targets.unsqueeze(1)
        terms = {"tokens": torch.ones(len(targets)), f"ce_{CLEAN}": -clean.gather(1, targets).squeeze(1)}
        for name in self._variants:
            log_probs = self._spliced(question, name)
            terms[f"ce_{name}"] = -log_probs.gather(1, targets).squeeze(1)
            terms[f"kl_{name}"] = (clean.exp() * (clean - log_probs)).sum(dim=1)
        self.sums.add(question.docs, {name: value.cpu() for name, value in terms.items()})

    def _add_hidden(self, question: Question, clean: Tensor) -> None:
        real = question.scored
        pooled = _pool(clean, real)
        terms = {"tokens": torch.ones(len(question.docs)), "norm": clean[real].double().pow(2).sum(dim=1)}
        first = np.cumsum([0, *real.sum(dim=1).tolist()[:-1]])
        pools = {"sequences": torch.ones(len(real))}
        for name in self._variants:
            hidden = self._spliced(question, name)
            terms[f"error_{name}"] = (hidden[real].double() - clean[real].double()).pow(2).sum(dim=1)
            pools[f"cosine_{name}"] = torch.cosine_similarity(_pool(hidden, real), pooled, dim=1)
        self.sums.add(question.docs, {name: value.cpu() for name, value in terms.items()})
        self.pooled.add(question.docs[first], {name: value.cpu() for name, value in pools.items()})


def _pool(hidden_BSD: Tensor, real_BS: Tensor) -> Tensor:
    """Mean over a sequence's tokens, (B, D) fp64, as sentence encoders pool unless they say otherwise."""
    weights = real_BS.double().unsqueeze(-1)
    return (hidden_BSD.double() * weights).sum(dim=1) / weights.sum(dim=1)


def answer(head: HeadModel, question: Question) -> Tensor:
    """Log-probabilities (n, V) in fp32 at the scored positions, or of a model without a head the states (B, S, D)."""
    if head.kind == "none":
        return head.hidden(question.ids, question.mask)
    return token_log_probs(head.logits(question.ids, question.mask)[question.scored])


def questions(
    head: HeadModel,
    sequences: Iterable[TokenSequence],
    policy: SplicePolicy,
    mask_id: int | None,
    batch_tokens: int,
    seed: int,
) -> Iterator[Question]:
    """The batches over ``sequences``: next tokens of a causal model, masked tokens (``mask_id``) of a masked one."""
    sequences = list(sequences)
    vocabulary = head.base.config.get_text_config().vocab_size
    most = batch_tokens if head.kind == "none" else min(batch_tokens, max(1, LOGITS // vocabulary))
    for numbers in length_batches(sequences, most):
        question = _question(head, [sequences[number] for number in numbers], policy, mask_id, seed)
        if len(question.docs):
            yield question


def _question(
    head: HeadModel, chosen: list[TokenSequence], policy: SplicePolicy, mask_id: int | None, seed: int
) -> Question:
    ids, mask = pad_batch(chosen, head.base.device)
    keep, scored = np.zeros(ids.shape, dtype=bool), np.zeros(ids.shape, dtype=bool)
    targets, docs = [], []
    for row, sequence in enumerate(chosen):
        keep[row, : len(sequence)] = policy.keep(sequence)
        if head.kind == "causal":
            asked = np.arange(len(sequence)) < len(sequence) - 1
            right, whose = sequence.ids[1:], sequence.doc[1:]
        else:
            asked = masked_positions(sequence, seed) if head.kind == "masked" else np.ones(len(sequence), dtype=bool)
            right, whose = sequence.ids[asked], sequence.doc[asked]
        scored[row, : len(sequence)] = asked
        targets.append(right)
        docs.append(whose)
    where = torch.from_numpy(scored).to(ids.device)
    if head.kind == "masked":
        if mask_id is None:
            raise SaetrainError(f"model {head.base.name}: its tokenizer has no mask token, so no loss can be scored")
        ids = ids.masked_fill(where, mask_id)
    return Question(
        ids=ids,
        mask=mask,
        keep=torch.from_numpy(keep).to(ids.device),
        scored=where,
        targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)).to(ids.device),
        docs=np.concatenate(docs),
    )


def loss_formulas(variant: str) -> dict[str, Formula]:
    """Figures of ``variant`` where the model predicts tokens; ablations by zero and by the mean are what loses all."""

    def mean(name: str) -> Formula:
        return lambda sums: sums[name] / sums["tokens"]

    ce, kl, clean = mean(f"ce_{variant}"), mean(f"kl_{variant}"), mean(f"ce_{CLEAN}")

    def recovered(ablation: str) -> Formula:
        lost = mean(f"ce_{ablation}")
        return lambda sums: (lost(sums) - ce(sums)) / (lost(sums) - clean(sums))

    def kl_recovered(ablation: str) -> Formula:
        lost = mean(f"kl_{ablation}")
        return lambda sums: 1 - kl(sums) / lost(sums)

    return {
        "ce_spliced": ce,
        "delta_ce": lambda sums: ce(sums) - clean(sums),
        "ce_recovered_zero": recovered(ZERO),
        "ce_recovered_mean": recovered(MEAN),
        "kl": kl,
        "kl_recovered_zero": kl_recovered(ZERO),
        "kl_recovered_mean": kl_recovered(MEAN),
    }


ALONE: dict[str, Formula] = {
    "ce_clean": lambda sums: sums[f"ce_{CLEAN}"] / sums["tokens"],
    "ce_zero": lambda sums: sums[f"ce_{ZERO}"] / sums["tokens"],
    "ce_mean": lambda sums: sums[f"ce_{MEAN}"] / sums["tokens"],
    "kl_zero": lambda sums: sums[f"kl_{ZERO}"] / sums["tokens"],
    "kl_mean": lambda sums: sums[f"kl_{MEAN}"] / sums["tokens"],
}
"""Figures of the model itself."""
POSSIBLE: dict[str, Range] = {
    **dict.fromkeys((*ALONE, "ce_spliced", "kl", "final_hidden_error"), NOT_NEGATIVE),
    **dict.fromkeys(("kl_recovered_zero", "kl_recovered_mean"), AT_MOST_ONE),
    "pooled_cosine": COSINE,
}
"""Figure -> its range, where it has one."""


def small_denominator(sums: Mapping[str, Tensor], name: str) -> bool:
    """Whether figure ``name`` is a ratio to an ablation that costs the model next to nothing."""
    if "_recovered_" not in name:
        return False
    family, ablation = name.split("_recovered_")
    lost = ALONE[f"{family}_{ablation}"](sums) - (ALONE["ce_clean"](sums) if family == "ce" else 0.0)
    return bool(abs(lost) < SMALL_NATS)


def hidden_formulas(variant: str) -> dict[str, Formula]:
    """Figures of ``variant`` over tokens where the model predicts none."""
    return {"final_hidden_error": lambda sums: (sums[f"error_{variant}"] / sums["norm"]).sqrt()}


def pooled_formulas(variant: str) -> dict[str, Formula]:
    """The same over sequences."""
    return {"pooled_cosine": lambda sums: sums[f"cosine_{variant}"] / sums["sequences"]}


def every_token(sequence: TokenSequence) -> np.ndarray:
    """(S,) all true: the policy that replaces all positions."""
    return np.ones(len(sequence), dtype=bool)
