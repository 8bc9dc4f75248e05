"""The Python interface: ``saetrain.train`` and ``saetrain.load``, and SAEs with ``encode`` and ``encode_text``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saetrain import distributed
from saetrain.activations.capture import ActivationCapture, pad_batch
from saetrain.activations.model import BaseModel, ModelSettings, load_model
from saetrain.coders import DEFAULT_ARCHITECTURE, SparseCoder, architecture_name
from saetrain.data.tokenize import Framing, load_tokenizer
from saetrain.distributed import env
from saetrain.errors import SaetrainError
from saetrain.features.features import Features
from saetrain.interop.formats import load_sae
from saetrain.interop.metadata import SaeMetadata
from saetrain.interop.saetrain_format import describe_coder
from saetrain.types import Codes, Site, TokenKind, TokenSequence, group_by_length
from saetrain.untrusted import require_plain_text

MODEL_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class TokenCodes:
    """The codes of one text of S tokens.

    ``tokens``: S strings; ``offsets``: (S, 2), start and end of each token in the text; ``kept``: (S,) bool, tokens
    that the SAE's token policy keeps; ``codes``: the codes of all S tokens.
    """

    tokens: list[str]
    offsets: np.ndarray
    kept: np.ndarray
    codes: Codes

    def __repr__(self) -> str:
        """Return one line with the counts, because a text has thousands of values."""
        n_active = int(self.codes.firing_counts().sum())
        return f"TokenCodes({len(self.tokens)} tokens, {self.codes.n_latents} latents, {n_active} active values)"


class SAE:
    """A trained SAE that takes raw activations of its hookpoint.

    ``metadata``: what the SAE was trained on (model, hookpoint, data set, token policy, held-out metrics).
    """

    def __init__(self, coder: SparseCoder, metadata: SaeMetadata, path: Path) -> None:
        self.coder, self.metadata, self.path = coder, metadata, path
        self.d_in, self.num_latents = coder.d_in, coder.num_latents

    @property
    def hookpoint(self) -> str | None:
        """Module whose activations the SAE reconstructs, or None if the metadata do not name it."""
        return self.metadata.site.name if self.metadata.site is not None else None

    @property
    def W_dec(self) -> Tensor:
        """Decoder: one row per latent, (F, D)."""
        return self.coder.W_dec

    @cached_property
    def features(self) -> Features:
        """What was collected of each latent, ``features[latent]``; SaetrainError if it was not collected."""
        from saetrain.runs.run_dir import find_features_folder

        return Features(find_features_folder(self.path))

    def to(self, device: str | torch.device) -> SAE:
        """Move the weights to ``device``, and return the SAE."""
        self.coder.to(device)
        return self

    @torch.no_grad()
    def encode(self, x: Tensor) -> Codes:
        """Return the codes of raw activations of any float dtype, (N, D), or (batch, sequence, D) as N = B·S rows.

        Raises SaetrainError if the shape is wrong.
        """
        return self.coder.encode(self._flatten_activations(x, "encode"))

    def __call__(self, x: Tensor) -> Tensor:
        """Return the reconstruction of raw activations, in their shape."""
        return self.decode(self.encode(x), x).view(*x.shape[:-1], -1)

    @torch.no_grad()
    def decode(self, codes: Codes | Tensor, x: Tensor | None = None) -> Tensor:
        """Return the reconstruction (N, D) of codes, which are sparse or a dense tensor (N, F).

        ``x``: the activations of the codes, which a coder with a skip connection needs.
        """
        if isinstance(codes, Tensor):
            codes = Codes(codes, None, self.num_latents)
        return self.coder.decode(codes, None if x is None else self._flatten_activations(x, "decode"))

    def _flatten_activations(self, x: Tensor, caller: str) -> Tensor:
        """Return activations (…, D) as (N, D) on the coder's device; SaetrainError if the shape is wrong."""
        found = tuple(x.shape) if isinstance(x, Tensor) else f"a {type(x).__name__}"
        if not isinstance(x, Tensor) or x.dim() < 2 or x.shape[-1] != self.d_in:
            raise SaetrainError(f"{caller}: expected activations of shape (…, {self.d_in}), found {found}")
        return x.flatten(0, -2).to(self.coder.W_enc.device, torch.float32)

    def __repr__(self) -> str:
        described = ", ".join(f"{name}={value}" for name, value in describe_coder(self.coder).items())
        return f"SAE({described}, {self.metadata.hookpoint} of {self.metadata.model})"

    def encode_text(self, texts: str | list[str]) -> list[TokenCodes]:
        """Run the model that the SAE was trained on over ``texts``, and encode every token.

        Texts are truncated to the SAE's context length, with a warning. Raises SaetrainError if the model cannot be
        loaded, if it is not the model that the SAE was trained on, or if a text has no tokens.
        """
        model, tokenizer, capture, framing, site = self._loaded_model
        texts = [texts] if isinstance(texts, str) else texts
        tokenized = [self._tokenize_text(text, tokenizer, framing) for text in texts]
        sequences = [sequence for sequence, _, _ in tokenized]
        n_truncated = sum(is_truncated for _, _, is_truncated in tokenized)
        if n_truncated:
            warnings.warn(
                f"encode_text: truncated {n_truncated} of {len(texts)} texts to {framing.ctx_len} tokens, the context "
                "length of the SAE; split longer texts yourself",
                stacklevel=2,
            )
        out: dict[int, TokenCodes] = {}
        for numbers in group_by_length([len(sequence) for sequence in sequences], MODEL_BATCH_TOKENS):
            ids, mask = pad_batch([sequences[n] for n in numbers], model.device)
            captured = {name: value[mask.bool()].float() for name, value in capture(ids, mask).items()}
            codes, start = self.encode(site.select_xy(captured)[0]), 0
            for number in numbers:
                sequence, offsets, _ = tokenized[number]
                rows = slice(start, start + len(sequence))
                out[number] = TokenCodes(
                    tokenizer.convert_ids_to_tokens(sequence.ids.tolist()),
                    offsets,
                    self._keep_mask(sequence, {name: value[rows] for name, value in captured.items()}),
                    codes.select_tokens(rows),
                )
                start += len(sequence)
        return [out[number] for number in range(len(texts))]

    @cached_property
    def _loaded_model(self) -> tuple[BaseModel, Any, ActivationCapture, Framing, Site]:
        metadata = self.metadata
        model_name, site, ctx_len, causal = metadata.model, metadata.site, metadata.ctx_len, metadata.causal
        if model_name is None or site is None or ctx_len is None or causal is None:
            raise SaetrainError(
                f"encode_text: the metadata of the SAE in {self.path} do not describe its model and text completely; "
                "compute the activations yourself and pass them to encode"
            )
        settings = ModelSettings(
            revision=metadata.model_revision, dtype=metadata.model_dtype, device=str(self.coder.W_enc.device)
        )
        model = load_model(model_name, settings)
        metadata.require_model(model, self.path)
        tokenizer = load_tokenizer(model_name, metadata.model_revision, trust_remote_code=False)
        framing = Framing.from_tokenizer(tokenizer, causal, ctx_len)
        return model, tokenizer, ActivationCapture(model, list(site.hookpoints)), framing, site

    def _tokenize_text(self, text: str, tokenizer: Any, framing: Framing) -> tuple[TokenSequence, np.ndarray, bool]:
        """Return the tokens, the offsets of each in the text, and whether the text was truncated."""
        encoded = tokenizer(
            text,
            truncation=True,
            max_length=framing.ctx_len,
            return_special_tokens_mask=True,
            split_special_tokens=True,
            return_offsets_mapping=True,
        )
        kinds = np.asarray(encoded["special_tokens_mask"], dtype=np.uint8) * np.uint8(TokenKind.SPECIAL)
        if framing.causal and len(kinds):
            kinds[0] |= np.uint8(TokenKind.FIRST)
        ids = np.asarray(encoded["input_ids"], dtype=np.int32)
        if not len(ids):
            raise SaetrainError(f"encode_text: the text {text!r} has no tokens")
        sequence = TokenSequence(ids, kinds, np.zeros(len(ids), dtype=np.int64))
        return sequence, np.asarray(encoded["offset_mapping"]), bool(encoded.encodings[0].overflowing)

    def _keep_mask(self, sequence: TokenSequence, captured: Mapping[str, Tensor]) -> np.ndarray:
        metadata = self.metadata
        excluded = np.uint8(
            metadata.exclude_special_tokens * TokenKind.SPECIAL | metadata.exclude_sinks * TokenKind.FIRST
        )
        kept = (sequence.kind & excluded) == 0
        for name, x_SD in captured.items():
            limit = metadata.norm_limit if metadata.norm_limits is None else metadata.norm_limits.get(name)
            if limit is not None:
                kept &= (x_SD.norm(dim=1) <= limit).cpu().numpy()
        return np.asarray(kept)


def load(path: str | Path, device: str = "cpu", *, hookpoint: str | None = None, revision: str | None = None) -> SAE:
    """Load an SAE in the format of saetrain, SAELens, sparsify, dictionary_learning or Gemma Scope.

    Args:
        path: folder of the SAE (``…/sae/<hookpoint>``), run directory, or repository ``USER/REPO`` on the hub.
        device: where to put the weights.
        hookpoint: name of the SAE in the run or repository, if there are several.
        revision: branch, tag or commit of the repository.

    Only JSON and tensors are read, and nothing from the hub is executed. If the SAE has an architecture of your own,
    import its module first. Raises SaetrainError if the SAE is missing or broken.
    """
    from saetrain.runs.evaluate.load_saes import locate_saes

    place = require_plain_text(str(path), "load:")
    (folder,) = locate_saes(place, hookpoint, revision, only_one=True).values()
    coder, metadata = load_sae(folder)
    return SAE(coder.to(device), metadata, folder)


def train(
    model: str,
    dataset: str | Sequence[str],
    *,
    architecture: str | type[SparseCoder] = DEFAULT_ARCHITECTURE,
    **settings: Any,
) -> dict[str, SAE]:
    """Train SAEs as ``saetrain MODEL DATASET`` does, and return {name in the run: SAE}.

    Args:
        model: hub id or local folder of a transformer.
        dataset: hub ids, local folders or files; one or several.
        architecture: name of an architecture, or a subclass of ``SparseCoder``.
        settings: the flags of the command line without dashes, such as ``layers=[6]``, ``k=32``, ``lr="auto"``.

    Under torchrun, ranks other than 0 return an empty dictionary, because the SAEs may be on the disk of rank 0 only.
    Raises SaetrainError for settings that are not allowed, and for what the command line refuses.
    """
    from saetrain.config import from_flat
    from saetrain.runs.evaluate.load_saes import load_saes
    from saetrain.runs.train.run import train_saes

    name = architecture if isinstance(architecture, str) else architecture_name(architecture)
    data_sets = [dataset] if isinstance(dataset, str) else list(dataset)
    values = {"model": model, "dataset": data_sets, "architecture": name, **settings}
    config = from_flat(values, "saetrain.train")
    with distributed.process_group_context():
        directory, is_rank0 = train_saes(config), env.rank() == 0
    if config.dry_run or not is_rank0:
        return {}
    return {name: SAE(sae.coder, sae.metadata, sae.folder) for name, sae in load_saes(str(directory)).saes.items()}
