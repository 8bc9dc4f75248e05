"""Prepare the stages of a run from its settings: model, hookpoints, text, held-out text and batch plan."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saetrain import distributed
from saetrain.activations.capture import ActivationCapture
from saetrain.activations.extract import ActivationExtractor, LabelledActivations, TokenClass
from saetrain.activations.hookpoints import resolve_hookpoints
from saetrain.activations.lm_head import LMHeadModel
from saetrain.activations.model import DTYPES, BaseModel, hash_model_weights, load_model
from saetrain.activations.normalize import compute_norm_limits
from saetrain.coders import SparseCoder
from saetrain.config import RunConfig
from saetrain.data.packing import Sequences
from saetrain.data.sharded import ShardedSource
from saetrain.data.token_store import stored_ctx_len
from saetrain.data.tokenize import DEFAULT_CTX_LEN, Framing, load_tokenizer
from saetrain.distributed import env
from saetrain.errors import SaetrainError
from saetrain.logs.console import log_rank0
from saetrain.optim import resolve_warmup_steps
from saetrain.runs.text_data import load_text
from saetrain.runs.train.choose_step import choose_kernels, step_request
from saetrain.runs.train.end_to_end import load_lm_head_model, require_mask_token, require_one_hookpoint
from saetrain.runs.train.memory import check_memory, count_sae_parameters
from saetrain.training.placement import Placement, SaeCost, plan_placement
from saetrain.types import TokenSequence

CALIBRATION_TOKENS = 16_384
"""Tokens on which centre, scale and norm limit of the activations are measured."""
EVAL_BATCH_SEQUENCES = 64


@dataclass(frozen=True)
class BatchPlan:
    """The steps and tokens of a run, which are known before it starts."""

    tokens_per_step: int
    steps: int
    data_sets: tuple[str, ...]
    shares: tuple[float, ...]
    """Share of each data set in the training tokens."""
    text_tokens: tuple[int | None, ...]
    """Training tokens per data set that the token policy keeps; None for a stream."""

    @property
    def n_tokens(self) -> int:
        """Number of activations that the run trains on."""
        return self.steps * self.tokens_per_step

    @property
    def train_tokens(self) -> int | None:
        """Training tokens of all data sets, or None if one is a stream."""
        known = [tokens for tokens in self.text_tokens if tokens is not None]
        return sum(known) if len(known) == len(self.text_tokens) else None

    def describe_passes(self) -> str:
        """Return a phrase about how often the run passes over its text."""
        rows = zip(self.data_sets, self.shares, self.text_tokens, strict=True)
        counts = {
            name: f"{self.n_tokens * share / max(tokens, 1):.2f} passes over" if tokens is not None else "streaming"
            for name, share, tokens in rows
        }
        if len(counts) > 1:
            return ", ".join(f"{count} {name}" for name, count in counts.items())
        (count,) = counts.values()
        return f"{count} the text" + ("" if self.train_tokens is not None else ", so the number of passes is unknown")


@dataclass(frozen=True)
class RunContext:
    """The stages of a run up to the activations, ready to run."""

    config: RunConfig
    model: BaseModel
    tokenizer: Any
    framing: Framing
    hookpoints: list[str]
    capture: ActivationCapture
    extractor: ActivationExtractor
    train_source: ShardedSource
    held_out: Sequences
    text_metadata: dict[str, Any]
    """Entries about the text in the SAE's metadata."""
    plan: BatchPlan
    weights_sha256: str | None
    """Hash of the model's weight files."""
    head: LMHeadModel | None
    """The model with its head, for the end-to-end losses."""
    placement: Placement
    """Assignment of the SAEs to the ranks."""


def prepare_run(config: RunConfig) -> RunContext:
    """Load and resolve everything that precedes the first activation, and log what was chosen."""
    quiet_libraries()
    _log_local_paths(config)
    head = load_lm_head_model(config) if config.train.end_to_end else None
    model = head.base if head is not None else load_model(config.model, config.base)
    distributed.init_tensor_group(model.device)
    tokenizer = load_tokenizer(config.model, config.base.revision, config.base.trust_remote_code)
    check_vocabulary(model, len(tokenizer))
    hookpoints = resolve_hookpoints(model, config.where)
    if head is not None:
        require_mask_token(config, head, tokenizer)
        require_one_hookpoint(config, hookpoints)
    capture = ActivationCapture(model, hookpoints)
    for width in capture.widths.values():
        config.sae.resolve_num_latents(width)
    ctx_len = resolve_ctx_len(config, model)
    require_shards(config, step_tokens(config, ctx_len) // config.train.grad_acc_steps)
    placement = _plan_placement(config, ctx_len, model, capture)
    check_memory(config, model, capture.widths, ctx_len, placement)
    framing = Framing.from_tokenizer(tokenizer, model.causal, ctx_len)
    text = distributed.local_rank0_first(
        "reading and tokenizing the data set", lambda: load_text(config, tokenizer, framing)
    )
    extractor = ActivationExtractor(
        capture, text.train_source.keep, config.base.resolve_batch_tokens(model.device), config.dataset
    )
    plan = build_batch_plan(config, ctx_len, text.train_tokens)
    return RunContext(
        config,
        model,
        tokenizer,
        framing,
        hookpoints,
        capture,
        extractor,
        text.train_source,
        text.held_out,
        text.metadata,
        plan,
        hash_model_weights(model),
        head,
        placement,
    )


def require_shards(config: RunConfig, micro_tokens: int) -> None:
    """Raise SaetrainError if a rank would have nothing to read or, end to end, fewer sequences than another."""
    shards, ranks = config.loader.data_shards, env.world_size()
    if ranks == 1:
        return
    advice = f"start a new run with --data_shards {ranks * -(-shards // ranks)}; it is part of the sample order"
    if shards < ranks:
        raise SaetrainError(f"--data_shards {shards}: fewer than the {ranks} processes; {advice}")
    if config.train.end_to_end and shards % ranks:
        raise SaetrainError(
            f"--data_shards {shards}: not a multiple of the {ranks} processes, which --loss_fn {config.train.loss_fn} "
            f"needs; {advice}"
        )
    if not config.train.end_to_end and micro_tokens < shards:
        raise SaetrainError(
            f"--data_shards {shards}: more than the {micro_tokens} activations of a micro-batch, so some processes "
            "would get none; raise --batch_size"
        )
    if shards % ranks:
        max_shards = -(-shards // ranks)
        log_rank0(
            f"--data_shards {shards} over {ranks} processes: some read {max_shards} shards and some {shards // ranks}, "
            f"so they wait for one another; {advice}"
        )


def _plan_placement(config: RunConfig, ctx_len: int, model: BaseModel, capture: ActivationCapture) -> Placement:
    """Assign the SAEs to the ranks, and log the reason if there is a choice."""
    costs = {
        name: SaeCost(count_sae_parameters(config, {name: width}), width) for name, width in capture.widths.items()
    }
    placement = plan_placement(
        config.processes,
        costs,
        world_size=env.world_size(),
        step_tokens=step_tokens(config, ctx_len),
        bytes_per_element=model.dtype.itemsize,
        is_spliced=config.train.end_to_end,
    )
    if placement.reason:
        log_rank0(f"{env.world_size()} processes, {placement.reason}")
    return placement


def quiet_libraries() -> None:
    """Disable progress bars of other libraries if there is no terminal, because they fill log files."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()


def _log_local_paths(config: RunConfig) -> None:
    for name, what in ((config.model, "model"), *((name, "data set") for name in config.dataset)):
        if os.path.exists(name):
            log_rank0(f"{what} {name}: using the local path {Path(name).resolve()}")


def check_vocabulary(model: BaseModel, tokens: int) -> None:
    """Raise SaetrainError if the tokenizer has ids for which the model has no embedding."""
    rows = model.module.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if tokens > rows:
        raise SaetrainError(
            f"model {model.name}: its tokenizer has {tokens} tokens, but the model has embeddings for {rows}; "
            "they do not belong together"
        )


def resolve_ctx_len(config: RunConfig, model: BaseModel) -> int:
    """Return the tokens per sequence; SaetrainError if --ctx_len exceeds the positions of the model."""
    given, max_len = config.tokens.ctx_len, model.max_positions
    if given is None:
        given = stored_ctx_len(config.dataset)
    if given is None:
        return min(DEFAULT_CTX_LEN, max_len or DEFAULT_CTX_LEN)
    if max_len is not None and given > max_len:
        raise SaetrainError(f"--ctx_len {given}: {config.model} has positions for at most {max_len} tokens")
    return given


def step_tokens(config: RunConfig, ctx_len: int) -> int:
    """Return the number of activations per optimizer step, over all processes."""
    return config.train.batch_size * ctx_len * config.train.grad_acc_steps * env.world_size()


def build_batch_plan(config: RunConfig, ctx_len: int, text_tokens: tuple[int | None, ...]) -> BatchPlan:
    """Return the plan of the run's steps; SaetrainError if --max_tokens is less than one step."""
    per_step = step_tokens(config, ctx_len)
    steps = config.train.max_tokens // per_step
    if steps < 1:
        raise SaetrainError(
            f"--max_tokens {config.train.max_tokens}: less than one optimizer step, which takes {per_step} tokens "
            f"(batch_size {config.train.batch_size} x ctx_len {ctx_len} x grad_acc_steps "
            f"{config.train.grad_acc_steps} x {env.world_size()} ranks)"
        )
    return BatchPlan(per_step, steps, config.dataset, config.mixing.normalized_shares(len(config.dataset)), text_tokens)


def read_first_sequences(run: RunContext) -> list[TokenSequence]:
    """Return the first sequences of each shard, with CALIBRATION_TOKENS kept tokens together."""
    available, source = run.plan.train_tokens, run.train_source
    wanted = CALIBRATION_TOKENS if available is None else min(CALIBRATION_TOKENS, max(available, 1))
    each = -(-wanted // source.n_shards)
    return [s for shard in range(source.n_shards) for s in source.read(shard, source.start_cursor, each)[0]]


def read_calibration_sample(run: RunContext) -> Any:
    """Return activations of the first training tokens of each shard; sets the extractor's norm limits from them."""
    sequences = read_first_sequences(run)
    sample = run.extractor.extract_all(sequences)
    n_tokens = sum(map(len, sequences))
    what = "special or at position 0" if run.model.causal else "special"
    log_rank0(f"{1 - len(sample) / n_tokens:.1%} of the tokens are {what} and therefore excluded")
    if run.config.buffer.exclude_sinks:
        run.extractor.norm_limits = compute_norm_limits(sample)
    return sample


def held_out_batches(run: RunContext) -> Iterator[LabelledActivations]:
    """Yield raw activations of the kept tokens of the held-out sequences, in a fixed shuffled order."""
    order = run.held_out.shuffled_order(run.config.loader.shuffle_seed)
    for start in range(0, len(order), EVAL_BATCH_SEQUENCES):
        sequences = [run.held_out[int(number)] for number in order[start : start + EVAL_BATCH_SEQUENCES]]
        for batch in run.extractor.iterate_batches(sequences):
            if len(batch):
                yield LabelledActivations(batch.values, batch.doc, np.full(len(batch), TokenClass.KEPT, np.uint8))


def resolve_lr(run: RunContext, coder: SparseCoder) -> float:
    """Return the peak learning rate: the given value, or that of the coder's rule."""
    lr = run.config.optim.lr
    if lr != "auto":
        return lr
    recommended = coder.recommended_lr(run.plan.tokens_per_step, run.plan.steps)
    if recommended is None:
        raise SaetrainError(f"--lr auto: --architecture {run.config.architecture} has no rule; pass a number")
    return recommended


def resolve_config(run: RunContext) -> RunConfig:
    """Return the settings with all resolved values filled in, for ``config.yaml``."""
    config, where = run.config, run.config.where
    if where.hookpoints is None:
        layers = tuple(int(name.rsplit(".", 1)[1]) for name in run.hookpoints)
        where = dataclasses.replace(where, layers=layers, layer_stride=None)
    dead = config.dead
    dtype = next(name for name, dtype in DTYPES.items() if dtype is run.model.dtype)
    sae, warmup = config.sae, resolve_warmup_steps(config.optim, run.plan.steps)
    optim = dataclasses.replace(config.optim, lr_warmup_steps=warmup, weight_decay=config.optim.effective_weight_decay)
    latents = {sae.resolve_num_latents(width) for width in run.capture.widths.values()}
    # If hookpoints differ in width, no single number fits all, so the settings keep the rules.
    if len(latents) == 1:
        (count,) = latents
        sae = dataclasses.replace(sae, num_latents=count)
        coder = config.coder_class.build(sae, 1)
        optim = dataclasses.replace(optim, lr=resolve_lr(run, coder))
        if dead.dead_feature_threshold is None:
            window = dead.resolve_window(config.train.max_tokens, count, coder.expected_l0())
            dead = dataclasses.replace(dead, dead_window_tokens=window)
    columns = run.text_metadata["text_columns"]
    column = columns[0] if len(columns) == 1 else config.source.text_column
    return dataclasses.replace(
        config,
        where=where,
        dead=dead,
        tokens=dataclasses.replace(config.tokens, ctx_len=run.framing.ctx_len),
        sae=sae,
        optim=optim,
        compute=choose_kernels(config.compute, step_request(config, run.model.device)),
        source=dataclasses.replace(config.source, text_column=column),
        base=dataclasses.replace(
            config.base,
            dtype=dtype,
            device=str(run.model.device),
            revision=run.model.revision or config.base.revision,
            model_batch_tokens=run.extractor.batch_tokens,
        ),
    )
