"""Prepare a run on stored activations (``--activations``): no model, no text, and documents that are held out."""

from __future__ import annotations

import dataclasses
import fnmatch
from pathlib import Path

import numpy as np

from saetrain import distributed
from saetrain.activations.extract import ActivationExtractor
from saetrain.activations.hookpoints import HookpointSettings
from saetrain.activations.model import resolve_device
from saetrain.activations.stored import ActivationStore, StoredBatches, StoredCapture, StoredSequence
from saetrain.config import RunConfig
from saetrain.data.holdout_split import MAX_HELD_OUT_SHARE, MIN_HELD_OUT_TOKENS
from saetrain.data.packing import Sequences
from saetrain.data.sharded import ShardedSequences
from saetrain.data.tokenize import DEFAULT_CTX_LEN, Framing
from saetrain.errors import SaetrainError, did_you_mean
from saetrain.logs.console import log_rank0
from saetrain.runs.train.memory import check_memory
from saetrain.runs.train.plan import plan_saes
from saetrain.runs.train.resolve import Resolved, count_step_tokens, resolve_run
from saetrain.runs.train.setup import RunContext, quiet_libraries, require_shards

HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def prepare_stored_run(config: RunConfig, kept: Resolved | None = None) -> RunContext:
    """Open the activations and resolve everything that precedes the first step, as :func:`setup.prepare_run` does."""
    quiet_libraries()
    config = _refuse_model_flags(config)
    assert config.activations is not None
    store = ActivationStore(Path(config.activations))
    if config.base.dtype not in (None, store.metadata.dtype):
        raise SaetrainError(
            f"--dtype {config.base.dtype}: the activations are stored in {store.metadata.dtype}; omit it"
        )
    device = resolve_device(config.base.device)
    distributed.init_tensor_group(device)
    hookpoints = _match_hookpoints(store, config.where)
    config = dataclasses.replace(config, where=HookpointSettings(hookpoints=tuple(hookpoints)))
    capture = StoredCapture(store, hookpoints, device)
    plans = plan_saes(config, hookpoints)
    ctx_len = config.tokens.ctx_len or DEFAULT_CTX_LEN
    require_shards(config, count_step_tokens(config, ctx_len) // config.train.grad_acc_steps)
    resolved = resolve_run(config, capture.model, plans, capture.widths, ctx_len, kept)
    check_memory(config, capture.model, plans, capture.widths, ctx_len, resolved.placement)
    train, held_out, how = split_units(store, config.evaluation.eval_tokens)
    log_rank0(
        f"activations {store.folder}: {train.text_tokens:,} tokens to train on, "
        f"{held_out.text_tokens:,} held out ({how})"
    )
    log_rank0("without a model there is no assessment, no features and no report; held-out metrics are printed")
    # Each unit is a batch, which the store reads as a whole.
    source = ShardedSequences(train, config.loader, True, True, batch_tokens=1)
    batches = StoredBatches(store, pin_memory=device.type == "cuda")
    batch_tokens = config.base.resolve_batch_tokens(device)
    metadata = {
        "text_columns": [],
        "held_out": how,
        "train_tokens_available": train.text_tokens,
        "fingerprint": store.fingerprint,
    }
    return RunContext(
        config=config,
        resolved=resolved,
        model=capture.model,
        tokenizer=None,
        framing=Framing(False, ctx_len, None, None),
        hookpoints=hookpoints,
        plans=plans,
        sites={plan.site.name: plan.site for plan in plans.values()},
        extractor=ActivationExtractor(capture, source.keep, batch_tokens, cache=batches),
        train_source=source,
        held_out=held_out,
        text_tokens=(train.text_tokens,),
        text_metadata=metadata,
        read_s=0.0,
        weights_sha256=None,
        head=None,
    )


def _refuse_model_flags(config: RunConfig) -> RunConfig:
    """Return the settings without what needs a model; SaetrainError for flags that need one."""
    given = {
        f"--loss_fn {config.train.loss_fn}": config.train.end_to_end,
        "--cache_activations": config.cache.cache_activations,
        "--finetune": config.finetune is not None,
        "--layers": config.where.layers is not None,
        "--layer_stride": config.where.layer_stride is not None,
    }
    for flag in (flag for flag, is_given in given.items() if is_given):
        advice = "name hookpoints with --hookpoints" if "layer" in flag else "omit it"
        raise SaetrainError(f"{flag}: needs a model, but --activations {config.activations} has none; {advice}")
    features = dataclasses.replace(config.features, feature_tokens=0)
    return dataclasses.replace(config, assess=False, features=features)


def _match_hookpoints(store: ActivationStore, where: HookpointSettings) -> list[str]:
    names = list(store.metadata.hookpoints)
    patterns = ("*",) if where.hookpoints is None else where.hookpoints
    chosen: set[str] = set()
    for pattern in patterns:
        matched = [name for name in names if name == pattern or fnmatch.fnmatch(name, pattern)]
        if not matched:
            raise SaetrainError(
                f"--hookpoints {pattern}: {store.folder} has no such hookpoint.{did_you_mean(pattern, names)} It has "
                f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''}"
            )
        chosen.update(matched)
    return [name for name in names if name in chosen]


class StoredSequences(Sequences):
    """One sequence per unit: the tokens of the unit that ``is_chosen`` marks, a (N,) bool per unit."""

    def __init__(self, store: ActivationStore, chosen: list[np.ndarray]) -> None:
        self._store, self._chosen = store, chosen
        counts = np.array([int(mask.sum()) for mask in chosen], dtype=np.int64)
        self._units = np.flatnonzero(counts)
        self.lengths = counts[self._units]
        self.text_tokens = int(counts.sum())

    def __len__(self) -> int:
        return len(self._units)

    def __getitem__(self, index: int) -> StoredSequence:
        unit = int(self._units[index])
        rows, columns = np.flatnonzero(self._chosen[unit]), self._store.read_columns(unit)
        kinds = np.zeros(len(rows), dtype=np.uint8)
        return StoredSequence(columns["ids"][rows], kinds, columns["doc"][rows], unit, rows)


def split_units(store: ActivationStore, eval_tokens: int) -> tuple[StoredSequences, StoredSequences, str]:
    """Split the tokens of a store into (training sequences, held-out sequences, description of the choice).

    Documents are held out in the order of a hash of their number, until they have ``eval_tokens`` tokens (at least 20k)
    or a tenth of all tokens. Tokens without a document, -1, count as one document per unit.
    """
    documents = []
    for unit in range(len(store.lengths)):
        doc = store.read_columns(unit)["doc"]
        documents.append(np.where(doc < 0, -1 - unit, doc))
    has_documents = any((each >= 0).any() for each in documents)
    names, of_token = np.unique(np.concatenate([np.zeros(0, np.int64), *documents]), return_inverse=True)
    sizes = np.bincount(of_token, minlength=len(names))
    order = np.argsort((names.astype(np.uint64) + np.uint64(1)) * HASH_FACTOR, kind="stable")
    limit = int(sizes.sum() * MAX_HELD_OUT_SHARE)
    target = min(max(eval_tokens, MIN_HELD_OUT_TOKENS), limit)
    is_held_out, taken = np.zeros(len(names), dtype=bool), 0
    for document in order:
        if taken < target and taken + sizes[document] <= limit:
            is_held_out[document] = True
            taken += int(sizes[document])
    if not taken or taken == sizes.sum():
        raise SaetrainError(
            f"--activations {store.folder}: too small to train on and hold out a part: {sizes.sum():,} tokens in "
            f"{len(names):,} {'documents' if has_documents else 'units'}; one may have at most a tenth of all "
            "tokens"
        )
    ends = np.cumsum(store.lengths)[:-1]
    held_out = np.split(is_held_out[of_token], ends)
    what = "documents" if has_documents else "pieces"
    return (
        StoredSequences(store, [~mask for mask in held_out]),
        StoredSequences(store, held_out),
        f"{what} chosen by a hash of their number",
    )
