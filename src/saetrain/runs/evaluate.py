"""``saetrain evaluate PATH``: figures on held-out text beside their nulls, and a verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from saetrain.activations.capture import ActivationCapture
from saetrain.activations.head import HeadModel, load_with_head
from saetrain.activations.hookpoints import find_blocks
from saetrain.activations.model import weights_hash
from saetrain.activations.read import ActivationReader, Labelled
from saetrain.config import EvaluateConfig, RunConfig, from_flat, read_yaml
from saetrain.data.heldout import HeldOutTexts
from saetrain.data.loader import token_policy
from saetrain.data.sequences import Sequences
from saetrain.data.sources import SourceSettings
from saetrain.data.tokenize import DEFAULT_CTX_LEN, Framing, TokenSettings, load_tokenizer
from saetrain.errors import SaetrainError, did_you_mean
from saetrain.evaluation.heldout import Subject
from saetrain.evaluation.nulls import PCA, Moments, RandomDecoder
from saetrain.evaluation.recovered import SplicePolicy, every_token
from saetrain.evaluation.score import Nulls, Scores, score_activations, score_losses
from saetrain.logs.console import say
from saetrain.runs.assessment import Assessment, TextScores, report
from saetrain.runs.directory import CONFIG
from saetrain.runs.locate import Found, Located, locate
from saetrain.runs.metadata import location
from saetrain.runs.prepare import check_vocabulary, quiet_libraries
from saetrain.runs.text import Text, load_text, other_text, unseen

EVAL_TOKENS = {"cpu": 50_000, "cuda": 1_000_000}
LOSS_TOKENS = {"cpu": 8_192, "cuda": 131_072}
GROUP = 64
"""Sequences that are batched together, by length."""
THRESHOLD = 0.0005


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


@dataclass(frozen=True)
class Setting:
    """All that the scores are computed with."""

    config: EvaluateConfig
    located: Located
    head: HeadModel
    tokenizer: Any
    framing: Framing
    hookpoints: dict[str, str]
    """{SAE: its hookpoint}."""
    reader: ActivationReader
    exclude_special: bool
    exclude_first: bool
    most: int | None = None

    def budget(self, asked: int | None, defaults: dict[str, int]) -> int:
        """Tokens to take where ``asked`` may be left to the device."""
        return asked if asked is not None else defaults[self.head.base.device.type]


def evaluate(config: EvaluateConfig, most: int | None = None) -> Assessment:
    """Score, print and write; SaetrainError for what the user can mend.

    ``most``: tokens of each data set at the most, where --eval_tokens leaves them open.
    """
    torch.set_flush_denormal(True)
    quiet_libraries()
    located = locate(config.path)
    setting = dataclasses.replace(prepare(config, located), most=most)
    texts, fit = open_texts(setting)
    nulls = fit_nulls(setting, fit)
    scores = [score(setting, text, nulls) for text in texts]
    assessment = Assessment.of(config, located, setting.head, scores, threshold(config, located))
    report(assessment)
    return assessment


def threshold(config: EvaluateConfig, located: Located) -> float:
    """The rate below which a latent is dead."""
    if config.dead_percentage_threshold is not None:
        return config.dead_percentage_threshold
    return _run_config(located).dead.dead_percentage_threshold if located.run is not None else THRESHOLD


def prepare(config: EvaluateConfig, located: Located) -> Setting:
    """Load the model with its head, and settle hookpoints and token policy; refuses what does not fit the SAEs."""
    name = config.model or located.says("model")
    if name is None:
        raise SaetrainError(f"{config.path}: does not say which model it belongs to; name it by --model")
    base = config.base
    base = dataclasses.replace(
        base, dtype=base.dtype or located.says("model_dtype"), revision=base.revision or located.says("model_revision")
    )
    head = load_with_head(name, base)
    _require_weights(head, located)
    tokenizer = load_tokenizer(name, base.revision, base.trust_remote_code)
    check_vocabulary(head.base, len(tokenizer))
    hookpoints = {sae: _hookpoint(config, head, located, found) for sae, found in located.saes.items()}
    capture = ActivationCapture(head.base, list(dict.fromkeys(hookpoints.values())))
    for sae, found in located.saes.items():
        width = capture.widths[hookpoints[sae]]
        if found.coder.d_in != width:
            raise SaetrainError(
                f"{found.folder}: takes activations of width {found.coder.d_in}, those of {hookpoints[sae]} of {name} "
                f"are {width} wide; was it trained on another model?"
            )
    special, first = _policy(config, located)
    reader = ActivationReader(capture, token_policy(special, first), base.model_batch_tokens)
    if first:
        limits = {hookpoints[sae]: found.about.get("norm_limit") for sae, found in located.saes.items()}
        reader.limits = {hookpoint: limit for hookpoint, limit in limits.items() if limit is not None}
    framing = Framing.of(tokenizer, head.base.causal, _ctx_len(config, located, head))
    return Setting(config, located, head, tokenizer, framing, hookpoints, reader, special, first)


def _require_weights(head: HeadModel, located: Located) -> None:
    expected, found = located.says("model_weights_sha256"), weights_hash(head.base)
    if expected is not None and found != expected:
        raise SaetrainError(
            f"model {head.base.name}: its weights are not those that the SAE in {located.path} was trained on "
            f"({located.says('model')}, SHA-256 {expected[:12]}…, found {str(found)[:12]}…)"
        )


def _hookpoint(config: EvaluateConfig, head: HeadModel, located: Located, sae: Found) -> str:
    """The module whose output the SAE takes; SaetrainError where it is not known or --hookpoint says another."""
    own = sae.about.get("hookpoint") or _translated(sae.about.get("hook_name"), head)
    wanted = config.hookpoint or own
    if wanted is None:
        there = sae.about.get("hook_name")
        says = f"names its hookpoint '{there}', which is no module of the model" if there else "names no hookpoint"
        raise SaetrainError(f"{sae.folder}: {says}; name the module by --hookpoint")
    if own is not None and own != wanted:
        raise SaetrainError(f"--hookpoint {wanted}: the SAE in {sae.folder} was trained on {own}")
    names = [name for name, _ in head.base.module.named_modules() if name]
    if wanted not in names:
        raise SaetrainError(f"--hookpoint {wanted}: no module of {head.base.name}.{did_you_mean(wanted, names)}")
    return wanted


def _translated(name: str | None, head: HeadModel) -> str | None:
    """Our name of a hookpoint that another library names: TransformerLens' residual streams, sparsify's layers."""
    if name is None or name in dict(head.base.module.named_modules()):
        return name
    blocks, layers = find_blocks(head.base)
    parts = name.split(".")
    if len(parts) == 3 and parts[0] == "blocks" and parts[1].isdigit():
        behind = {"hook_resid_post": 0, "hook_resid_pre": -1}.get(parts[2])
        layer = int(parts[1]) + behind if behind is not None else -1
    elif len(parts) == 2 and parts[0] == "layers" and parts[1].isdigit():
        layer = int(parts[1])
    else:
        return None
    return f"{blocks}.{layer}" if 0 <= layer < len(layers) else None


def _policy(config: EvaluateConfig, located: Located) -> tuple[bool, bool]:
    """(special tokens left out, first positions left out): the SAE's own policy unless a flag says another."""

    def chosen(flag: str, key: str) -> bool:
        return located.says(key) is not False if flag == "auto" else flag == "true"

    return chosen(config.exclude_special_tokens, "exclude_special_tokens"), chosen(
        config.exclude_sinks, "exclude_sinks"
    )


def _ctx_len(config: EvaluateConfig, located: Located, head: HeadModel) -> int:
    most = head.base.max_positions
    wanted = config.ctx_len or located.says("ctx_len") or min(DEFAULT_CTX_LEN, most or DEFAULT_CTX_LEN)
    if most is not None and wanted > most:
        raise SaetrainError(f"--ctx_len {wanted}: {head.base.name} has positions for at most {most} tokens")
    return int(wanted)


def _run_config(located: Located) -> RunConfig:
    """The settings of the run that the SAEs are of."""
    assert located.run is not None
    path = str(located.run / CONFIG)
    return from_flat(read_yaml(path), path)


def own_config(setting: Setting) -> RunConfig | None:
    """The settings under which the SAEs' training text is read again, or None where it is not known."""
    located = setting.located
    dataset, shares = located.says("dataset"), located.says("mix")
    if dataset is None:
        return None
    names = (dataset,) if isinstance(dataset, str) else tuple(dataset)
    if located.run is not None:
        config = dataclasses.replace(_run_config(located), dataset=names)
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
    text = None
    if own is not None:
        text = load_text(own, setting.tokenizer, setting.framing)
        _remark_on_text(setting, text)
    elif not config.dataset:
        raise SaetrainError(f"{config.path}: does not say what text it was trained on; name a data set by --dataset")
    texts = []
    if own is not None and text is not None and config.in_sample:
        seed = own.loader.shuffle_seed
        texts.append(_choose(setting, " + ".join(own.dataset), True, text.about["held_out"], text.held_out, seed))
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


def _remark_on_text(setting: Setting, text: Text) -> None:
    expected, found = setting.located.says("fingerprint"), text.about["fingerprint"]
    if expected is not None and expected != found:
        raise SaetrainError(
            f"{setting.config.path}: the text that it was trained on has changed since, so none of it is known to be "
            "held out; score on other text by --dataset with --in_sample false"
        )


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
    count, held = _enough(setting, sequences, order, wanted)
    if asked is not None and held < asked:
        raise SaetrainError(
            f"--eval_tokens {asked}: data set {name} has only {held:,} tokens to score on ({what}); give fewer, or "
            "leave the flag out to take them all"
        )
    return Scored(name, in_sample, what, sequences, order[:count])


def _enough(setting: Setting, sequences: Sequences, order: np.ndarray, tokens: int) -> tuple[int, int]:
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
    count, _ = _enough(setting, first.sequences, order[::-1], setting.config.scoring.fit_tokens)
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


def fit_nulls(setting: Setting, batches: Iterator[Labelled]) -> dict[str, Nulls]:
    """{SAE: what it is held against}, from activations of training tokens."""
    device = setting.head.base.device
    moments = {name: Moments(width, device) for name, width in setting.reader.capture.widths.items()}
    for batch in batches:
        kept = torch.from_numpy(np.flatnonzero(batch.place == 0)).to(device)
        for name, value in batch.values.items():
            moments[name].add(value[kept].float())
    out = {}
    for sae, found in setting.located.saes.items():
        found.coder.to(device)
        moment = moments[setting.hookpoints[sae]]
        mean, k = moment.mean(), found.coder.k
        random = RandomDecoder.of(mean, found.coder.num_latents, k, setting.config.scoring.eval_seed)
        out[sae] = Nulls(mean, PCA(mean, moment.principal(k)), random)
    return out


def score(setting: Setting, text: Scored, nulls: dict[str, Nulls]) -> TextScores:
    """All figures on one text."""
    subjects = {
        name: Subject(setting.hookpoints[name], found.coder, nulls[name].mean)
        for name, found in setting.located.saes.items()
    }
    total = sum(len(text.sequences[int(number)]) for number in text.numbers)
    with tqdm(total=total, unit="tok", desc=f"{Path(text.name).name}: activations", disable=None) as bar:
        batches = (batch for group in text.groups(text.numbers) for batch in setting.reader.labelled(group))
        dead = threshold(setting.config, setting.located)
        scores = score_activations(subjects, nulls, batches, dead, setting.config.scoring, bar.update)
    loss_numbers = _add_losses(setting, text, subjects, nulls, scores)
    return TextScores(text.name, text.in_sample, text.what, scores, loss_numbers)


def _add_losses(
    setting: Setting, text: Scored, subjects: dict[str, Subject], nulls: dict[str, Nulls], scores: dict[str, Scores]
) -> int:
    """Add the figures of the model's own loss to ``scores``; gives the number of sequences that they are over."""
    wanted = setting.budget(setting.config.scoring.loss_tokens, LOSS_TOKENS)
    if not wanted:
        return 0
    count, _ = _enough(setting, text.sequences, text.numbers, wanted)
    numbers = text.numbers[:count]
    everywhere = setting.config.scoring.splice_positions == "all"
    limits = {} if everywhere else setting.reader.limits
    keep = every_token if everywhere else setting.reader.keep
    policies = {
        hookpoint: SplicePolicy(keep, limits.get(hookpoint, float("inf"))) for hookpoint in setting.hookpoints.values()
    }
    total = sum(len(text.sequences[int(number)]) for number in numbers)
    with tqdm(total=total, unit="tok", desc=f"{Path(text.name).name}: model loss", disable=None) as bar:
        losses = score_losses(
            subjects,
            nulls,
            setting.head,
            text.groups(numbers),
            policies,
            setting.tokenizer.mask_token_id,
            setting.reader.batch_tokens,
            setting.config.scoring,
            bar.update,
        )
    for name, figures in losses.items():
        scores[name].figures.update(figures)
    return count
