"""Batches for a model with its head, against the positions, targets and documents written out token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saetrain.activations import lm_batches
from saetrain.activations.lm_batches import LMBatch, LMBatchBuilder, scored_log_probs
from saetrain.activations.lm_head import LMHeadModel, load_model_with_head
from saetrain.activations.mlm_masking import select_masked_positions
from saetrain.activations.model import ModelSettings
from saetrain.types import TokenKind, TokenSequence, batch_by_length

MASK_ID = 103
SEEDS = [3, 3, (1 << 64) - 1, 0]


@pytest.fixture(scope="module")
def sequences() -> list[TokenSequence]:
    """Unlike lengths, a special token first in each, two documents in all but the last, which is one token long."""
    out, rng = [], np.random.default_rng(0)
    for number, length in enumerate((20, 33, 60, 1)):
        kind = np.zeros(length, dtype=np.uint8)
        kind[0] = TokenKind.SPECIAL
        doc = np.where(np.arange(length) < 9, 2 * number, 2 * number + 1) + (1 << 40)
        out.append(TokenSequence(rng.integers(200, 900, length).astype(np.int32), kind, doc))
    return out


@pytest.fixture
def head(request: pytest.FixtureRequest) -> LMHeadModel:
    return load_model_with_head(request.getfixturevalue(request.param), ModelSettings(device="cpu"))


def keep_text(sequence: TokenSequence) -> np.ndarray:
    return sequence.kind == 0


def by_hand(kind: str, sequences: list[TokenSequence]) -> list[tuple[int, int, int, int]]:
    """(row, position, target, document of the target) of each scored position."""
    out = []
    for row, (sequence, seed) in enumerate(zip(sequences, SEEDS, strict=True)):
        for position in range(len(sequence)):
            at = position + 1 if kind == "causal" else position
            masked = kind != "masked" or select_masked_positions(sequence, seed)[position]
            if at < len(sequence) and masked:
                out.append((row, position, int(sequence.ids[at]), int(sequence.doc[at])))
    return out


def scored(batch: LMBatch) -> list[tuple[int, int, int, int]]:
    places = batch.scored_mask.nonzero().tolist()
    return [
        (row, position, target, doc)
        for (row, position), target, doc in zip(places, batch.targets.tolist(), batch.target_docs.tolist(), strict=True)
    ]


@pytest.mark.parametrize("head", ["tiny_gpt2", "tiny_mlm", "tiny_bert"], indirect=True)
def test_a_batch_equals_one_written_out(head: LMHeadModel, sequences: list[TokenSequence]) -> None:
    batch = LMBatchBuilder(head, keep_text, MASK_ID).build_batch(sequences, SEEDS)
    assert scored(batch) == by_hand(head.kind, sequences)
    assert len(batch.targets) > 10
    for row, sequence in enumerate(sequences):
        length = len(sequence)
        assert batch.attention_mask[row].tolist() == [1] * length + [0] * (60 - length)
        assert batch.keep_mask[row].tolist() == [False] + [True] * (length - 1) + [False] * (60 - length)
        ids = torch.from_numpy(sequence.ids).long()
        if head.kind == "masked":
            ids[batch.scored_mask[row, :length]] = MASK_ID
        assert torch.equal(batch.input_ids[row, :length], ids)
    assert batch.kept_docs.tolist() == [doc for sequence in sequences for doc in sequence.doc[1:].tolist()]


@pytest.mark.parametrize("head", ["tiny_mlm"], indirect=True)
def test_each_sequence_has_its_own_mask_seed(head: LMHeadModel, sequences: list[TokenSequence]) -> None:
    builder = LMBatchBuilder(head, keep_text, MASK_ID)
    twice = [sequences[2], sequences[2]]
    same, other = builder.build_batch(twice, [5, 5]), builder.build_batch(twice, [5, 6])
    assert torch.equal(same.scored_mask[0], same.scored_mask[1])
    assert torch.equal(other.scored_mask[0], same.scored_mask[0])
    assert not torch.equal(other.scored_mask[1], same.scored_mask[1])


@pytest.mark.parametrize("head", ["tiny_gpt2", "tiny_mlm"], indirect=True)
def test_batches_contain_each_sequence_once_and_bound_the_logits(
    head: LMHeadModel, sequences: list[TokenSequence], monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = LMBatchBuilder(head, keep_text, MASK_ID)
    whole = list(builder.iterate_batches(batch_by_length(sequences[:3], 1000), SEEDS[0]))
    assert [batch.input_ids.shape for batch in whole] == [(3, 60)]
    parts = list(builder.iterate_batches(batch_by_length(sequences, builder.limit_batch_tokens(70)), SEEDS[0]))
    assert [batch.input_ids.shape for batch in parts] == [(1, 60), (2, 33)], "the last one has nothing to score"
    vocabulary = head.base.config.get_text_config().vocab_size
    monkeypatch.setattr(lm_batches, "MAX_LOGITS", 40 * vocabulary)
    fewer = list(builder.iterate_batches(batch_by_length(sequences, builder.limit_batch_tokens(70)), SEEDS[0]))
    assert [batch.input_ids.shape for batch in fewer][:2] == [(1, 60), (1, 33)]
    assert all(batch.input_ids.numel() <= 60 for batch in fewer)
    for batches in (parts, fewer):
        for name in ("targets", "target_docs"):
            found, expected = (np.sort(np.concatenate([getattr(b, name) for b in each])) for each in (batches, whole))
            assert found.tolist() == expected.tolist(), name


@pytest.mark.parametrize("head", ["tiny_gpt2"], indirect=True)
def test_log_probs_are_those_of_the_scored_positions(head: LMHeadModel, sequences: list[TokenSequence]) -> None:
    batch = LMBatchBuilder(head, keep_text, None).build_batch(sequences[:2], SEEDS[:2])
    with torch.no_grad():
        found = scored_log_probs(head, batch)
        alone = [
            head.module(input_ids=torch.from_numpy(sequence.ids).long()[None]).logits[0, :-1]
            for sequence in sequences[:2]
        ]
    torch.testing.assert_close(found, torch.cat(alone).log_softmax(dim=-1), atol=1e-5, rtol=1e-4)
