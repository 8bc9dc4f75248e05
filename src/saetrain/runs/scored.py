"""The texts that SAEs are scored on, and the tokens on which their nulls are fitted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from saetrain.activations.read import Labelled
from saetrain.config import RunConfig, from_flat
from saetrain.data.heldout import HeldOutTexts
from saetrain.data.sequences import Sequences
from saetrain.data.sources import SourceSettings
from saetrain.data.tokenize import TokenSettings
from saetrain.errors import SaetrainError
from saetrain.logs.console import say
from saetrain.runs.match import Setting, run_config
from saetrain.runs.metadata import location
from saetrain.runs.text import Text, load_text, other_text, unseen

EVAL_TOKENS = {"cpu": 50_000, "cuda": 1_000_000}
GROUP = 64
"""Sequences that are batched together, by length."""


@dataclass(frozen=True)
class Scored:
    """One text to score on: which of its sequences, in order; ``what`` says how it was chosen."""

    name: str
    in_sample: bool
    what: str
    sequences: Sequences
    numbers: np.ndarray

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


def open_texts(setting: Setting) -> tuple[list[Scored], Iterator[Labelled]]:
    """(the texts to score on, the SAE's own first; activations of other tokens, on which the nulls are fitted)."""
    config, own = setting.config, own_config(setting)
    text = _own_text(setting, own) if own is not None else None
    if own is None and not config.dataset:
        raise SaetrainError(f"{config.path}: does not say what text it was trained on; name a data set by --dataset")
    texts = []
    if own is not None and text is not None and config.in_sample:
        # Another library may have trained on what we would hold out.
        ours = setting.located.says("fingerprint") is not None
        what = text.about["held_out"] if ours else f"{text.about['held_out']}, but not by who trained the SAE"
        texts.append(_choose(setting, " + ".join(own.dataset), True, what, text.held_out, own.loader.shuffle_seed))
    seen = text.trained_on() if text is not None else HeldOutTexts()
    for name in config.dataset:
        if own is not None and location(name) in own.dataset:
            if not config.in_sample:
                raise SaetrainError(f"--dataset {name}: the SAE was trained on it; leave out --in_sample false")
            continue
        texts.append(_other(setting, name, seen))
    if text is not None:
        return texts, _training_sample(setting, text)
    return _apart(setting, texts)


def _own_text(setting: Setting, own: RunConfig) -> Text | None:
    """The text that the SAEs were trained on, or None where it can't be had and is not to be scored on."""
    try:
        text = load_text(own, setting.tokenizer, setting.framing)
        expected, found = setting.located.says("fingerprint"), text.about["fingerprint"]
        if expected is not None and expected != found:
            raise SaetrainError(
                f"{setting.config.path}: the text that it was trained on has changed since, so none of it is known to "
                "be held out; score on other text by --dataset with --in_sample false"
            )
    except SaetrainError as error:
        if setting.config.in_sample:
            raise
        say(f"without the training text: {error}")
        return None
    return text


def _other(setting: Setting, name: str, seen: HeldOutTexts) -> Scored:
    config = setting.config
    source = None
    if any(value is not None for value in (config.split, config.dataset_config, config.text_column)):
        source = SourceSettings(
            split=config.split or SourceSettings.split,
            dataset_config=config.dataset_config,
            text_column=config.text_column,
        )
    tokens = TokenSettings(ctx_len=setting.framing.ctx_len, exclude_special_tokens=setting.exclude_special)
    table, what = other_text(name, source, tokens, setting.tokenizer, setting.framing)
    sequences, what = unseen(name, table, what, setting.framing, setting.exclude_special, seen)
    return _choose(setting, name, False, what, sequences, setting.config.scoring.eval_seed)


def _choose(setting: Setting, name: str, in_sample: bool, what: str, sequences: Sequences, seed: int) -> Scored:
    """The first sequences of a mixed order that hold --eval_tokens tokens; SaetrainError when there are fewer."""
    asked = setting.config.eval_tokens
    wanted = setting.most or setting.budget(asked, EVAL_TOKENS)
    order = sequences.mixed_order(seed)
    count, held = enough(setting, sequences, order, wanted)
    if asked is not None and held < asked:
        raise SaetrainError(
            f"--eval_tokens {asked}: data set {name} has only {held:,} tokens to score on ({what}); give fewer, or "
            "leave the flag out to take them all"
        )
    return Scored(name, in_sample, what, sequences, order[:count])


def enough(setting: Setting, sequences: Sequences, order: np.ndarray, tokens: int) -> tuple[int, int]:
    """(how many of the sequences in ``order`` hold ``tokens`` kept tokens or all there are, the tokens they hold)."""
    held = 0
    for count, number in enumerate(order):
        if held >= tokens:
            return count, held
        held += int(setting.reader.keep(sequences[int(number)]).sum())
    return len(order), held


def _training_sample(setting: Setting, text: Text) -> Iterator[Labelled]:
    shards = text.train.n_shards
    wanted = setting.config.scoring.fit_tokens
    known = [tokens for tokens in text.tokens if tokens is not None]
    if len(known) == len(text.tokens):
        wanted = max(1, min(wanted, sum(known)))
    for shard in range(shards):
        sequences, _ = text.train.read(shard, text.train.start, -(-wanted // shards))
        yield from setting.reader.labelled(sequences)


def _apart(setting: Setting, texts: list[Scored]) -> tuple[list[Scored], Iterator[Labelled]]:
    """Without training text: the nulls are fitted on the end of the first text, which is then not scored on."""
    first = texts[0]
    order = first.sequences.mixed_order(setting.config.scoring.eval_seed)
    count, _ = enough(setting, first.sequences, order[::-1], setting.config.scoring.fit_tokens)
    count = max(1, min(count, len(order) // 2))
    say(
        f"the training text is not known: the nulls are fitted on {count:,} sequences of {first.name}, which are not "
        "scored on"
    )
    fitted, kept = order[len(order) - count :], first.numbers[: len(order) - count]
    if not len(kept):
        raise SaetrainError(f"data set {first.name}: too small to fit the nulls and score on")
    texts = [dataclasses.replace(first, numbers=kept), *texts[1:]]
    return texts, (batch for group in first.groups(fitted) for batch in setting.reader.labelled(group))
