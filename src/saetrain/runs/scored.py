"""The texts that SAEs are scored on, and the tokens on which their nulls are fitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from saetrain.activations.read import LabelledActivations
from saetrain.config import EvaluateConfig, RunConfig, from_flat
from saetrain.data.heldout import HeldOutTexts
from saetrain.data.sequences import Sequences
from saetrain.data.sources import SourceSettings
from saetrain.data.tokenize import Framing, TokenSettings
from saetrain.errors import SaetrainError
from saetrain.interop.directory import CONFIG_FILE as SAE_CONFIG
from saetrain.logs.console import log_rank0
from saetrain.runs.match import Setting, run_config
from saetrain.runs.metadata import location
from saetrain.runs.text import Text, load_text, other_text, unseen

EVAL_TOKENS = {"cpu": 50_000, "cuda": 1_000_000}
LOSS_TOKENS = {"cpu": 8_192, "cuda": 131_072}
GROUP = 64
"""Sequences that are batched together, by length."""


@dataclass(frozen=True)
class Scored:
    """One text to score on: which of its sequences, in order; ``what`` says how it was chosen.

    The model's own loss is scored on the first ``loss_sequences`` of them.
    """

    name: str
    in_sample: bool
    what: str
    sequences: Sequences
    numbers: np.ndarray
    loss_sequences: int = 0

    def groups(self, numbers: np.ndarray) -> Iterator[list[Any]]:
        """The sequences of those numbers, GROUP at a time."""
        for start in range(0, len(numbers), GROUP):
            yield [self.sequences[int(number)] for number in numbers[start : start + GROUP]]


def own_config(setting: Setting) -> RunConfig | None:
    """The settings under which the SAEs' training text is read again, or None where it is not known."""
    located = setting.located
    dataset, shares = located.says("dataset"), located.says("mix")
    if dataset is None:
        return None
    names = (dataset,) if isinstance(dataset, str) else tuple(dataset)
    if located.run is not None:
        config = dataclasses.replace(run_config(located), dataset=names)
    else:
        columns = located.says("text_columns")
        known = {
            key: located.says(key) for key in ("dataset_config", "split", "eval_tokens", "streaming", "skip_bad_rows")
        }
        values: dict[str, Any] = {name: value for name, value in known.items() if value is not None}
        values.update(model=setting.head.base.name, dataset=list(names), mix=shares)
        if isinstance(columns, list) and len(columns) == 1 and isinstance(columns[0], str):
            values["text_column"] = columns[0]
        config = from_flat(values, str(located.path))
    tokens = dataclasses.replace(
        config.tokens, ctx_len=setting.framing.ctx_len, exclude_special_tokens=setting.exclude_special
    )
    buffer = dataclasses.replace(config.buffer, exclude_sinks=setting.exclude_first)
    return dataclasses.replace(config, tokens=tokens, buffer=buffer)


def open_texts(setting: Setting) -> tuple[list[Scored], Iterator[LabelledActivations]]:
    """(the texts to score on, the SAE's own first; activations of other tokens, on which the nulls are fitted)."""
    config, own = setting.config, own_config(setting)
    # Without a fingerprint nothing tells whether it is still the text of then, and it may be as large as the Pile.
    known = setting.located.says("fingerprint") is not None
    text = _own_text(setting, own) if own is not None and (config.in_sample or known) else None
    if own is None and not config.dataset:
        raise SaetrainError(f"{config.path}: does not say what text it was trained on; name a data set by --dataset")
    texts = []
    if own is not None and text is not None and config.in_sample:
        # Another library may have trained on what we would hold out.
        what = text.about["held_out"] if known else f"{text.about['held_out']}, but not by who trained the SAE"
        texts.append(_choose(setting, " + ".join(own.dataset), True, what, text.held_out, own.loader.shuffle_seed))
    seen = text.trained_on() if text is not None else HeldOutTexts()
    caveat = "; not checked against the training text" if text is None or None in text.tokens else ""
    for name in config.dataset:
        if own is not None and _is_own(config, own, name):
            if not config.in_sample:
                raise SaetrainError(
                    f"--dataset {name}: the SAE was trained on its split '{own.source.split}'; leave out --in_sample "
                    "false, or name another split of it by --split"
                )
            log_rank0(
                f"--dataset {name}: the SAE was trained on its split '{own.source.split}', so it is scored once, on "
                "what was held out"
            )
            continue
        texts.append(_other(setting, name, seen, caveat))
    if text is not None:
        fit = _training_sample(setting, text)
    else:
        texts, fit = _apart(setting, texts)
    return [_with_losses(setting, each) for each in texts], fit


def _is_own(config: EvaluateConfig, own: RunConfig, name: str) -> bool:
    """Whether --dataset, --split and --dataset_config name the very rows that the SAEs were trained on."""
    source = own.source
    same = config.split in (None, source.split) and config.dataset_config in (None, source.dataset_config)
    return same and location(name) in own.dataset


def _own_text(setting: Setting, own: RunConfig) -> Text | None:
    """The text that the SAEs were trained on, or None where it can't be had and is not to be scored on."""
    framing = _own_framing(setting)
    try:
        text = load_text(own, setting.tokenizer, framing)
        expected, found = setting.located.says("fingerprint"), text.about["fingerprint"]
        if expected is not None and expected != found:
            raise SaetrainError(
                f"{setting.config.path}: the text that it was trained on has changed since, so none of it is known to "
                "be held out; score on other text by --dataset with --in_sample false"
            )
    except SaetrainError as error:
        if setting.config.in_sample:
            if "--in_sample false" in str(error):
                raise
            named = next(iter(setting.located.saes.values())).folder / SAE_CONFIG
            raise SaetrainError(
                f"{error} ({named} names {' + '.join(own.dataset)} as the training text; --dataset with --in_sample "
                "false scores without it)"
            ) from error
        log_rank0(f"without the training text: {error}")
        return None
    return text


def _own_framing(setting: Setting) -> Framing:
    """The framing under which the SAEs' text was divided; SaetrainError where --ctx_len asks to score it otherwise.

    An encoder's text is cut to the length of a sequence before a part is held out; a decoder's afterwards.
    """
    framing, own = setting.framing, setting.located.says("ctx_len")
    if framing.causal or setting.located.says("fingerprint") is None or framing.ctx_len == own:
        return framing
    if setting.config.in_sample:
        raise SaetrainError(
            f"--ctx_len {framing.ctx_len}: the SAE's own text was cut into sequences of {own} tokens before some were "
            "held out; leave the flag out, or score on other text by --dataset with --in_sample false"
        )
    return dataclasses.replace(framing, ctx_len=own)


def _other(setting: Setting, name: str, seen: HeldOutTexts, caveat: str) -> Scored:
    config = setting.config
    source = SourceSettings(
        split=config.split or SourceSettings.split,
        dataset_config=config.dataset_config,
        text_column=config.text_column,
        skip_bad_rows=config.skip_bad_rows,
    )
    tokens = TokenSettings(ctx_len=setting.framing.ctx_len, exclude_special_tokens=setting.exclude_special)
    which = "held_out" if config.split is None else "train"
    table, what = other_text(name, source, which, tokens, setting.tokenizer, setting.framing)
    sequences, what = unseen(name, table, what, setting.framing, setting.exclude_special, seen)
    if caveat:
        log_rank0(f"data set {name}{caveat}, so some of it may have been trained on")
    return _choose(setting, name, False, what + caveat, sequences, setting.config.scoring.eval_seed)


def _choose(setting: Setting, name: str, in_sample: bool, what: str, sequences: Sequences, seed: int) -> Scored:
    """The first sequences of a mixed order that hold --eval_tokens tokens; SaetrainError when there are fewer."""
    asked = setting.config.eval_tokens
    wanted = setting.budget(asked or setting.most, EVAL_TOKENS)
    order = sequences.shuffled_order(seed)
    count, held = enough(setting, sequences, order, wanted)
    if asked is not None and held < asked:
        raise SaetrainError(
            f"--eval_tokens {asked}: data set {name} has only {held:,} tokens to score on ({what}); give fewer, or "
            "leave the flag out to take them all"
        )
    _require_two(name, held, what)
    return Scored(name, in_sample, what, sequences, order[:count])


def _require_two(name: str, held: int, what: str) -> None:
    """SaetrainError where there is nothing about whose mean a variance could be."""
    if held < 2:
        raise SaetrainError(f"data set {name}: has {held} tokens to score on ({what}); at least 2 are needed")


def enough(setting: Setting, sequences: Sequences, order: np.ndarray, tokens: int) -> tuple[int, int]:
    """(how many of the sequences in ``order`` hold ``tokens`` kept tokens or all there are, the tokens they hold)."""
    held = 0
    for count, number in enumerate(order):
        if held >= tokens:
            return count, held
        held += int(setting.reader.keep(sequences[int(number)]).sum())
    return len(order), held


def _with_losses(setting: Setting, text: Scored) -> Scored:
    """With the sequences for the model's own loss; SaetrainError when --loss_tokens asks for more than there are."""
    asked, run = setting.config.scoring.loss_tokens, setting.located.run
    if asked != 0 and setting.head.kind == "masked" and setting.tokenizer.mask_token_id is None:
        log_rank0("the model's own loss is not scored: its tokenizer has no mask token")
        return text
    count, held = enough(setting, text.sequences, text.numbers, setting.budget(asked, LOSS_TOKENS))
    if asked is not None and held < asked:
        # What the run was started with was asked of text whose length was not known yet.
        if run is None or asked != run_config(setting.located).scoring.loss_tokens:
            raise SaetrainError(
                f"--loss_tokens {asked}: of data set {text.name} {held:,} tokens are scored on ({text.what}); give "
                "fewer, or leave the flag out to take up to the default; --eval_tokens may ask for more"
            )
        log_rank0(f"data set {text.name}: the model's loss is scored on {held:,} tokens, of --loss_tokens {asked:,}")
    return dataclasses.replace(text, loss_sequences=count)


def _training_sample(setting: Setting, text: Text) -> Iterator[LabelledActivations]:
    shards = text.train.n_shards
    wanted = setting.config.scoring.fit_tokens
    known = [tokens for tokens in text.tokens if tokens is not None]
    if len(known) == len(text.tokens):
        wanted = max(1, min(wanted, sum(known)))
    for shard in range(shards):
        sequences, _ = text.train.read(shard, text.train.start_cursor, -(-wanted // shards))
        yield from setting.reader.iterate_labelled(sequences)


def _apart(setting: Setting, texts: list[Scored]) -> tuple[list[Scored], Iterator[LabelledActivations]]:
    """Without training text: the nulls are fitted on the end of the first text, which is then not scored on."""
    first = texts[0]
    order = first.sequences.shuffled_order(setting.config.scoring.eval_seed)
    count, _ = enough(setting, first.sequences, order[::-1], setting.config.scoring.fit_tokens)
    count = max(1, min(count, len(order) // 2))
    log_rank0(
        f"without the training text: the nulls are fitted on {count:,} sequences of {first.name}, which are not "
        "scored on"
    )
    fitted, kept = order[len(order) - count :], first.numbers[: len(order) - count]
    if not len(kept):
        raise SaetrainError(f"data set {first.name}: too small to fit the nulls and score on")
    asked = setting.config.eval_tokens
    _, held = enough(setting, first.sequences, kept, asked or 2)
    _require_two(first.name, held, f"{first.what}, beside those that the nulls are fitted on")
    if asked is not None and held < asked:
        raise SaetrainError(
            f"--eval_tokens {asked}: data set {first.name} has only {held:,} tokens to score on beside those that "
            "the nulls are fitted on, for the training text is not at hand; give fewer, or lower --fit_tokens"
        )
    texts = [dataclasses.replace(first, numbers=kept), *texts[1:]]
    return texts, (batch for group in first.groups(fitted) for batch in setting.reader.iterate_labelled(group))
