"""Logit lens (nostalgebraist 2020): the tokens that each latent's decoder row makes more and less likely.

A decoder row d goes through the model's own final norm and head as √D d / ‖d‖, which has the scale of a normalized
hidden state. What they return for a zero vector is subtracted, because it is the same for every latent. For an encoder
without a head, the lens shows the tokens whose input embedding has the largest and smallest cosine with d.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from saetrain.activations.hookpoints import find_blocks
from saetrain.activations.lm_head import LMHeadModel
from saetrain.activations.splice import splice_output
from saetrain.errors import SaetrainError
from saetrain.features.weights import block_rows, find_largest

LENS_TOKENS = 8
LensKind = Literal["causal", "masked", "embedding", "none"]


@dataclass(frozen=True)
class Lens:
    """Token ids and logits (cosines if ``kind`` is `embedding`), each (F, LENS_TOKENS), or (F, 0) without a lens.

    ``top``: from the largest; ``bottom``: from the smallest. ``kind`` `none`: the rows are no hidden states.
    """

    kind: LensKind
    top_ids: np.ndarray
    top_logits: np.ndarray
    bottom_ids: np.ndarray
    bottom_logits: np.ndarray


def compute_lens(head: LMHeadModel, W_dec_FD: Tensor, n_tokens: int) -> Lens:
    """Return the lens of every row of the decoder, over the first ``n_tokens`` token ids."""
    kind, project = _build_projection(head, W_dec_FD.shape[1], n_tokens)
    if project is None:
        none = np.zeros((len(W_dec_FD), 0), dtype=np.float32)
        return Lens("none", none.astype(np.int32), none, none.astype(np.int32), none)
    parts = []
    for rows in W_dec_FD.split(block_rows(n_tokens)):
        logits = project(rows)
        count = min(LENS_TOKENS, logits.shape[1])
        (top, top_ids), (bottom, bottom_ids) = find_largest(logits, count), find_largest(logits.neg_(), count)
        parts.append((top_ids, top, bottom_ids, bottom.neg_()))
    found = [torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)]
    return Lens(kind, found[0].astype(np.int32), found[1], found[2].astype(np.int32), found[3])


def _build_projection(
    head: LMHeadModel, width: int, n_tokens: int
) -> tuple[LensKind, Callable[[Tensor], Tensor] | None]:
    """Return (kind of lens, function from decoder rows (N, D) to new logits (N, V)); None if widths differ."""
    if head.kind == "none":
        embedding = head.base.module.get_input_embeddings().weight  # type: ignore[operator]
        if embedding.shape[1] != width:
            return "none", None
        columns = normalize(embedding[:n_tokens].float(), dim=1, eps=1e-30).T
        return "embedding", lambda rows: normalize(rows.float(), dim=1, eps=1e-30) @ columns
    if head.base.config.get_text_config().hidden_size != width:
        return "none", None
    zero = compute_head_logits(head, torch.zeros(1, width, device=head.base.device))

    def project_rows(rows: Tensor) -> Tensor:
        scaled = normalize(rows.float(), dim=1, eps=1e-30) * width**0.5
        return (compute_head_logits(head, scaled) - zero)[:, :n_tokens].contiguous()

    return head.kind, project_rows


@torch.no_grad()
def compute_head_logits(head: LMHeadModel, hidden_ND: Tensor) -> Tensor:
    """Return the logits (N, V) in fp32 that the model computes if its last layer returns ``hidden_ND``.

    The model itself runs on a single token, so that any family's final norm and head are used as they are.
    """
    _, blocks = find_blocks(head.base)
    ids = torch.zeros(1, 1, dtype=torch.long, device=head.base.device)
    with splice_output(blocks[-1], lambda output: hidden_ND.unsqueeze(0)):
        logits = head.compute_logits(ids, torch.ones_like(ids))
    if logits.numel() != len(hidden_ND) * logits.shape[-1]:
        raise SaetrainError(f"model {head.base.name}: its head does not work on single positions ({logits.shape})")
    return logits.reshape(len(hidden_ND), -1).float()
