"""The Python interface: ``saetrain.train`` and ``saetrain.load``, and SAEs with ``encode`` and ``encode_text``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saetrain import distributed
from saetrain.activations.capture import ActivationCapture, batch_by_length, pad_batch
from saetrain.activations.model import BaseModel, ModelSettings, load_model
from saetrain.coders import SparseCoder, architecture_name
from saetrain.data.tokenize import Framing, load_tokenizer
from saetrain.distributed import env
from saetrain.errors import SaetrainError
from saetrain.interop.formats import load_sae
from saetrain.interop.metadata import SaeMetadata
from saetrain.interop.saetrain_format import describe_coder
from saetrain.types import Codes, TokenKind, TokenSequence

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


class SAE:
    """A trained SAE that takes raw activations of its hookpoint.

    ``metadata``: what the SAE was trained on (model, hookpoint, data set, token policy, held-out metrics).
    """

    def __init__(self, coder: SparseCoder, metadata: SaeMetadata, path: Path) -> None:
        self.coder, self.metadata, self.path = coder, metadata, path
        self.d_in, self.num_latents = coder.d_in, coder.num_latents

    @torch.no_grad()
    def encode(self, x_ND: Tensor) -> Codes:
        """Return the codes of raw activations (N, D) of any float dtype; SaetrainError if the shape is wrong."""
        found = tuple(x_ND.shape) if isinstance(x_ND, Tensor) else f"a {type(x_ND).__name__}"
        if not isinstance(x_ND, Tensor) or x_ND.dim() != 2 or x_ND.shape[1] != self.d_in:
            raise SaetrainError(f"encode: expected a tensor of activations of shape (N, {self.d_in}), found {found}")
        return self.coder.encode(x_ND.to(self.coder.W_enc.device, torch.float32))

    @torch.no_grad()
    def decode(self, codes: Codes | Tensor) -> Tensor:
        """Return the reconstruction (N, D) of codes, which are sparse or a dense tensor (N, F)."""
        if isinstance(codes, Tensor):
            codes = Codes(codes, None, self.num_latents)
        return self.coder.decode(codes)

    def __repr__(self) -> str:
        described = ", ".join(f"{name}={value}" for name, value in describe_coder(self.coder).items())
        return f"SAE({described}, {self.metadata.hookpoint} of {self.metadata.model})"

    def encode_text(self, texts: str | list[str]) -> list[TokenCodes]:
        """Run the model that the SAE was trained on over ``texts``, and encode every token.

        Texts are truncated to the SAE's context length. Raises SaetrainError if the model cannot be loaded, if it is
        not the model that the SAE was trained on, or if a text has no tokens.
        """
        model, tokenizer, capture, framing = self._loaded_model
        texts = [texts] if isinstance(texts, str) else texts
        tokenized = [self._tokenize_text(text, tokenizer, framing) for text in texts]
        sequences = [sequence for sequence, _ in tokenized]
        out: dict[int, TokenCodes] = {}
        for numbers in batch_by_length(sequences, MODEL_BATCH_TOKENS):
            ids, mask = pad_batch([sequences[n] for n in numbers], model.device)
            x_ND = capture(ids, mask)[capture.hookpoints[0]][mask.bool()].float()
            codes, start = self.encode(x_ND), 0
            for number in numbers:
                sequence, offsets = tokenized[number]
                rows = slice(start, start + len(sequence))
                out[number] = TokenCodes(
                    tokenizer.convert_ids_to_tokens(sequence.ids.tolist()),
                    offsets,
                    self._keep_mask(sequence, x_ND[rows]),
                    codes.select_tokens(rows),
                )
                start += len(sequence)
        return [out[number] for number in range(len(texts))]

    @cached_property
    def _loaded_model(self) -> tuple[BaseModel, Any, ActivationCapture, Framing]:
        metadata = self.metadata
        model_name, hookpoint, ctx_len, causal = metadata.model, metadata.hookpoint, metadata.ctx_len, metadata.causal
        if model_name is None or hookpoint is None or ctx_len is None or causal is None:
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
        return model, tokenizer, ActivationCapture(model, [hookpoint]), framing

    def _tokenize_text(self, text: str, tokenizer: Any, framing: Framing) -> tuple[TokenSequence, np.ndarray]:
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
        return TokenSequence(ids, kinds, np.zeros(len(ids), dtype=np.int64)), np.asarray(encoded["offset_mapping"])

    def _keep_mask(self, sequence: TokenSequence, x_SD: Tensor) -> np.ndarray:
        metadata = self.metadata
        excluded = np.uint8(
            metadata.exclude_special_tokens * TokenKind.SPECIAL | metadata.exclude_sinks * TokenKind.FIRST
        )
        kept = (sequence.kind & excluded) == 0
        if metadata.norm_limit is not None:
            kept &= (x_SD.norm(dim=1) <= metadata.norm_limit).cpu().numpy()
        return np.asarray(kept)


def load(path: str | Path, device: str = "cpu") -> SAE:
    """Load the SAE in directory ``path`` (``…/sae/<hookpoint>``), in the format of saetrain, SAELens or sparsify.

    If the SAE has an architecture of your own, import its module first. Raises SaetrainError if the SAE is missing or
    broken.
    """
    folder = Path(path)
    coder, metadata = load_sae(folder)
    return SAE(coder.to(device), metadata, folder)


def train(
    model: str, dataset: str | Sequence[str], *, architecture: str | type[SparseCoder] = "topk", **settings: Any
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
