"""Which tokens a masked model has to guess: about 15 in 100 of the text, and the same however they are batched."""

from __future__ import annotations

import numpy as np

from saetrain.activations.mlm_masking import mix_bits, select_masked_positions
from saetrain.types import TokenKind, TokenSequence


def sequence(length: int, doc: int, seed: int = 0) -> TokenSequence:
    """Random ids, special tokens at both ends and in the middle."""
    kind = np.zeros(length, dtype=np.uint8)
    kind[[0, length // 2, -1]] = TokenKind.SPECIAL
    ids = np.random.default_rng([seed, doc]).integers(0, 30_000, length).astype(np.int32)
    return TokenSequence(ids, kind, np.full(length, doc, dtype=np.int64))


def test_the_share_is_that_of_bert_and_special_tokens_are_spared() -> None:
    chosen, text = 0, 0
    for doc in range(400):
        one = sequence(100, doc)
        masked = select_masked_positions(one, seed=0)
        assert masked.shape == (100,)
        assert not masked[one.kind != TokenKind.TEXT].any()
        chosen, text = chosen + int(masked.sum()), text + int((one.kind == TokenKind.TEXT).sum())
    assert abs(chosen / text - 0.15) < 4 * (0.15 * 0.85 / text) ** 0.5
    one = sequence(20_000, 1)
    assert abs(select_masked_positions(one, 0, share=0.5).mean() - 0.5) < 0.02
    assert not select_masked_positions(one, 0, share=0.0).any()


def test_positions_are_chosen_one_by_one() -> None:
    """As often at every position, and no oftener next to another one."""
    masked = np.stack([select_masked_positions(sequence(64, doc), seed=3) for doc in range(3000)])
    text = np.delete(masked, [0, 32, 63], axis=1)
    assert np.abs(text.mean(axis=0) - 0.15).max() < 5 * (0.15 * 0.85 / 3000) ** 0.5
    both = (text[:, :-1] & text[:, 1:]).mean()
    assert abs(both - 0.15**2) < 5 * (0.0225 / text.size) ** 0.5


def test_document_text_position_and_seed_decide_and_nothing_else() -> None:
    one = sequence(300, 7)
    masked = select_masked_positions(one, seed=1)
    for _ in range(3):
        assert (
            select_masked_positions(TokenSequence(one.ids.copy(), one.kind.copy(), one.doc.copy()), seed=1) == masked
        ).all()
    assert (select_masked_positions(one, seed=2) != masked).any()
    assert (select_masked_positions(TokenSequence(one.ids, one.kind, one.doc + 1), seed=1) != masked).any()
    ids = one.ids.copy()
    ids[-1] += 1
    assert (select_masked_positions(TokenSequence(ids, one.kind, one.doc), seed=1) != masked).any(), (
        "another part of the document"
    )


def test_mixing_is_splitmix() -> None:
    """The generator's first numbers from seed 1234567, as its authors' C code prints them."""
    gamma = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        states = np.uint64(1234567) + gamma * np.arange(3, dtype=np.uint64)
    assert mix_bits(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    values = mix_bits(np.arange(100_000, dtype=np.uint64))
    assert len(np.unique(values)) == 100_000
    bits = (values[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.01
