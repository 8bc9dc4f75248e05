"""The tokens that count and no others, each with the data set row that it came from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from saetrain.activations.capture import ActivationCapture, pad_batch
from saetrain.activations.extract import ActivationExtractor, TokenClass
from saetrain.activations.model import BaseModel
from saetrain.errors import SaetrainError
from saetrain.types import DATASET_ROW_BITS, TokenKind, TokenSequence, batch_by_length

Make = Callable[..., list[TokenSequence]]
NAMES = ["encoder.layer.1", "encoder.layer.4"]


def text_only(sequence: TokenSequence) -> np.ndarray:
    return np.asarray(sequence.kind == TokenKind.TEXT)


def reader(model: BaseModel, names: list[str], batch_tokens: int = 64) -> ActivationExtractor:
    return ActivationExtractor(ActivationCapture(model, names), text_only, batch_tokens)


def sorted_rows(values: torch.Tensor, doc: np.ndarray) -> torch.Tensor:
    """Rows with their document number, in an order of their own, so that two readings can be compared."""
    rows = torch.cat([torch.from_numpy(doc)[:, None].float(), values.float()], dim=1)
    return rows[np.lexsort(rows[:, :3].T.flip(0).numpy())]


def expected(model: BaseModel, name: str, sequences: list[TokenSequence]) -> tuple[torch.Tensor, np.ndarray]:
    """Kept activations, one sequence at a time and therefore without padding."""
    capture = ActivationCapture(model, [name])
    keeps = [text_only(sequence) for sequence in sequences]
    values = [capture(*pad_batch([s], model.device))[name][0][torch.from_numpy(k)] for s, k in zip(sequences, keeps)]  # noqa: B905
    return torch.cat(values), np.concatenate([s.doc[k] for s, k in zip(sequences, keeps, strict=True)])


@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_padding_and_special_tokens_are_never_kept(bert: BaseModel, sequences: Make, batch_tokens: int) -> None:
    rows = sequences(5, 40, 3, 40, 17)
    found = reader(bert, NAMES).extract_all(batch_by_length(rows, batch_tokens))
    assert len(found) == sum(len(row) - 2 for row in rows)
    assert np.bincount(found.doc).tolist() == [3, 38, 1, 38, 15]
    for name in NAMES:
        want = sorted_rows(*expected(bert, name, rows))
        torch.testing.assert_close(sorted_rows(found.values[name], found.doc), want, rtol=0, atol=1e-5)


def test_first_position_of_a_decoder_is_never_kept(gpt2: BaseModel, sequences: Make) -> None:
    rows = sequences(9, 9, causal=True)
    for row in rows:
        row.kind[-1] = TokenKind.TEXT
        row.kind[0] = TokenKind.FIRST
    found = reader(gpt2, ["h.1"]).extract_all(batch_by_length(rows, 64))
    first = ActivationCapture(gpt2, ["h.1"])(*pad_batch(rows, gpt2.device))["h.1"][:, 0]
    assert len(found) == 16
    assert float(torch.cdist(found.values["h.1"], first).min()) > 1e-3


def test_a_token_beyond_the_limit_at_one_hookpoint_is_dropped_at_all(bert: BaseModel, sequences: Make) -> None:
    rows = sequences(30, 30, 12)
    read = reader(bert, NAMES, 4096)
    everything = read.extract_all(batch_by_length(rows, 64))
    norms = {name: value.norm(dim=1) for name, value in everything.values.items()}
    read.set_norm_limits(
        {NAMES[0]: float(norms[NAMES[0]].quantile(0.7)), NAMES[1]: float(norms[NAMES[1]].quantile(0.8))}
    )
    fine = (norms[NAMES[0]] <= read.norm_limits[NAMES[0]]) & (norms[NAMES[1]] <= read.norm_limits[NAMES[1]])
    found = read.extract_all(batch_by_length(rows, 64))
    assert 0 < found.n_outliers == int((~fine).sum())
    # More than either limit alone would drop.
    assert found.n_outliers > max(int((norms[name] > read.norm_limits[name]).sum()) for name in NAMES)
    assert found.doc.tolist() == everything.doc[fine.numpy()].tolist()
    for name in NAMES:
        torch.testing.assert_close(found.values[name], everything.values[name][fine], rtol=0, atol=0)


def test_a_reader_that_runs_ahead_gives_the_same(bert: BaseModel, sequences: Make) -> None:
    """As on a GPU, where the next batch is begun before the norms of the last are looked at."""
    rows = sequences(30, 20, 12, 5)
    behind, ahead = reader(bert, NAMES, 32), reader(bert, NAMES, 32)
    ahead.max_in_flight = 1
    everything = behind.extract_all(batch_by_length(rows, 64)).values[NAMES[0]].norm(dim=1)
    for read in (behind, ahead):
        read.set_norm_limits({NAMES[0]: float(everything.quantile(0.8))})
    expected, found = (
        list(behind.iterate_batches(batch_by_length(rows, 32))),
        list(ahead.iterate_batches(batch_by_length(rows, 32))),
    )
    assert len(expected) == len(found) == 3
    for one, other in zip(expected, found, strict=True):
        assert one.n_outliers == other.n_outliers
        assert one.doc.tolist() == other.doc.tolist()
        for name in NAMES:
            assert torch.equal(one.values[name], other.values[name])
    begun: list[int] = []
    ahead.set_interrupt_check(lambda: begun.append(len(begun)))
    next(ahead.iterate_batches(batch_by_length(rows, 32)))
    assert begun == [0, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_their_rows(gpt2: BaseModel, sequences: Make, bad: float) -> None:
    rows = sequences(8, 8, 8)
    for at, row in enumerate(rows):
        row.doc[:] = 100 + at
        row.ids[:] = np.arange(10, 18)
    rows[1].ids[4] = 901
    embedding = gpt2.module.wte.weight
    good = embedding[901].clone()
    try:
        with torch.no_grad():
            embedding[901] = bad
        with pytest.raises(SaetrainError, match=r"at h\.0 are not finite on data set rows 101; .*--dtype"):
            reader(gpt2, ["h.0"]).extract_all(batch_by_length(rows, 64))
        for row in rows:
            row.doc[:] += 1 << DATASET_ROW_BITS
        mixed = ActivationExtractor(ActivationCapture(gpt2, ["h.0"]), text_only, 64, ("some", "other"))
        with pytest.raises(SaetrainError, match=r"not finite on data set rows 101 of other; .*--dtype"):
            mixed.extract_all(batch_by_length(rows, 64))
    finally:
        with torch.no_grad():
            embedding[901] = good


def test_labels_leave_out_what_is_not_kept_and_not_finite(gpt2: BaseModel, sequences: Make) -> None:
    rows = sequences(8, 8)
    for row in rows:
        row.ids[:] = np.arange(10, 18)
    rows[1].ids[7] = 901
    embedding = gpt2.module.wte.weight
    good = embedding[901].clone()
    try:
        with torch.no_grad():
            # Behind the embeddings, attention would carry it on to other tokens.
            embedding[901] = float("inf")
        read = reader(gpt2, ["wte"])
        (batch,) = read.iterate_labelled([rows])
        assert np.bincount(batch.token_class).tolist() == [12, 3]
        assert torch.isfinite(batch.values["wte"]).all()
        assert len(batch.doc) == len(batch.values["wte"]) == 15
        torch.testing.assert_close(
            batch.values["wte"][batch.token_class == TokenClass.KEPT],
            read.extract_all(batch_by_length(rows, 64)).values["wte"],
        )
        rows[1].ids[4] = 901
        with pytest.raises(SaetrainError, match=r"at wte are not finite on data set rows 1; .*--dtype"):
            list(read.iterate_labelled([rows]))
    finally:
        with torch.no_grad():
            embedding[901] = good


def test_a_batch_of_special_tokens_alone_gives_nothing(bert: BaseModel, sequences: Make) -> None:
    found = reader(bert, NAMES).extract_all([sequences(2, 2)])
    assert len(found) == 0
    assert found.values[NAMES[0]].shape == (0, 32)
