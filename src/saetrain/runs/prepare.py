"""From settings to the stages of a run: model, hookpoints, tokens, held-out text, and the plan of steps."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from torch import Tensor

from saetrain import distributed
from saetrain.activations.capture import ActivationCapture
from saetrain.activations.hookpoints import resolve_hookpoints
from saetrain.activations.model import DTYPES, BaseModel, load_model, weights_hash
from saetrain.activations.normalize import norm_limits
from saetrain.activations.read import ActivationReader
from saetrain.activations.shuffle import DEFAULT_BUFFER_TOKENS, MixingBuffer
from saetrain.config import RunConfig
from saetrain.data.heldout import distinct_rows, split_rows
from saetrain.data.loader import ShardedSequences
from saetrain.data.sequences import Sequences, TokenTable, sequences_of
from saetrain.data.sources import Source, open_source
from saetrain.data.text import find_text_column
from saetrain.data.tokenize import DEFAULT_CTX_LEN, Framing, load_tokenizer, tokenize_rows
from saetrain.errors import SaetrainError
from saetrain.logs.console import say
from saetrain.optim import warmup_steps
from saetrain.runs.resources import check_memory

CALIBRATION_TOKENS = 16_384
"""Tokens on which the inputs' centre, scale and norm limit are measured."""
MAX_BUFFER_BYTES = 2 << 30
"""What the mixing buffer takes at the most unless --buffer_tokens says otherwise."""
MAX_HELD_OUT_ROWS = 20_000
EVAL_SEQUENCES = 64


@dataclass(frozen=True)
class Plan:
    """Numbers of the run that are known before it starts."""

    tokens_per_step: int
    steps: int
    epochs: float
    train_tokens: int
    """Tokens of the training text that the token policy keeps."""

    @property
    def tokens(self) -> int:
        """Activations that the run trains on."""
        return self.steps * self.tokens_per_step


@dataclass(frozen=True)
class Prepared:
    """The stages up to activations, ready to run."""

    config: RunConfig
    model: BaseModel
    tokenizer: Any
    framing: Framing
    hookpoints: list[str]
    capture: ActivationCapture
    reader: ActivationReader
    train: ShardedSequences
    held_out: Sequences
    data: dict[str, Any]
    """What the SAE's metadata say of the text."""
    plan: Plan
    buffer_tokens: int
    """Activations in the mixing buffer."""
    weights_sha256: str | None
    """Hash of the model's weight files."""


def prepare(config: RunConfig) -> Prepared:
    """Load and resolve everything that comes before the first activation; prints what was chosen."""
    _quiet_libraries()
    _announce_local(config)
    model = load_model(config.model, config.base)
    tokenizer = load_tokenizer(config.model, config.base.revision, config.base.trust_remote_code)
    check_vocabulary(model, len(tokenizer))
    hookpoints = resolve_hookpoints(model, config.where)
    capture = ActivationCapture(model, hookpoints)
    for width in capture.widths.values():
        config.sae.latents(width)
    ctx_len = resolve_ctx_len(config, model)
    buffer = buffer_tokens(config, model, capture.widths)
    check_memory(config, model, capture.widths, ctx_len, buffer)
    framing = Framing.of(tokenizer, model.causal, ctx_len)
    train_rows, held_out, data = load_text(config, tokenizer, framing)
    exclude_sinks = config.buffer.exclude_sinks
    train = ShardedSequences(train_rows, config.loader, config.tokens.exclude_special_tokens, exclude_sinks)
    reader = ActivationReader(capture, train.keep, config.base.model_batch_tokens)
    plan = make_plan(config, ctx_len, train_rows.text_tokens)
    return Prepared(
        config,
        model,
        tokenizer,
        framing,
        hookpoints,
        capture,
        reader,
        train,
        held_out,
        data,
        plan,
        buffer,
        weights_hash(model),
    )


def _quiet_libraries() -> None:
    """Without a terminal, another library's progress bars are noise in a log file."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def _announce_local(config: RunConfig) -> None:
    for name, what in ((config.model, "model"), (config.dataset, "data set")):
        if os.path.exists(name):
            say(f"{what} {name}: the local path {Path(name).resolve()}")


def check_vocabulary(model: BaseModel, tokens: int) -> None:
    """SaetrainError when the tokenizer gives ids that the model has no embedding for."""
    rows = model.module.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if tokens > rows:
        raise SaetrainError(
            f"model {model.name}: its tokenizer has {tokens} tokens and the model embeddings for {rows}; "
            "they do not belong together"
        )


def resolve_ctx_len(config: RunConfig, model: BaseModel) -> int:
    """Tokens of a sequence; SaetrainError when more are asked for than the model has positions."""
    given, most = config.tokens.ctx_len, model.max_positions
    if given is None:
        return min(DEFAULT_CTX_LEN, most or DEFAULT_CTX_LEN)
    if most is not None and given > most:
        raise SaetrainError(f"--ctx_len {given}: {config.model} has positions for at most {most} tokens")
    return given


def load_text(config: RunConfig, tokenizer: Any, framing: Framing) -> tuple[Sequences, Sequences, dict[str, Any]]:
    """(training sequences, held-out sequences, what to say of them)."""
    source = open_source(config.dataset, config.source)
    if not len(source.train):
        raise SaetrainError(f"data set {config.dataset}: split {config.source.split} has no rows")
    column = find_text_column(source.train, source.text_column)
    say(f"{source.description}: {column.describe()}")
    say(f"tokens: {framing.describe(tokenizer)}")
    procs, special = config.tokens.data_preprocessing_num_proc, config.tokens.exclude_special_tokens
    table = TokenTable(tokenize_rows(source.train, column, tokenizer, framing, procs))
    rows = distinct_rows(table) if source.distinct else np.arange(len(table))
    if source.held_out is not None:
        held = TokenTable(tokenize_rows(_sample(source), column, tokenizer, framing, procs))
        held_rows = distinct_rows(held) if source.distinct else np.arange(len(held))
        held_out = sequences_of(held, held_rows, framing, special)
        fresh = ~np.isin(table.text_hash[rows], held.text_hash)
        how = f"split '{source.held_out_split}'"
        if not fresh.all():
            how += f"; {table.lengths[rows[~fresh]].sum():,} tokens of the same texts are not trained on"
        rows = rows[fresh]
    else:
        rows, held_rows, how = split_rows(table, rows, config.evaluation.eval_tokens)
        held_out = sequences_of(table, held_rows, framing, special)
    train = sequences_of(table, rows, framing, special)
    if not len(train) or not len(held_out):
        raise SaetrainError(
            f"data set {config.dataset}: too small to train on and hold text out: {len(table)} rows, "
            f"{table.lengths.sum()} tokens"
        )
    say(f"training text: {train.text_tokens:,} tokens; held out: {held_out.text_tokens:,} tokens ({how})")
    about = {
        "text_columns": list(column.columns),
        "held_out": how,
        "train_tokens_available": train.text_tokens,
        "fingerprint": text_fingerprint(table, rows),
    }
    return train, held_out, about


def text_fingerprint(table: TokenTable, rows: np.ndarray) -> str:
    """Hash of the training text: the hashes and lengths of its rows in their order."""
    digest = xxhash.xxh3_64(table.text_hash[rows].tobytes())
    digest.update(table.lengths[rows].tobytes())
    return str(digest.hexdigest())


def _sample(source: Source) -> Any:
    rows = source.held_out
    assert rows is not None
    if len(rows) <= MAX_HELD_OUT_ROWS:
        return rows
    chosen = np.random.default_rng(0).choice(len(rows), MAX_HELD_OUT_ROWS, replace=False)
    return rows.select(np.sort(chosen))


def make_plan(config: RunConfig, ctx_len: int, train_tokens: int) -> Plan:
    """Steps of the run; SaetrainError when --max_tokens does not make one."""
    per_step = config.train.batch_size * ctx_len * config.train.grad_acc_steps * distributed.world_size()
    steps = config.train.max_tokens // per_step
    if steps < 1:
        raise SaetrainError(
            f"--max_tokens {config.train.max_tokens}: less than one optimizer step, which takes {per_step} tokens "
            f"(batch_size {config.train.batch_size} x ctx_len {ctx_len} x grad_acc_steps "
            f"{config.train.grad_acc_steps} x {distributed.world_size()} ranks)"
        )
    return Plan(per_step, steps, steps * per_step / max(train_tokens, 1), train_tokens)


def make_buffer(run: Prepared) -> MixingBuffer:
    """The mixing buffer over the training text, at its start."""
    shards = run.train.n_shards
    owned = [shard for shard in range(shards) if shard % distributed.world_size() == distributed.rank()]
    seed = run.config.loader.shuffle_seed
    return MixingBuffer(run.reader, run.train, owned, shards, max(1, run.buffer_tokens // shards), seed)


def buffer_tokens(config: RunConfig, model: BaseModel, widths: dict[str, int]) -> int:
    """Tokens of the mixing buffer: as asked, else the default, or what MAX_BUFFER_BYTES holds of several hookpoints."""
    per_token = sum(widths.values()) * model.dtype.itemsize
    default = max(CALIBRATION_TOKENS, min(DEFAULT_BUFFER_TOKENS, MAX_BUFFER_BYTES // per_token))
    return config.buffer.buffer_tokens or default


def read_sample(run: Prepared) -> Any:
    """Activations of the first training tokens of each shard; sets the reader's norm limits from them."""
    each = -(-min(CALIBRATION_TOKENS, max(run.plan.train_tokens, 1)) // run.train.n_shards)
    sequences = [s for shard in range(run.train.n_shards) for s in run.train.read(shard, run.train.start, each)[0]]
    sample = run.reader.read(sequences)
    total = sum(map(len, sequences))
    say(f"{1 - len(sample) / total:.1%} of the tokens are special or at position 0 of a causal model and left out")
    if run.config.buffer.exclude_sinks:
        run.reader.limits = norm_limits(sample)
    return sample


def held_out_batches(run: Prepared) -> Iterator[dict[str, Tensor]]:
    """Raw activations of the held-out sequences, in a fixed mixed order."""
    order = np.random.default_rng([run.config.loader.shuffle_seed, 1]).permutation(len(run.held_out))
    for start in range(0, len(order), EVAL_SEQUENCES):
        sequences = [run.held_out[int(number)] for number in order[start : start + EVAL_SEQUENCES]]
        for batch in run.reader.batches(sequences):
            if len(batch):
                yield batch.values


def resolved(run: Prepared) -> RunConfig:
    """The settings with everything filled in that was found out, for ``config.yaml``."""
    config, where = run.config, run.config.where
    if where.hookpoints is None:
        layers = tuple(int(name.rsplit(".", 1)[1]) for name in run.hookpoints)
        where = dataclasses.replace(where, layers=layers, layer_stride=None)
    dead = config.dead
    if dead.dead_feature_threshold is None:
        dead = dataclasses.replace(dead, dead_window_tokens=dead.window(config.train.max_tokens))
    dtype = next(name for name, dtype in DTYPES.items() if dtype is run.model.dtype)
    return dataclasses.replace(
        config,
        where=where,
        dead=dead,
        tokens=dataclasses.replace(config.tokens, ctx_len=run.framing.ctx_len),
        base=dataclasses.replace(config.base, dtype=dtype, device=str(run.model.device)),
        buffer=dataclasses.replace(config.buffer, buffer_tokens=run.buffer_tokens),
        optim=dataclasses.replace(config.optim, lr_warmup_steps=warmup_steps(config.optim, run.plan.steps)),
    )
