"""``saetrain features RUN``: collect what each latent of the SAEs fires on, in one pass over the text."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saetrain.activations.model import explain_out_of_memory
from saetrain.coders import architecture_name
from saetrain.config import EvaluateConfig, FeaturesConfig
from saetrain.data.packing import Sequences
from saetrain.data.sharded import ShardedSource
from saetrain.errors import SaetrainError
from saetrain.features.build import FeatureBuilder
from saetrain.features.collect import Target, limit_tokens, read_text
from saetrain.features.lens import compute_lens
from saetrain.features.pairs import TokenStream
from saetrain.features.settings import DEFAULT_FEATURE_TOKENS
from saetrain.features.statistics import TOKENS_AFTER, TOKENS_BEFORE
from saetrain.features.store import METADATA_FILE, STREAM_FILE, write_metadata, write_stream
from saetrain.logs.console import log_rank0, open_bar
from saetrain.runs.ablate_latents import LOSS_NAMES, measure_loss_effects
from saetrain.runs.evaluate.load_saes import load_saes
from saetrain.runs.evaluate.setup import EvalContext, build_eval_context
from saetrain.runs.evaluate.texts import load_training_config, load_training_text, open_eval_texts
from saetrain.runs.run_dir import find_features_folder
from saetrain.runs.train.setup import quiet_libraries
from saetrain.types import ModelBatch

TEMPORARY_PREFIX = ".collecting-"


@dataclass(frozen=True)
class FeatureText:
    """The text on which features are collected: `held_out`, `training` or `other` text.

    ``open_batches`` returns its model batches from the beginning, without end or as many as there are.
    """

    name: str
    part: str
    description: str
    n_tokens: int
    """Number of tokens, about."""
    open_batches: Callable[[], Iterator[ModelBatch]]


def collect_features(config: FeaturesConfig, *, is_in_run: bool = False) -> list[Path]:
    """Collect the features of the SAEs below a path, and return their folders; SaetrainError for a user's errors.

    ``is_in_run``: the run of the SAEs has already logged what it reads.
    """
    torch.set_flush_denormal(True)
    quiet_libraries()
    loaded = load_saes(config.path)
    eval_config = EvaluateConfig(
        path=config.path,
        dataset=(config.dataset,) if config.dataset else (),
        in_sample=not config.dataset,
        model=config.model,
        base=config.base,
        details=not is_in_run,
    )
    context = build_eval_context(eval_config, loaded, None)
    folders = {name: find_features_folder(found.folder) for name, found in loaded.saes.items()}
    try:
        with explain_out_of_memory(config.base, "out of memory while collecting features"):
            _collect_into(folders, context, config)
    except OSError as error:
        raise SaetrainError(
            f"writing to {next(iter(folders.values())).parent} failed: {error}; free disk space and run "
            f"`saetrain features {config.path}`"
        ) from error
    return list(folders.values())


def _collect_into(folders: dict[str, Path], context: EvalContext, config: FeaturesConfig) -> None:
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
        # A folder with metadata is complete, so an interrupted collection must not leave them.
        (folder / METADATA_FILE).unlink(missing_ok=True)
        for left_over in folder.glob(f"{TEMPORARY_PREFIX}*"):
            shutil.rmtree(left_over)
    text, started, names = _open_feature_text(context, config), time.perf_counter(), list(folders)
    targets = {
        name: Target(context.sites[name], found.coder.to(context.head.base.device).requires_grad_(False))
        for name, found in context.loaded.saes.items()
    }
    with tempfile.TemporaryDirectory(dir=folders[names[0]], prefix=TEMPORARY_PREFIX) as temporary:
        with open_bar("collecting features", text.n_tokens) as bar:
            stream, sums = read_text(targets, context.extractor, text.open_batches(), Path(temporary), bar.update)
        if not stream.n_kept:
            raise SaetrainError(f"data set {text.name}: contains no token that the token policy keeps")
        seconds = {"model_and_encoder": time.perf_counter() - started}
        write_stream(folders[names[0]], stream)
        for name in names[1:]:
            shutil.copyfile(folders[names[0]] / STREAM_FILE, folders[name] / STREAM_FILE)
        for name, folder in folders.items():
            coder = targets[name].coder
            effects = np.full((coder.num_latents, 3), np.nan)
            if config.features.ablate_latents:
                ablation = measure_loss_effects(context, name, text.open_batches(), sums[name].pairs.counts, config)
                effects[ablation.latents] = ablation.effects
                seconds["ablation"] = ablation.seconds
            before = time.perf_counter()
            lens = compute_lens(context.head, coder.W_dec, len(context.tokenizer))
            builder = FeatureBuilder(folder, stream, sums[name], lens, distinct=config.features.distinct_documents)
            builder.write_files(context.tokenizer, effects)
            seconds["statistics"] = time.perf_counter() - before
            described = _describe_collection(context, name, text, stream, lens.kind)
            write_metadata(folder, {**described, "mean_l0": sums[name].mean_l0, "seconds": seconds})
    log_rank0(
        f"features of {len(folders)} SAE{'s' * (len(folders) > 1)} on {stream.n_kept:,} tokens "
        f"({text.part.replace('_', ' ')} text) in {time.perf_counter() - started:.0f} s, of which "
        f"{seconds['model_and_encoder']:.0f} s for model and encoder"
    )


def _describe_collection(
    context: EvalContext, name: str, text: FeatureText, stream: TokenStream, lens_kind: str
) -> dict[str, Any]:
    """Return the metadata of one SAE's features, without timings."""
    coder, metadata = context.loaded.saes[name].coder, context.loaded.saes[name].metadata
    return {
        "sae": name,
        "hookpoint": context.sites[name].name,
        "model": context.head.base.name,
        "dataset": text.name,
        "text": text.part,
        "text_description": text.description,
        "tokens": len(stream),
        "kept_tokens": stream.n_kept,
        "sequences": stream.n_sequences,
        "ctx_len": context.framing.ctx_len,
        "causal": context.framing.causal,
        "num_latents": coder.num_latents,
        "architecture": architecture_name(type(coder)),
        "expected_l0": coder.expected_l0(),
        "lens": lens_kind,
        "loss": LOSS_NAMES[context.head.kind],
        "window_before": TOKENS_BEFORE,
        "window_after": TOKENS_AFTER,
        "model_revision": metadata.model_revision,
    }


def _open_feature_text(context: EvalContext, config: FeaturesConfig) -> FeatureText:
    """Choose the text: --dataset, else held-out text if it has enough tokens, else training text."""
    wanted = config.features.feature_tokens
    if wanted is None:
        seen = (sae.metadata.tokens_seen for sae in context.loaded.saes.values())
        wanted = min(DEFAULT_FEATURE_TOKENS, *(tokens or DEFAULT_FEATURE_TOKENS for tokens in seen))
    own = None if config.dataset else load_training_config(context)
    if own is None:
        (text, *_), _ = open_eval_texts(context)
        return _build_text(context, text.name, "other", text.description, text.sequences, wanted)
    try:
        training, name = load_training_text(context, own), " + ".join(own.dataset)
    except SaetrainError as error:
        # This command has no --in_sample, because --dataset replaces the training text.
        raise SaetrainError(str(error).replace("--dataset and --in_sample false", "--dataset")) from error
    assert training is not None, "only without --in_sample false"
    known = [tokens for tokens in training.train_tokens if tokens is not None]
    available = sum(known) if len(known) == len(training.train_tokens) else None
    if training.held_out.text_tokens >= min(wanted, available or wanted):
        description = str(training.metadata["held_out"])
        return _build_text(context, name, "held_out", description, training.held_out, wanted)
    wanted = min(wanted, available or wanted)
    source, keep = training.train_source, context.extractor.keep
    return FeatureText(
        name,
        "training",
        f"the first {wanted:,} tokens that the SAE was trained on",
        wanted,
        lambda: limit_tokens(_iterate_training_batches(source), keep, wanted),
    )


def _build_text(
    context: EvalContext, name: str, part: str, description: str, sequences: Sequences, wanted: int
) -> FeatureText:
    order, extractor = sequences.shuffled_order(context.config.scoring.eval_seed), context.extractor

    def open_batches() -> Iterator[ModelBatch]:
        return limit_tokens(sequences.iterate_batches(order, extractor.batch_tokens), extractor.keep, wanted)

    return FeatureText(name, part, description, min(wanted, sequences.text_tokens), open_batches)


def _iterate_training_batches(source: ShardedSource) -> Iterator[ModelBatch]:
    """Yield the training batches in the order of the permutations, epoch after epoch."""
    cursors = [source.start_cursor] * source.n_shards
    for shard in cycle(range(source.n_shards)):
        batches, cursors[shard] = source.read(shard, cursors[shard], 1)
        yield from batches
