"""Open the data sets of a run, and split each into training text and held-out text.

A data set is loaded, streamed, or read from a token folder; several data sets are mixed.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from saetrain.config import RunConfig
from saetrain.data.holdout_split import (
    MAX_HELD_OUT_SHARE,
    MIN_HELD_OUT_TOKENS,
    HeldOutTexts,
    deduplicate_rows,
    hold_out_from_stream,
    split_held_out_rows,
)
from saetrain.data.lenient_readers import BAD_ROW_COLUMN
from saetrain.data.mixture import MixedHeldOutSequences, MixedSequences
from saetrain.data.packing import Sequences, TokenTable, build_sequences, build_token_table
from saetrain.data.sharded import ShardedSequences, ShardedSource
from saetrain.data.sources import SourceSettings, TextSource, open_dataset
from saetrain.data.streaming import StreamedRows, StreamedSequences, iterate_encoded_blocks, to_columns
from saetrain.data.text_column import SAMPLE_ROWS, TextColumn, choose_text_column, find_text_column
from saetrain.data.token_store import is_token_folder, open_raw_ids, open_tokens
from saetrain.data.tokenize import Framing, TokenSettings, build_row_encoder, hash_json, tokenize_rows
from saetrain.errors import SaetrainError
from saetrain.logs.console import log_rank0
from saetrain.untrusted import require_plain_text

MAX_HELD_OUT_ROWS = 20_000
DRY_RUN_BYTES, MIN_DRY_RUN_ROWS = 2_000_000, 64
"""Size of the sample that --dry_run tokenizes, and its smallest number of rows."""
FINGERPRINT_BLOCKS = 8
"""Blocks at the beginning of a stream whose hash shows a resumed run whether the stream has changed."""


@dataclass(frozen=True)
class TrainingText:
    """The text of a run: where training sequences come from, and the held-out sequences.

    ``train_tokens``: training tokens per data set that the token policy keeps, or None for a stream; ``metadata``:
    entries about the text in the SAE's metadata; ``collect_training_texts`` returns the texts that are trained on,
    except those of streams. ``read_s``: seconds that reading and tokenizing take; with --dry_run, this and
    ``train_tokens`` are estimates from a sample.
    """

    train_source: ShardedSource
    held_out: Sequences
    train_tokens: tuple[int | None, ...]
    metadata: dict[str, Any]
    collect_training_texts: Callable[[], HeldOutTexts]
    read_s: float = 0.0


def load_text(config: RunConfig, tokenizer: Any, framing: Framing, batch_tokens: int) -> TrainingText:
    """Open all data sets and log what was chosen; ``batch_tokens``: padded tokens per model batch.

    Raises SaetrainError if a data set cannot be read or is too small.
    """
    log_rank0(f"tokens: {framing.describe_packing(tokenizer)}")
    splits = [_split_dataset(name, config, tokenizer, framing, batch_tokens) for name in config.dataset]
    parts = []
    for number, part in enumerate(splits):
        others = [other.held_out_texts for other_number, other in enumerate(splits) if other_number != number]
        parts.append(part.build_text(HeldOutTexts.union(others)))
    if len(parts) == 1:
        return parts[0]
    shares = config.mixing.normalized_shares(len(parts))
    log_rank0("mixed: " + ", ".join(f"{share:.1%} {name}" for share, name in zip(shares, config.dataset, strict=True)))
    special, first = config.tokens.exclude_special_tokens, config.buffer.exclude_sinks
    return TrainingText(
        MixedSequences([part.train_source for part in parts], shares, special, first),
        MixedHeldOutSequences([part.held_out for part in parts], shares),
        tuple(tokens for part in parts for tokens in part.train_tokens),
        {name: [part.metadata[name] for part in parts] for name in parts[0].metadata},
        lambda: HeldOutTexts.union([part.collect_training_texts() for part in parts]),
        sum(part.read_s for part in parts),
    )


def _require_writable_cache() -> None:
    """Raise SaetrainError if the cache of the `datasets` library, which stores every text, is not writable."""
    import datasets

    folder = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SaetrainError(
            f"the cache of data sets {folder} can't be written: {error.strerror}; choose another folder with the "
            "environment variable HF_DATASETS_CACHE"
        ) from error


@dataclass(frozen=True)
class _SplitDataset:
    """A data set whose held-out rows are chosen.

    ``build_text`` returns its text without the texts that other data sets hold out.
    """

    held_out_texts: HeldOutTexts
    build_text: Callable[[HeldOutTexts], TrainingText]


def _split_dataset(name: str, config: RunConfig, tokenizer: Any, framing: Framing, batch_tokens: int) -> _SplitDataset:
    if is_token_folder(name):
        return _split_token_folder(name, config, tokenizer, framing, batch_tokens)
    start_s = time.monotonic()
    source = open_text(name, config.source, tokenizer)
    if config.source.streaming:
        column = source.column or _find_streamed_column(name, source)
        log_rank0(f"{source.description}: {column.describe_choice()}")
        return _split_stream(name, source, column, config, tokenizer, framing, batch_tokens)
    share, opened_s = 1.0, time.monotonic()
    if config.dry_run:
        source, share = _sample_source(name, source)
    column, rows = tokenize_source(name, source, tokenizer, framing, config.tokens)
    split = _split_tokenized(
        name, rows, column.columns, source.held_out_split, source.deduplicate, config, framing, batch_tokens
    )
    read_s = opened_s - start_s + (time.monotonic() - opened_s) / share

    def build_text(others: HeldOutTexts) -> TrainingText:
        text = split.build_text(others)
        tokens = tuple(None if count is None else round(count / share) for count in text.train_tokens)
        return dataclasses.replace(text, train_tokens=tokens, read_s=read_s)

    return dataclasses.replace(split, build_text=build_text)


def _sample_source(name: str, source: TextSource) -> tuple[TextSource, float]:
    """Return (the source with a fixed random sample of its rows, share of the training rows in it)."""
    rows = source.train
    count = max(MIN_DRY_RUN_ROWS, int(DRY_RUN_BYTES / max(1.0, rows.data.nbytes / len(rows))))
    if count >= len(rows):
        return source, 1.0
    log_rank0(
        f"data set {name}: --dry_run tokenizes a sample of {count:,} of {len(rows):,} rows; its times are estimates"
    )
    held_out = None if source.held_out is None else sample_rows(source.held_out, count)
    return dataclasses.replace(source, train=sample_rows(rows, count), held_out=held_out), count / len(rows)


def open_token_table(
    name: str, settings: SourceSettings, which: str, tokens: TokenSettings, tokenizer: Any, framing: Framing
) -> tuple[TokenTable, str]:
    """Return (token table of a data set that no SAE was trained on, description of its split).

    ``which``: `train` for the split that ``settings`` names, `held_out` for the data set's test split if it has one.
    """
    if is_token_folder(name):
        rows, metadata = open_tokens(Path(name), tokenizer, framing)
        names = {"train": metadata.split, "held_out": metadata.held_out_split}
    else:
        source = open_text(name, settings, tokenizer)
        _, rows = tokenize_source(name, source, tokenizer, framing, tokens)
        names = {"train": settings.split, "held_out": source.held_out_split}
    which = which if which in rows else "train"
    return TokenTable(rows[which]), f"split '{names[which]}'"


def without_training_text(
    name: str, table: TokenTable, what: str, framing: Framing, exclude_special: bool, seen: HeldOutTexts
) -> tuple[Sequences, str]:
    """Return (sequences of ``table`` without the texts in ``seen``, their description).

    Raises SaetrainError if no sequence is left.
    """
    fresh, note = _exclude_texts(
        table, np.arange(len(table)), seen, "of texts that the SAE was trained on are excluded"
    )
    sequences = build_sequences(table, fresh, framing, exclude_special)
    if not sequences.text_tokens:
        raise SaetrainError(
            f"data set {name}: {what} contains only text that the SAE was trained on; choose other text"
        )
    log_rank0(f"data set {name}: {what}, {sequences.text_tokens:,} tokens{note}")
    return sequences, what + note


def open_text(name: str, settings: SourceSettings, tokenizer: Any) -> TextSource:
    """Open a data set from the hub or a local path; SaetrainError if it has no rows or the cache is not writable."""
    require_plain_text(name, "data set")
    _require_writable_cache()
    log_rank0(f"reading data set {name}")
    if name.endswith(".bin") and Path(name).is_file():
        source = open_raw_ids(Path(name), tokenizer, settings.streaming)
    else:
        source = open_dataset(name, settings)
    if not settings.streaming and not len(source.train):
        raise SaetrainError(f"data set {name}: split {settings.split} has no rows")
    return source


def _find_streamed_column(name: str, source: TextSource) -> TextColumn:
    sample = to_columns(list(islice(_stream_rows(source.train, name, source)(0), SAMPLE_ROWS)))
    if not sample:
        raise SaetrainError(f"data set {name}: has no rows")
    return choose_text_column(list(sample), sample, source.text_column)


def tokenize_source(
    name: str, source: TextSource, tokenizer: Any, framing: Framing, settings: TokenSettings
) -> tuple[TextColumn, dict[str, Any]]:
    """Return (text column, {`train`, perhaps `held_out`: tokenized rows}), and log the choice of the column."""
    splits = {"train": source.train}
    if source.held_out is not None:
        splits["held_out"] = sample_rows(source.held_out)
    try:
        column = source.column or find_text_column(source.train, source.text_column)
        log_rank0(f"{source.description}: {column.describe_choice()}")
        processes = settings.data_preprocessing_num_proc
        return column, {
            split: tokenize_rows(_remove_bad_rows(name, rows), column, tokenizer, framing, processes, log_rank0)
            for split, rows in splits.items()
        }
    except UnicodeDecodeError as error:  # `datasets` stores any bytes as strings and fails when they are read
        raise SaetrainError(
            f"data set {name}: could not be read: {source.find_bad_row() or error}; --skip_bad_rows skips such rows"
        ) from error


def _remove_bad_rows(name: str, rows: Any) -> Any:
    """Drop the column that marks bad rows, and log how many there are; their text is empty."""
    if BAD_ROW_COLUMN not in rows.column_names:
        return rows
    bad = [problem for problem in rows[BAD_ROW_COLUMN] if problem]
    if bad:
        log_rank0(f"data set {name}: skipped {len(bad):,} bad rows of {len(rows):,}, the first: {bad[0]}")
    return rows.remove_columns(BAD_ROW_COLUMN)


def sample_rows(rows: Any, count: int = MAX_HELD_OUT_ROWS) -> Any:
    """Return a fixed random sample of at most ``count`` rows."""
    if len(rows) <= count:
        return rows
    chosen = np.random.default_rng(0).choice(len(rows), count, replace=False)
    return rows.select(np.sort(chosen))


def _split_token_folder(
    name: str, config: RunConfig, tokenizer: Any, framing: Framing, batch_tokens: int
) -> _SplitDataset:
    """Split a token folder, which is memory-mapped even with --streaming."""
    rows, metadata = open_tokens(Path(name), tokenizer, framing)
    log_rank0(f"token folder {name}: already tokenized from {metadata.dataset}, split {metadata.split}")
    columns, held_out_split, distinct = tuple(metadata.text_columns), metadata.held_out_split, metadata.distinct
    return _split_tokenized(name, rows, columns, held_out_split, distinct, config, framing, batch_tokens)


def _split_tokenized(
    name: str,
    tokens: dict[str, Any],
    columns: tuple[str, ...],
    held_out_split: str | None,
    distinct: bool,
    config: RunConfig,
    framing: Framing,
    batch_tokens: int,
) -> _SplitDataset:
    """Split tokenized rows ({`train`, perhaps `held_out`: rows}) into training and held-out sequences."""
    special = config.tokens.exclude_special_tokens
    table = TokenTable(tokens["train"])
    rows = deduplicate_rows(table) if distinct else np.arange(len(table))
    held, held_rows, how, whole = table, rows[:0], "", True
    if "held_out" in tokens:
        held = TokenTable(tokens["held_out"])
        held_rows = deduplicate_rows(held) if distinct else np.arange(len(held))
        how = f"split '{held_out_split}'"
        fresh = ~np.isin(table.text_hash[rows], held.text_hash)
        if not fresh.all():
            how += f"; {table.lengths[rows[~fresh]].sum():,} training tokens with the same texts are excluded"
        rows = rows[fresh]
    held_out_tokens = build_sequences(held, held_rows, framing, special).text_tokens
    if held_out_tokens < min(MIN_HELD_OUT_TOKENS, table.lengths[rows].sum() * MAX_HELD_OUT_SHARE):
        small = f"; split '{held_out_split}' has only {held_out_tokens:,} tokens" if how else ""
        rows, held_rows, how, whole = split_held_out_rows(table, rows, config.evaluation.eval_tokens)
        held, how = table, how + small
    held_out = build_sequences(held, held_rows, framing, special)

    def build_text(others: HeldOutTexts) -> TrainingText:
        kept, note = _exclude_texts(table, rows, others, "that another data set holds out are excluded")
        train = build_sequences(table, kept, framing, special)
        if not len(train) or not len(held_out):
            raise SaetrainError(
                f"data set {name}: too small to train on and hold text out: {len(table)} rows, "
                f"{table.lengths.sum()} tokens; use more text"
            )
        log_rank0(
            f"training text: {train.text_tokens:,} tokens; held out: {held_out.text_tokens:,} tokens ({how}){note}"
        )
        metadata = {
            "text_columns": list(columns),
            "held_out": how,
            "train_tokens_available": train.text_tokens,
            "fingerprint": table.digest(kept),
        }
        source = ShardedSequences(train, config.loader, special, config.buffer.exclude_sinks, batch_tokens)
        return TrainingText(
            source,
            held_out,
            (train.text_tokens,),
            metadata,
            lambda: HeldOutTexts.from_rows(table, kept, whole_documents=True),
        )

    return _SplitDataset(HeldOutTexts.from_rows(held, held_rows, whole), build_text)


def _exclude_texts(table: TokenTable, rows: np.ndarray, others: HeldOutTexts, what: str) -> tuple[np.ndarray, str]:
    """Return (``rows`` without the texts in ``others``, note for the log about the excluded tokens)."""
    if not others:
        return rows, ""
    fresh = ~others(table)[rows]
    if fresh.all():
        return rows, ""
    tokens = table.lengths[rows[~fresh]].sum()
    return rows[fresh], f"; {tokens:,} tokens {what}"


def _split_stream(
    name: str,
    source: TextSource,
    column: TextColumn,
    config: RunConfig,
    tokenizer: Any,
    framing: Framing,
    batch_tokens: int,
) -> _SplitDataset:
    """Split a stream into training sequences and held-out sequences, which are read from its beginning."""
    if source.deduplicate:
        raise SaetrainError(
            f"data set {name}: rows that repeat a text can't be deduplicated while streaming; omit --streaming"
        )
    rows, encode = _stream_rows(source.train, name, source, column), build_row_encoder(column, tokenizer, framing)
    special, tokens = config.tokens.exclude_special_tokens, config.evaluation.eval_tokens
    held_out_blocks = None
    if source.held_out is not None:
        held_out_blocks = iterate_encoded_blocks(_stream_rows(source.held_out, name, source, column), encode)
    held, texts, share = hold_out_from_stream(iterate_encoded_blocks(rows, encode), held_out_blocks, tokens)
    how = f"the first documents of split '{source.held_out_split}'"
    if share:
        how = f"documents chosen by a hash of their text, {share:.1%} of all"
        how += f"; split '{source.held_out_split}' has too few tokens" if source.held_out is not None else ""
    table = build_token_table(held)
    held_out = build_sequences(table, np.arange(len(table)), framing, special)
    if not len(held_out):
        raise SaetrainError(f"data set {name}: split '{source.held_out_split}' contains no text")

    def build_text(others: HeldOutTexts) -> TrainingText:
        left_out = HeldOutTexts.union([texts, others])
        log_rank0(f"training text: a stream of unknown length; held out: {held_out.text_tokens:,} tokens ({how})")
        heads = [build_token_table(block) for block in islice(iterate_encoded_blocks(rows, encode), FINGERPRINT_BLOCKS)]
        metadata = {
            "text_columns": list(column.columns),
            "held_out": how,
            "train_tokens_available": None,
            "fingerprint": hash_json([*(head.digest(np.arange(len(head))) for head in heads), left_out.digest()]),
        }
        sequences = StreamedSequences(
            rows,
            name,
            encode,
            left_out,
            framing,
            loader=config.loader,
            exclude_special=special,
            exclude_first=config.buffer.exclude_sinks,
            batch_tokens=batch_tokens,
        )
        return TrainingText(sequences, held_out, (None,), metadata, HeldOutTexts)

    return _SplitDataset(HeldOutTexts.from_rows(table, np.arange(len(table)), whole_documents=True), build_text)


def _stream_rows(rows: Any, name: str, source: TextSource, column: TextColumn | None = None) -> StreamedRows:
    """Return the rows of a stream, with only the needed columns if ``column`` is known."""
    if column is not None:
        needed = [*column.columns, BAD_ROW_COLUMN, *(["attention_mask"] if column.kind == "ids" else [])]
        existing = rows.column_names or needed
        rows = rows.select_columns([column for column in needed if column in existing])
    return StreamedRows(rows, name, log_rank0, source.find_bad_row)
