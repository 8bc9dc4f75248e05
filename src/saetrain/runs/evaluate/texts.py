"""The texts that SAEs are scored on, and the activations on which their baselines are fitted."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from saetrain.activations.extract import LabelledActivations
from saetrain.config import EvaluateConfig, RunConfig, from_flat
from saetrain.data.holdout_split import HeldOutTexts
from saetrain.data.packing import Sequences
from saetrain.data.sources import SourceSettings
from saetrain.data.tokenize import Framing, TokenSettings
from saetrain.errors import SaetrainError
from saetrain.logs.console import log_rank0, mute_log_lines
from saetrain.runs.evaluate.setup import EvalContext
from saetrain.runs.text_data import TrainingText, load_text, open_token_table, without_training_text
from saetrain.runs.train.metadata import absolute_location
from saetrain.settings import DEFAULT_LOSS_TOKENS
from saetrain.types import batch_by_length

DEFAULT_EVAL_TOKENS = {"cpu": 50_000, "cuda": 1_000_000}


@dataclass(frozen=True)
class EvalText:
    """One text to score on.

    ``description``: how the text was chosen; ``indices``: the sequences to score, in order. The model's loss is scored
    on the first ``loss_sequences`` of them.
    """

    name: str
    in_sample: bool
    description: str
    sequences: Sequences
    indices: np.ndarray
    loss_sequences: int = 0


def load_training_config(context: EvalContext) -> RunConfig | None:
    """Return settings that open the SAEs' training text again, or None if the metadata do not name it."""
    loaded, metadata = context.loaded, context.loaded.metadata
    if metadata.dataset is None:
        return None
    names = (metadata.dataset,) if isinstance(metadata.dataset, str) else tuple(metadata.dataset)
    if context.run_config is not None:
        config = dataclasses.replace(context.run_config, dataset=names)
    else:
        columns = metadata.text_columns or []
        values = {
            "model": context.head.base.name,
            "dataset": list(names),
            "mix": metadata.mix,
            "dataset_config": metadata.dataset_config,
            "split": metadata.split,
            "text_column": columns[0] if len(columns) == 1 and isinstance(columns[0], str) else None,
            "eval_tokens": metadata.eval_tokens,
            "streaming": metadata.streaming,
            "skip_bad_rows": metadata.skip_bad_rows,
        }
        config = from_flat({name: value for name, value in values.items() if value is not None}, str(loaded.path))
    tokens = dataclasses.replace(
        config.tokens, ctx_len=context.framing.ctx_len, exclude_special_tokens=context.exclude_special
    )
    buffer = dataclasses.replace(config.buffer, exclude_sinks=context.exclude_first)
    return dataclasses.replace(config, tokens=tokens, buffer=buffer)


def open_eval_texts(context: EvalContext) -> tuple[list[EvalText], Iterator[LabelledActivations]]:
    """Return (texts to score on, training data set first; activations of other tokens to fit the baselines on)."""
    config, own = context.config, load_training_config(context)
    # Without a fingerprint a change of the text would go unnoticed, and the text may be as large as the Pile.
    known = context.loaded.metadata.fingerprint is not None
    text = load_training_text(context, own) if own is not None and (config.in_sample or known) else None
    if own is None and not config.dataset:
        raise SaetrainError(f"{config.path}: its metadata do not name the training text; pass --dataset")
    texts = []
    if own is not None and text is not None and config.in_sample:
        # Another library may have trained on the text that we hold out.
        held_out = text.metadata["held_out"]
        what = held_out if known else f"{held_out}, but the SAE may have been trained on it"
        texts.append(
            _select_sequences(context, " + ".join(own.dataset), True, what, text.held_out, own.loader.shuffle_seed)
        )
    seen = text.collect_training_texts() if text is not None else HeldOutTexts()
    caveat = "; not checked against the training text" if text is None or None in text.train_tokens else ""
    for name in config.dataset:
        if own is not None and _is_training_text(config, own, name):
            if not config.in_sample:
                raise SaetrainError(
                    f"--dataset {name}: the SAE was trained on its split '{own.source.split}'; omit --in_sample false, "
                    "or choose another split with --split"
                )
            log_rank0(
                f"--dataset {name}: the SAE was trained on its split '{own.source.split}', so it is scored once, on "
                "its held-out text"
            )
            continue
        texts.append(_open_other_text(context, name, seen, caveat))
    if text is not None:
        fit = _read_training_sample(context, text)
    else:
        texts, fit = _split_off_fit_text(context, texts)
    return [_with_loss_sequences(context, each) for each in texts], fit


def _is_training_text(config: EvaluateConfig, own: RunConfig, name: str) -> bool:
    """Return whether --dataset, --split and --dataset_config name the rows that the SAEs were trained on."""
    source = own.source
    same = config.split in (None, source.split) and config.dataset_config in (None, source.dataset_config)
    return same and absolute_location(name) in own.dataset


def load_training_text(context: EvalContext, own: RunConfig) -> TrainingText | None:
    """Open the text that the SAEs were trained on; None if it is not available and --in_sample is false."""
    framing = _training_framing(context)
    try:
        # The run has already logged what it reads.
        with contextlib.nullcontext() if context.config.details else mute_log_lines():
            batch_tokens = own.base.resolve_batch_tokens(context.head.base.device)
            text = load_text(own, context.tokenizer, framing, batch_tokens)
        expected, found = context.loaded.metadata.fingerprint, text.metadata["fingerprint"]
        if expected is not None and expected != found:
            raise SaetrainError(
                f"{context.config.path}: the training text has changed since the SAE was trained, so no part of it is "
                "known to be held out; score other text with --dataset and --in_sample false"
            )
    except SaetrainError as error:
        if context.config.in_sample:
            if "--in_sample false" in str(error):
                raise
            named = next(iter(context.loaded.saes.values())).folder
            raise SaetrainError(
                f"{error} (the files in {named} name {' + '.join(own.dataset)} as the training text; pass --dataset "
                "and --in_sample false to score without it)"
            ) from error
        log_rank0(f"continuing without the training text: {error}")
        return None
    return text


def _training_framing(context: EvalContext) -> Framing:
    """Return the framing under which the training text was split; SaetrainError if --ctx_len contradicts it.

    The text of an encoder is cut into sequences before a part is held out, the text of a decoder afterwards.
    """
    framing, own = context.framing, context.loaded.metadata.ctx_len
    if framing.causal or context.loaded.metadata.fingerprint is None or own in (None, framing.ctx_len):
        return framing
    if context.config.in_sample:
        raise SaetrainError(
            f"--ctx_len {framing.ctx_len}: the training text was cut into sequences of {own} tokens before a part was "
            "held out; omit the flag, or score other text with --dataset and --in_sample false"
        )
    return dataclasses.replace(framing, ctx_len=own)


def _open_other_text(context: EvalContext, name: str, seen: HeldOutTexts, caveat: str) -> EvalText:
    config = context.config
    source = SourceSettings(
        split=config.split or SourceSettings.split,
        dataset_config=config.dataset_config,
        text_column=config.text_column,
        skip_bad_rows=config.skip_bad_rows,
    )
    tokens = TokenSettings(ctx_len=context.framing.ctx_len, exclude_special_tokens=context.exclude_special)
    which = "held_out" if config.split is None else "train"
    table, what = open_token_table(name, source, which, tokens, context.tokenizer, context.framing)
    sequences, what = without_training_text(name, table, what, context.framing, context.exclude_special, seen)
    if caveat:
        log_rank0(f"data set {name}{caveat}, so the SAE may have been trained on some of it")
    return _select_sequences(context, name, False, what + caveat, sequences, context.config.scoring.eval_seed)


def _select_sequences(
    context: EvalContext, name: str, in_sample: bool, what: str, sequences: Sequences, seed: int
) -> EvalText:
    """Select the first sequences of a shuffled order with --eval_tokens tokens; SaetrainError if there are fewer."""
    requested = context.config.eval_tokens
    wanted = context.token_budget(requested or context.max_eval_tokens, DEFAULT_EVAL_TOKENS)
    order = sequences.shuffled_order(seed)
    count, held = n_sequences_for(context, sequences, order, wanted)
    if requested is not None and held < requested:
        raise SaetrainError(
            f"--eval_tokens {requested}: data set {name} has only {held:,} tokens to score on ({what}); lower it, or "
            "omit the flag"
        )
    _require_two_tokens(name, held, what)
    return EvalText(name, in_sample, what, sequences, order[:count])


def _require_two_tokens(name: str, held: int, what: str) -> None:
    """Raise SaetrainError if there are too few tokens for a variance."""
    if held < 2:
        raise SaetrainError(f"data set {name}: has {held} tokens to score on ({what}); at least 2 are needed")


def n_sequences_for(context: EvalContext, sequences: Sequences, order: np.ndarray, tokens: int) -> tuple[int, int]:
    """Return (number of sequences in ``order`` that give ``tokens`` kept tokens, or all; their number of tokens)."""
    held = 0
    for count, number in enumerate(order):
        if held >= tokens:
            return count, held
        held += int(context.extractor.keep(sequences[int(number)]).sum())
    return len(order), held


def _with_loss_sequences(context: EvalContext, text: EvalText) -> EvalText:
    """Return ``text`` with the sequences for the model's loss; SaetrainError if it has fewer than --loss_tokens."""
    requested, run = context.config.scoring.loss_tokens, context.run_config
    if requested != 0 and context.head.kind == "masked" and context.tokenizer.mask_token_id is None:
        log_rank0("the model's loss is not scored: its tokenizer has no mask token")
        return text
    count, held = n_sequences_for(
        context, text.sequences, text.indices, context.token_budget(requested, DEFAULT_LOSS_TOKENS)
    )
    if requested is not None and held < requested:
        # The run's own --loss_tokens was set before the length of the text was known, so it only causes a log line.
        if run is None or requested != run.scoring.loss_tokens:
            raise SaetrainError(
                f"--loss_tokens {requested}: only {held:,} tokens of data set {text.name} are scored "
                f"({text.description}); lower it, omit the flag, or raise --eval_tokens"
            )
        log_rank0(
            f"data set {text.name}: the model's loss is scored on only {held:,} tokens (--loss_tokens {requested:,})"
        )
    return dataclasses.replace(text, loss_sequences=count)


def _read_training_sample(context: EvalContext, text: TrainingText) -> Iterator[LabelledActivations]:
    """Yield activations of the first training batches, with about --fit_tokens tokens in total."""
    wanted = context.config.scoring.fit_tokens
    known = [tokens for tokens in text.train_tokens if tokens is not None]
    if len(known) == len(text.train_tokens):
        wanted = max(1, min(wanted, sum(known)))
    sequences = [sequence for batch in text.train_source.read_first_batches(wanted) for sequence in batch]
    return context.extractor.iterate_labelled(batch_by_length(sequences, context.extractor.batch_tokens))


def _split_off_fit_text(
    context: EvalContext, texts: list[EvalText]
) -> tuple[list[EvalText], Iterator[LabelledActivations]]:
    """Without the training text, fit the baselines on the end of the first text, and do not score that part."""
    first = texts[0]
    order = first.sequences.shuffled_order(context.config.scoring.eval_seed)
    count, _ = n_sequences_for(context, first.sequences, order[::-1], context.config.scoring.fit_tokens)
    count = max(1, min(count, len(order) // 2))
    log_rank0(
        f"the training text is not available: the baselines are fitted on {count:,} sequences of {first.name}, which "
        "are not scored"
    )
    fitted, kept = order[len(order) - count :], first.indices[: len(order) - count]
    if not len(kept):
        raise SaetrainError(f"data set {first.name}: too small to fit the baselines and to score on; use more text")
    requested = context.config.eval_tokens
    _, held = n_sequences_for(context, first.sequences, kept, requested or 2)
    _require_two_tokens(first.name, held, f"{first.description}, without those that the baselines are fitted on")
    if requested is not None and held < requested:
        raise SaetrainError(
            f"--eval_tokens {requested}: data set {first.name} has only {held:,} tokens to score on, because the "
            "training text is not available and the baselines are fitted on the rest; lower it or --fit_tokens"
        )
    texts = [dataclasses.replace(first, indices=kept), *texts[1:]]
    return texts, context.extractor.iterate_labelled(
        first.sequences.iterate_batches(fitted, context.extractor.batch_tokens)
    )
