"""The model and the SAEs of a run on one prompt: tokens, the latents that fire, and what the model predicts."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saetrain.activations.capture import pad_batch
from saetrain.activations.lm_batches import MAX_LOGITS
from saetrain.activations.lm_head import HeadKind, token_log_probs
from saetrain.errors import SaetrainError, did_you_mean
from saetrain.explore.requests import ChangeRequest, PromptRequest
from saetrain.features.vocabulary import describe_tokens
from saetrain.runs.evaluate.setup import EvalContext
from saetrain.sae import SAE
from saetrain.splicing import splice
from saetrain.types import TokenKind, TokenSequence

MAX_PROMPT_TOKENS = 1024
MAX_SHOWN_LATENTS = 256
"""Latents per token that an answer contains, the strongest first."""
N_PREDICTIONS = 8
N_CHANGES = 10
VALUE_DIGITS = 4
"""Significant digits of activations and probabilities in an answer."""


@dataclass(frozen=True)
class Prompt:
    """A prompt of S tokens as the model reads it.

    ``ids`` and ``mask`` are (1, S) int64. ``kept`` (S,) bool: the SAE was trained on such tokens. ``is_cut``: the text
    has more tokens than were read.
    """

    ids: Tensor
    mask: Tensor
    kept: np.ndarray
    codes: list[list[tuple[int, float]]]
    """Per token the (latent, activation) that fire, the strongest first."""
    is_cut: bool


def resolve_kind(context: EvalContext) -> HeadKind:
    """Return what is predicted: next tokens, masked tokens, or none."""
    # Without a mask token, a masked language model can't be asked.
    lacks_mask = context.head.kind == "masked" and context.tokenizer.mask_token_id is None
    return "none" if lacks_mask else context.head.kind


def count_prompt_tokens(context: EvalContext) -> int:
    """Return how many tokens of a prompt are read at most."""
    limit = min(context.framing.ctx_len, MAX_PROMPT_TOKENS)
    if context.head.kind == "none":
        return limit
    return min(limit, max(1, MAX_LOGITS // int(context.head.base.config.get_text_config().vocab_size)))


def describe_model(context: EvalContext) -> dict[str, Any]:
    """Return what the page needs to know of the model."""
    return {
        "kind": resolve_kind(context),
        "mask_token": context.tokenizer.mask_token,
        "max_tokens": count_prompt_tokens(context),
    }


class PromptModel:
    """Answers the requests of the page, one at a time."""

    def __init__(self, context: EvalContext) -> None:
        self._context, self._head, self._tokenizer = context, context.head, context.tokenizer
        self._device, self.kind = context.head.base.device, resolve_kind(context)
        self._max_tokens = count_prompt_tokens(context)
        limits = context.extractor.norm_limits
        self._saes = {
            name: SAE(
                saved.coder.to(self._device).requires_grad_(False),
                saved.metadata.with_site(context.sites[name], limits),
                saved.folder,
            )
            for name, saved in context.loaded.saes.items()
        }
        # Hooks in the model belong to one request.
        self._lock = threading.RLock()

    @torch.no_grad()
    def encode_prompt(self, request: PromptRequest) -> dict[str, Any]:
        """Return tokens, the latents that fire on each, and predictions; SaetrainError for a wrong request.

        ``latents`` and ``values`` are the pairs of all tokens, one token after the other, ``shown`` of them per token;
        ``counts`` also counts the pairs that are left out. ``predictions``: per token the most probable next tokens,
        or tokens at a mask, with their probabilities; None where nothing is predicted.
        """
        with self._lock:
            prompt = self._read_prompt(request)
            predicted = self._predict_tokens(prompt)
        ids = [int(number) for number in prompt.ids[0].tolist()]
        top_ids = [number for row in predicted if row is not None for number, _ in row]
        texts = self._describe_tokens([*ids, *top_ids])
        shown = [pairs[:MAX_SHOWN_LATENTS] for pairs in prompt.codes]
        return {
            "tokens": [texts[number] for number in ids],
            "kept": prompt.kept.tolist(),
            "is_mask": self._find_masks(prompt).tolist(),
            "is_cut": prompt.is_cut,
            "counts": [len(pairs) for pairs in prompt.codes],
            "shown": [len(pairs) for pairs in shown],
            "latents": [latent for pairs in shown for latent, _ in pairs],
            "values": [round_value(value) for pairs in shown for _, value in pairs],
            "predictions": [
                None if row is None else [[texts[number], round_value(share)] for number, share in row]
                for row in predicted
            ],
        }

    @torch.no_grad()
    def measure_change(self, request: ChangeRequest) -> dict[str, Any]:
        """Return what scaling a latent changes in the model's output; SaetrainError for a wrong request.

        The SAE's error is kept. For a language model: the KL divergence in nats of the probabilities at ``position``,
        and the tokens whose probability changes most. For another model: the relative change of the final hidden
        states, √(Σ‖Δ‖² / Σ‖h‖²), and that of the tokens that change most.
        """
        with self._lock:
            prompt = self._read_prompt(request)
            sae, chosen = self._require_sae(request.sae), prompt.kept.copy()
            if request.only is not None:
                self._require_position(prompt, request.only)
                chosen &= np.arange(len(chosen)) == request.only
            self._require_output(prompt, request.position)
            fires = [any(latent == request.latent for latent, _ in pairs) for pairs in prompt.codes]
            before = self._compute_output(prompt, request.position)
            positions = torch.from_numpy(chosen).to(self._device)[None]
            with splice(self._head.module, sae, scale={request.latent: request.scale}, positions=positions):
                after = self._compute_output(prompt, request.position)
        found = {"fires_on": int((chosen & np.array(fires)).sum()), "tokens": int(chosen.sum())}
        if self.kind == "none":
            return {**found, **self._compare_hidden(before, after)}
        return {**found, **self._compare_probabilities(before, after)}

    def _require_sae(self, name: str) -> SAE:
        if name not in self._saes:
            raise SaetrainError(f"there is no SAE {name}.{did_you_mean(name, self._saes)}")
        return self._saes[name]

    def _require_position(self, prompt: Prompt, position: int) -> None:
        if position >= len(prompt.kept):
            raise SaetrainError(f"there is no token {position}: the prompt has {len(prompt.kept)} tokens")

    def _require_output(self, prompt: Prompt, position: int | None) -> None:
        """Raise SaetrainError unless the model predicts a token at ``position``, or predicts none at all."""
        if self.kind == "none":
            return
        if position is None:
            raise SaetrainError("the position of the prediction is missing")
        self._require_position(prompt, position)
        if self.kind == "masked" and not self._find_masks(prompt)[position]:
            raise SaetrainError(f"token {position} is not masked, so nothing is predicted there")

    def _tokenize_text(self, text: str) -> tuple[np.ndarray, np.ndarray, bool]:
        """Return (ids, special (S,) bool, whether the text was cut); special tokens in the text are recognized."""
        framing, limit = self._context.framing, self._max_tokens
        if framing.causal:
            ids = list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            if framing.bos is not None and ids[:1] != [framing.bos]:
                ids = [framing.bos, *ids]
            is_cut, found = len(ids) > limit, np.array(ids[:limit], np.int32)
            special = np.zeros(len(found), bool)
        else:
            encoded = self._tokenizer(
                text,
                truncation=True,
                max_length=limit,
                return_overflowing_tokens=True,
                return_special_tokens_mask=True,
            )
            is_cut, found = len(encoded["input_ids"]) > 1, np.array(encoded["input_ids"][0], np.int32)
            special = np.array(encoded["special_tokens_mask"][0], bool)
        if not len(found):
            raise SaetrainError("the text has no tokens")
        # A mask takes the place of text.
        marks = {*self._tokenizer.all_special_ids} - {self._tokenizer.unk_token_id, self._tokenizer.mask_token_id}
        return found, special | np.isin(found, list(marks)), is_cut

    def _read_prompt(self, request: PromptRequest) -> Prompt:
        sae = self._require_sae(request.sae)
        ids, special, is_cut = self._tokenize_text(request.text)
        if request.masked is not None:
            if self.kind != "masked" or request.masked >= len(ids) or special[request.masked]:
                raise SaetrainError(f"token {request.masked} can't be masked")
            ids[request.masked] = self._tokenizer.mask_token_id
        kinds = special.astype(np.uint8) * np.uint8(TokenKind.SPECIAL)
        if self._context.framing.causal:
            kinds[0] |= np.uint8(TokenKind.FIRST)
        sequence = TokenSequence(ids, kinds, np.zeros(len(ids), np.int64))
        ids_1S, mask_1S = pad_batch([sequence], self._device)
        extractor, site = self._context.extractor, sae.metadata.site
        assert site is not None
        captured = {name: value[0].float() for name, value in extractor.capture(ids_1S, mask_1S).items()}
        kept = extractor.keep(sequence).copy()
        for name in site.hookpoints:
            limit = extractor.norm_limits.get(name, float("inf"))
            kept &= (captured[name].norm(dim=1) <= limit).cpu().numpy()
        token, latent, value = (column.tolist() for column in sae.encode(site.select_xy(captured)[0]).active_pairs())
        codes: list[list[tuple[int, float]]] = [[] for _ in ids]
        for row, number, activation in zip(token, latent, value, strict=True):
            codes[row].append((number, activation))
        for pairs in codes:
            pairs.sort(key=lambda pair: -abs(pair[1]))
        return Prompt(ids_1S, mask_1S, kept, codes, is_cut)

    def _find_masks(self, prompt: Prompt) -> np.ndarray:
        """Return the masked positions, (S,) bool."""
        ids = prompt.ids[0].cpu().numpy()
        return ids == self._tokenizer.mask_token_id if self.kind == "masked" else np.zeros(len(ids), bool)

    def _predict_tokens(self, prompt: Prompt) -> list[list[tuple[int, float]] | None]:
        """Return per position the most probable (token id, probability), or None where nothing is predicted."""
        asked = np.full(len(prompt.kept), self.kind == "causal") | self._find_masks(prompt)
        out: list[list[tuple[int, float]] | None] = [None] * len(asked)
        if not asked.any():
            return out
        logits = self._head.compute_logits(prompt.ids, prompt.mask)[0, torch.from_numpy(asked).to(self._device)]
        top = token_log_probs(logits)[:, : len(self._tokenizer)].exp().topk(N_PREDICTIONS)
        for row, ids, shares in zip(np.flatnonzero(asked), top.indices.tolist(), top.values.tolist(), strict=True):
            out[row] = list(zip(ids, shares, strict=True))
        return out

    def _compute_output(self, prompt: Prompt, position: int | None) -> Tensor:
        """Return log-probabilities (V,) at ``position``, or the final hidden states (S, D), in fp64."""
        if self.kind == "none":
            return self._head.compute_final_hidden(prompt.ids, prompt.mask)[0].double()
        return self._head.compute_logits(prompt.ids, prompt.mask)[0, position].double().log_softmax(-1)

    def _compare_probabilities(self, before: Tensor, after: Tensor) -> dict[str, Any]:
        p, q = before.exp(), after.exp()
        # Tokens that are impossible before and after have an undefined term.
        kl = max(0.0, float((p * (before - after)).nansum()))
        ids = (p - q).abs()[: len(self._tokenizer)].topk(N_CHANGES).indices.tolist()
        texts = self._describe_tokens(ids)
        return {
            "kl": kl,
            "changes": [{"token": texts[i], "before": float(p[i]), "after": float(q[i])} for i in ids],
        }

    def _compare_hidden(self, before: Tensor, after: Tensor) -> dict[str, Any]:
        moved, size = (after - before).square().sum(dim=1), before.square().sum(dim=1)
        share = (moved / size).sqrt()
        largest = share.topk(min(N_CHANGES, len(share))).indices.tolist()
        return {
            "relative_change": float((moved.sum() / size.sum()).sqrt()),
            "changes": [{"position": position, "change": float(share[position])} for position in largest],
        }

    def _describe_tokens(self, ids: Sequence[int]) -> dict[int, str]:
        distinct = sorted(set(ids))
        # A call of the tokenizer changes the truncation of calls in other threads.
        with self._lock:
            return dict(zip(distinct, describe_tokens(self._tokenizer, np.array(distinct)), strict=True))


def round_value(value: float) -> float:
    """Return ``value`` with VALUE_DIGITS significant digits."""
    return float(f"{value:.{VALUE_DIGITS}g}")
