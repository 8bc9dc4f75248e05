"""Prepare the stages of a run from its settings: model, sites, training text and held-out text."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saetrain import distributed
from saetrain.activations.capture import ActivationCapture
from saetrain.activations.extract import ActivationExtractor, Activations, LabelledActivations, TokenClass
from saetrain.activations.hookpoints import resolve_hookpoints
from saetrain.activations.lm_head import LMHeadModel
from saetrain.activations.model import DTYPES, BaseModel, hash_model_weights, load_model
from saetrain.coders import GroupSettings
from saetrain.config import RunConfig
from saetrain.data.packing import Sequences
from saetrain.data.sharded import ShardedSource
from saetrain.data.token_store import stored_ctx_len
from saetrain.data.tokenize import DEFAULT_CTX_LEN, Framing, load_tokenizer
from saetrain.distributed import env
from saetrain.errors import SaetrainError
from saetrain.logs.console import log_rank0
from saetrain.runs.text_data import load_text
from saetrain.runs.train.activation_cache import open_activation_cache
from saetrain.runs.train.end_to_end import load_lm_head_model, require_mask_token, require_one_hookpoint
from saetrain.runs.train.memory import check_memory
from saetrain.runs.train.plan import SaePlan, plan_saes
from saetrain.runs.train.resolve import Resolved, count_step_tokens, fill_in_resolved, resolve_run
from saetrain.types import Cursor, ModelBatch, Site

CALIBRATION_TOKENS = 16_384
"""Tokens on which centre, scale and norm limit of the activations are measured."""


@dataclass(frozen=True)
class RunContext:
    """The stages of a run up to the activations, ready to run."""

    config: RunConfig
    resolved: Resolved
    model: BaseModel
    tokenizer: Any
    framing: Framing
    hookpoints: list[str]
    """Hookpoints that the flags select."""
    plans: dict[str, SaePlan]
    """{SAE: its plan} of the whole run, including the SAEs of other ranks."""
    sites: dict[str, Site]
    """{site: what its SAEs read and reconstruct}."""
    extractor: ActivationExtractor
    train_source: ShardedSource
    held_out: Sequences
    text_tokens: tuple[int | None, ...]
    """Training tokens per data set that the token policy keeps; None for a stream."""
    text_metadata: dict[str, Any]
    """Entries about the text in the SAE's metadata."""
    read_s: float
    """Seconds that reading and tokenizing take, as in :class:`TrainingText`."""
    weights_sha256: str | None
    """Hash of the model's weight files."""
    head: LMHeadModel | None
    """The model with its head, for the end-to-end losses."""

    @property
    def train_tokens(self) -> int | None:
        """Training tokens of all data sets, or None if one is a stream."""
        known = [tokens for tokens in self.text_tokens if tokens is not None]
        return sum(known) if len(known) == len(self.text_tokens) else None


def prepare_run(config: RunConfig, kept: Resolved | None = None) -> RunContext:
    """Load and resolve everything that precedes the first activation, and log what was chosen.

    ``kept``: the values of the first start of a run that is resumed.
    """
    quiet_libraries()
    _log_local_paths(config)
    head = load_lm_head_model(config) if config.train.end_to_end else None
    model = head.base if head is not None else load_model(config.model, config.base)
    distributed.init_tensor_group(model.device)
    tokenizer = load_tokenizer(config.model, config.base.revision, config.base.trust_remote_code)
    check_vocabulary(model, len(tokenizer))
    hookpoints = resolve_hookpoints(model, config.where)
    plans = plan_saes(config, hookpoints)
    sites = {plan.site.name: plan.site for plan in plans.values()}
    if head is not None:
        require_mask_token(config, head, tokenizer)
        require_one_hookpoint(config, hookpoints)
    capture = ActivationCapture(model, list(dict.fromkeys(name for site in sites.values() for name in site.hookpoints)))
    ctx_len = resolve_ctx_len(config, model)
    require_shards(config, count_step_tokens(config, ctx_len) // config.train.grad_acc_steps)
    resolved = resolve_run(config, model, plans, capture.widths, ctx_len, kept)
    check_memory(config, model, plans, capture.widths, ctx_len, resolved.placement)
    framing = Framing.from_tokenizer(tokenizer, model.causal, ctx_len)
    batch_tokens = config.base.resolve_batch_tokens(model.device)
    # The end-to-end losses run single sequences, in the sample order.
    grouped = 1 if config.train.end_to_end else batch_tokens
    text = distributed.local_rank0_first(
        "reading and tokenizing the data set", lambda: load_text(config, tokenizer, framing, grouped)
    )
    weights_sha256 = hash_model_weights(model)
    cache = open_activation_cache(config, capture, weights_sha256)
    extractor = ActivationExtractor(capture, text.train_source.keep, batch_tokens, config.dataset, cache)
    return RunContext(
        config=config,
        resolved=resolved,
        model=model,
        tokenizer=tokenizer,
        framing=framing,
        hookpoints=hookpoints,
        plans=plans,
        sites=sites,
        extractor=extractor,
        train_source=text.train_source,
        held_out=text.held_out,
        text_tokens=text.train_tokens,
        text_metadata=text.metadata,
        read_s=text.read_s,
        weights_sha256=weights_sha256,
        head=head,
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


def quiet_libraries() -> None:
    """Disable progress bars and messages of other libraries; our messages name what the user must do."""
    import datasets
    import transformers

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    transformers.logging.set_verbosity_error()


def _log_local_paths(config: RunConfig) -> None:
    for name, what in ((config.model, "model"), *((name, "data set") for name in config.dataset)):
        # Only such a name could also be a hub id.
        if os.path.exists(name) and not os.path.isabs(name) and name.count("/") < 2:
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


def read_batches_at(run: RunContext, cursors: Mapping[int, Cursor]) -> list[ModelBatch]:
    """Return training batches of the shards from ``cursors`` on, with about CALIBRATION_TOKENS kept tokens together."""
    return run.train_source.read_batches_at(cursors, _calibration_tokens(run))


def _calibration_tokens(run: RunContext) -> int:
    available = run.train_tokens
    return CALIBRATION_TOKENS if available is None else min(CALIBRATION_TOKENS, max(available, 1))


def read_calibration_sample(run: RunContext) -> Activations:
    """Return activations of the first training batches."""
    batches = run.train_source.read_first_batches(_calibration_tokens(run))
    sample = run.extractor.extract_all(batches)
    n_tokens = sum(len(sequence) for batch in batches for sequence in batch)
    what = "special or at position 0" if run.model.causal else "special"
    log_rank0(f"{1 - len(sample) / n_tokens:.1%} of the tokens are {what} and therefore excluded")
    return sample


def held_out_batches(run: RunContext) -> Iterator[LabelledActivations]:
    """Yield raw activations of the kept tokens of the held-out sequences, in a fixed shuffled order."""
    order = run.held_out.shuffled_order(run.config.loader.shuffle_seed)
    for batch in run.extractor.iterate_batches(run.held_out.iterate_batches(order, run.extractor.batch_tokens)):
        if len(batch):
            yield LabelledActivations(batch.values, batch.doc, np.full(len(batch), TokenClass.KEPT, np.uint8))


def resolve_config(run: RunContext, sae: str | None = None) -> RunConfig:
    """Return the settings with all resolved values filled in, for ``config.yaml``; ``sae``: those of this SAE alone."""
    names = run.plans if sae is None else (sae,)
    config = run.config if sae is None else run.plans[sae].config
    config, where = fill_in_resolved(config, run.resolved, names), config.where
    if where.hookpoints is None:
        layers = tuple(int(name.rsplit(".", 1)[1]) for name in run.hookpoints)
        where = dataclasses.replace(where, layers=layers, layer_stride=None)
    dtype = next(name for name, dtype in DTYPES.items() if dtype is run.model.dtype)
    widths = run.extractor.capture.widths
    plans = (run.plans[name] for name in names)
    latents = {plan.config.sae.resolve_num_latents(plan.site.sum_widths(widths)[0]) for plan in plans}
    # If the SAEs differ in size, no single number fits all, so the settings keep the rule.
    settings = dataclasses.replace(config.sae, num_latents=latents.pop()) if len(latents) == 1 else config.sae
    if isinstance(settings, GroupSettings):
        settings = dataclasses.replace(settings, group_tokens=run.resolved.group_tokens)
    columns = run.text_metadata["text_columns"]
    column = columns[0] if len(columns) == 1 else config.source.text_column
    return dataclasses.replace(
        config,
        where=where,
        tokens=dataclasses.replace(config.tokens, ctx_len=run.framing.ctx_len),
        sae=settings,
        source=dataclasses.replace(config.source, text_column=column),
        base=dataclasses.replace(
            config.base,
            dtype=dtype,
            device=str(run.model.device),
            revision=run.model.revision or config.base.revision,
            model_batch_tokens=run.extractor.batch_tokens,
        ),
    )
