"""Collections on small models, with what a plain loop over tokens finds on the same text."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saetrain.activations.capture import ActivationCapture, pad_batch
from saetrain.activations.extract import ActivationExtractor
from saetrain.activations.lm_head import LMHeadModel, load_model_with_head
from saetrain.activations.model import ModelSettings
from saetrain.coders import SparseCoder
from saetrain.coders.topk import TopK
from saetrain.data.sharded import build_token_policy
from saetrain.data.tokenize import load_tokenizer
from saetrain.features import collect, pairs, weights
from saetrain.features.build import FeatureBuilder
from saetrain.features.collect import Target, read_text
from saetrain.features.features import Features
from saetrain.features.lens import compute_lens
from saetrain.features.store import write_metadata, write_stream
from saetrain.types import ModelBatch, Site, TokenKind, TokenSequence
from tests.architectures.abs_topk import AbsTopK
from tests.architectures.relu_l1 import ReluL1
from tests.architectures.threshold import Threshold

D, F = 32, 61
CASES = {
    "causal": ("tiny_gpt2", "h.1"),
    "signed": ("tiny_gpt2", "h.2"),
    "encoder": ("tiny_bert", "encoder.layer.3"),
    "transcoder": ("tiny_bert", "encoder.layer.2.intermediate"),
    "crosscoder": ("tiny_gpt2", "h.0"),
}


@dataclass
class Firing:
    """A latent's activation on a kept token of the text."""

    row: int
    value: float


@dataclass
class Collection:
    """Collected features, and what they are collected from: `y` (N, D_out) of the rows `kept`, firings by latent."""

    features: Features
    coder: SparseCoder
    head: LMHeadModel
    sequences: list[TokenSequence]
    kept: np.ndarray
    y_ND: Tensor
    firings: dict[int, list[Firing]]

    def column(self, name: str) -> np.ndarray:
        """A number per row of the stream."""
        if name == "position":
            return np.concatenate([np.arange(len(sequence)) for sequence in self.sequences])
        if name == "sequence":
            return np.repeat(np.arange(len(self.sequences)), list(map(len, self.sequences)))
        return np.concatenate([getattr(sequence, name) for sequence in self.sequences])


def build_coder(case: str) -> tuple[SparseCoder, Site]:
    hookpoint = CASES[case][1]
    site, coder = Site.of_sae(hookpoint), None
    torch.manual_seed(3)
    if case == "causal":
        coder = TopK(D, F, 5)
    elif case == "signed":
        coder = AbsTopK(D, F, 6, 0, None)
    elif case == "encoder":
        coder = ReluL1(D, F, 0.1, 0, None)
    elif case == "transcoder":
        site = Site((f"{hookpoint}:in",), (hookpoint,))
        coder = Threshold(D, F, 4, 0, 2 * D)
        coder.threshold.fill_(0.9)
    else:
        site = Site(("h.0", "h.1"), ("h.0", "h.1"))
        coder = TopK(2 * D, F, 3)
    with torch.no_grad():
        coder.W_enc.mul_(3 * torch.rand(F) + 0.2)
        coder.b_enc.copy_(0.3 * torch.randn(F) - (1.2 if case == "encoder" else 0))
        coder.b_enc[7] = -1e9 if case != "signed" else 0
    return coder.requires_grad_(False), site


def make_batches(n_sequences: int, vocabulary: int, seed: int = 0) -> list[ModelBatch]:
    """Sequences of different lengths with few different tokens, several documents in one and one in several."""
    rng = np.random.default_rng(seed)
    sequences = []
    for number in range(n_sequences):
        length = int(rng.integers(3, 40))
        kind = np.zeros(length, dtype=np.uint8)
        kind[0] = TokenKind.FIRST
        kind[-1] = TokenKind.SPECIAL
        doc = np.full(length, number // 2, dtype=np.int64)
        doc[length // 2 :] += number % 3 == 0
        ids = (vocabulary * rng.random(length) ** 4).astype(np.int32)
        sequences.append(TokenSequence(ids, kind, doc))
    return [sequences[start : start + 5] for start in range(0, n_sequences, 5)]


def build_extractor(head: LMHeadModel, site: Site) -> ActivationExtractor:
    capture = ActivationCapture(head.base, list(site.hookpoints))
    extractor = ActivationExtractor(capture, build_token_policy(True, True), 256)
    extractor.set_norm_limits({site.hookpoints[-1]: 1e9})
    return extractor


def write_collection(
    folder: Path, model: str, coder: SparseCoder, site: Site, batches: list[ModelBatch], **options: Any
) -> LMHeadModel:
    """Collect and write all files of one SAE to ``folder``."""
    head, tokenizer = load_model_with_head(model, ModelSettings(device="cpu")), load_tokenizer(model, None, False)
    (folder / "temporary").mkdir(parents=True)
    extractor = build_extractor(head, site)
    stream, sums = read_text({"sae": Target(site, coder)}, extractor, iter(batches), folder / "temporary")
    lens = compute_lens(head, coder.W_dec, len(tokenizer))
    builder = FeatureBuilder(folder, stream, sums["sae"], lens, distinct=options.get("distinct", True))
    effects = np.full((coder.num_latents, 3), np.nan)
    effects[3] = 0.5, 0.25, 0.75
    builder.write_files(tokenizer, effects)
    write_stream(folder, stream)
    described = {"window_before": 16, "window_after": 8, "text": "held_out", "sae": "sae", "num_latents": F}
    write_metadata(folder, {**described, "kept_tokens": stream.n_kept})
    return head


@pytest.fixture(scope="package", params=CASES)
def collection(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """A collection with several runs of pairs and ranges of latents."""
    case = str(request.param)
    model = request.getfixturevalue(CASES[case][0])
    coder, site = build_coder(case)
    batches, folder = make_batches(33, 200), tmp_path_factory.mktemp("features") / case
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in (
            (pairs, "RUN_PAIRS", 300),
            (pairs, "RANGE_PAIRS", 500),
            (collect, "CHUNK_TOKENS", 50),
            (weights, "BLOCK_ENTRIES", 7 * F),
        ):
            patch.setattr(module, name, value)
        head = write_collection(folder, model, coder, site, batches)
    return encode_plainly(Features(folder), coder, site, head, batches)


def encode_plainly(
    features: Features, coder: SparseCoder, site: Site, head: LMHeadModel, batches: list[ModelBatch]
) -> Collection:
    capture, firings, ys, kept, start = (
        ActivationCapture(head.base, list(site.hookpoints)),
        defaultdict(list),
        [],
        [],
        0,
    )
    for batch in batches:
        captured = capture(*pad_batch(batch, head.base.device))
        for number, sequence in enumerate(batch):
            keep = np.flatnonzero((sequence.kind & (TokenKind.SPECIAL | TokenKind.FIRST)) == 0)
            x_ND, y_ND = site.select_xy({name: value[number][keep] for name, value in captured.items()})
            dense = coder.encode(x_ND).to_dense()
            for place, latent in dense.nonzero().tolist():
                firings[latent].append(Firing(start + int(keep[place]), float(dense[place, latent])))
            ys.append(y_ND)
            kept.append(start + keep)
            start += len(sequence)
    sequences = [sequence for batch in batches for sequence in batch]
    return Collection(features, coder, head, sequences, np.concatenate(kept), torch.cat(ys), dict(firings))
