"""Resume from a checkpoint: which settings may change, and which would change the result."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NoReturn

from saetrain.activations.cache_files import CacheSettings
from saetrain.activations.model import hash_model_code
from saetrain.config import RunConfig, from_flat, to_flat
from saetrain.data.tokenize import hash_json, tokenizer_identity
from saetrain.distributed import env
from saetrain.errors import SaetrainError
from saetrain.evaluation.evaluator import ScoreSettings
from saetrain.evaluation.health import HealthSettings
from saetrain.features.settings import FeatureSettings
from saetrain.logs.console import log_rank0
from saetrain.optim import LR_DECAY_SHARE
from saetrain.runs.train import gather
from saetrain.runs.train.resolve import Resolved
from saetrain.runs.train.setup import RunContext, resolve_config
from saetrain.training.checkpoint import Checkpoint

MAY_CHANGE_ON_RESUME = frozenset(
    {
        "model",
        "dataset",
        "activations",
        "save_dir",
        "run_name",
        "save_every",
        "resume",
        "overwrite",
        "save_sparsify",
        "eval_every",
        "log_every",
        "log_to_wandb",
        "wandb_log_frequency",
        "wandb_project",
        "log_to_tensorboard",
        "data_preprocessing_num_proc",
        "on_spike",
        "force",
        "dry_run",
        "debug",
        "kernels",
        "compute_dtype",
        "trust_remote_code",
        "finetune",
        "dead_percentage_threshold",
        "assess",
        "report",
        "parallel",
        *(
            item.name
            for settings in (ScoreSettings, HealthSettings, FeatureSettings, CacheSettings)
            for item in dataclasses.fields(settings)
        ),
    }
)
"""Settings that do not affect the weights; model and data set are compared by their content."""
TEXT_SETTINGS = frozenset({"split", "dataset_config", "text_column", "skip_bad_rows"})
"""Settings that select the text; they may change if the whole text is compared by its content."""
MAY_DIFFER_BETWEEN_RANKS = frozenset(
    {"save_dir", "device", "data_preprocessing_num_proc", "resume", "overwrite", "cache_dir", "cache_size"}
)
"""Settings that may differ between processes."""
BATCH_SETTINGS = ("batch_size", "grad_acc_steps")
DERIVED_SETTINGS = ("lr_warmup_steps", "weight_decay", "dead_window_tokens", "model_batch_tokens", "group_tokens")
"""Settings that are derived from others or from the machine if not given; a resumed run keeps its first values."""


def content_hashes(run: RunContext) -> dict[str, Any]:
    """Return hashes of the model's weights, configuration and tokenizer and of the text, whatever their names."""
    return {
        "model_weights_sha256": run.weights_sha256,
        "model_config": hash_model_code(run.model),
        "tokenizer": hash_json(None if run.tokenizer is None else tokenizer_identity(run.tokenizer)),
        "text": run.text_metadata["fingerprint"],
    }


def require_same_run(run: RunContext) -> None:
    """Raise SaetrainError if the processes differ in settings, model or text."""
    settings = {
        f"--{name}": value for name, value in to_flat(run.config).items() if name not in MAY_DIFFER_BETWEEN_RANKS
    }
    found = {"the model's dtype": str(run.model.dtype), "--model_batch_tokens": run.extractor.batch_tokens}
    gather.require_equal_on_ranks({**settings, **found, **content_hashes(run)})


def keep_first_values(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return settings with what the first start of the run derived or chose, unless the user gives other values.

    ``values``: those of the checkpoint. Raises SaetrainError if the run cannot be continued with these processes.
    """
    before: Mapping[str, Any] = values["settings"]
    flat = to_flat(fit_batch(config, values))
    if flat["architecture"] != before["architecture"]:
        # Another architecture has other settings, so nothing else can be compared.
        _refuse_changes([_describe_change("architecture", flat["architecture"], before["architecture"])])
    flat.update({name: before[name] for name in DERIVED_SETTINGS if flat.get(name, "") is None})
    flat.update(_keep_kernels(flat, before))
    if flat["lr"] == "auto" != values["asked_lr"]:
        _refuse_changes([_describe_change("lr", "auto", values["asked_lr"])])
    if flat["max_tokens"] != before["max_tokens"]:
        _require_not_shorter(flat["max_tokens"], before["max_tokens"])
    return dataclasses.replace(from_flat(flat, "checkpoint"), where=config.where)


def require_same_result(run: RunContext, checkpoint: Checkpoint) -> None:
    """Raise SaetrainError if a setting, the model or the text has changed in a way that would change the result."""
    saved_hashes, current_hashes = checkpoint.values["identity"], content_hashes(run)
    _require_same_hash(current_hashes, saved_hashes, "model_weights_sha256", "MODEL: its weights are not those")
    _require_same_hash(current_hashes, saved_hashes, "model_config", "MODEL: its configuration or code is not the one")
    _require_same_hash(current_hashes, saved_hashes, "tokenizer", "MODEL: its tokenizer is not the one")
    before: Mapping[str, Any] = checkpoint.values["settings"]
    flat, was_expanded = to_flat(resolve_config(run)), run.config.sae.num_latents is None
    ignorable = _ignorable_settings(run, flat, before)
    if _sequences_per_step(flat, env.world_size()) == _sequences_per_step(before, checkpoint.values["world_size"]):
        ignorable |= set(BATCH_SETTINGS)
    differing = {
        name
        for name, value in flat.items()
        if name not in MAY_CHANGE_ON_RESUME | ignorable | {"max_tokens"} and value != before.get(name)
    }
    if was_expanded and "expansion_factor" in differing:
        differing.discard("num_latents")
    requested = {**before, "lr": checkpoint.values["asked_lr"]}
    changed = [_describe_change(name, flat[name], requested.get(name)) for name in flat if name in differing]
    if changed and env.world_size() != checkpoint.values["world_size"]:
        changed.append(f"the number of processes is {env.world_size()} now and was {checkpoint.values['world_size']}")
    if changed:
        _refuse_changes(changed)
    # The text is compared after the settings, because some of them decide which texts are trained on.
    _require_same_hash(current_hashes, saved_hashes, "text", "DATASET: its text is not the one")
    placed = Resolved.from_json(checkpoint.values["resolved"]).placement.owners
    if run.resolved.placement.owners != placed:
        log_rank0(
            "the SAEs are placed on other processes than before: sums are rounded differently, so bits will differ"
        )


def _describe_change(name: str, value: Any, before: Any) -> str:
    return f"--{name} is {_format_setting(value)} now and was {_format_setting(before)}"


def _refuse_changes(changed: list[str]) -> NoReturn:
    raise SaetrainError(
        f"--resume: {', '.join(changed)} when the run began, which would change the result; pass the earlier "
        "value, or start another --run_name"
    )


def _format_setting(value: Any) -> str:
    """Return a value as it is written on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _format_divisors(whole: int) -> str:
    """Return the divisors of ``whole`` up to 64, the GPUs of a few nodes, as text."""
    return ", ".join(str(number) for number in range(1, min(whole, 64) + 1) if whole % number == 0)


def _sequences_per_step(settings: Mapping[str, Any], world: int) -> int:
    """Return the number of sequences per optimizer step, over all processes."""
    return world * math.prod(settings[name] for name in BATCH_SETTINGS)


def fit_batch(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """Return settings whose batch keeps the checkpoint's sequences per step on another number of processes.

    Raises SaetrainError if that is impossible. A batch that the user changed is left to :func:`require_same_result`.
    """
    before, saved_n_ranks, n_ranks = values["settings"], values["world_size"], env.world_size()
    flat = to_flat(config)
    requested, last = [[settings[name] for name in BATCH_SETTINGS] for settings in (flat, before)]
    whole = math.prod(last) * saved_n_ranks
    same = math.prod(requested) * n_ranks == whole
    if same or requested not in (last, values["asked_batch"]):
        return config
    if whole % n_ranks:
        raise SaetrainError(
            f"--resume: the run's steps of {whole} sequences ({last[0]} x {last[1]} micro-batches x {saved_n_ranks} "
            f"processes) can't be split evenly over {n_ranks} processes; use one of these numbers of processes: "
            f"{_format_divisors(whole)}"
        )
    # The micro-batch is as large as possible without exceeding the requested one.
    size = max(size for size in range(1, requested[0] + 1) if whole // n_ranks % size == 0)
    steps = whole // n_ranks // size
    log_rank0(
        f"--batch_size {size} --grad_acc_steps {steps} keep the run's steps of {whole} sequences on {n_ranks} "
        f"process{'es' if n_ranks > 1 else ''}"
    )
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=size, grad_acc_steps=steps))


def _keep_kernels(given: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Return the kernels of the first start, because kernels round differently; an explicit choice is used and logged.

    An explicit choice is needed if the run moves to a machine without a compiler.
    """
    out = {name: before[name] if given[name] == "auto" else given[name] for name in ("kernels", "compute_dtype")}
    for name, value in out.items():
        if value != before[name]:
            log_rank0(
                f"--{name} {value} instead of {before[name]}: sums are rounded differently, so the bits will differ"
            )
    return out


def _ignorable_settings(run: RunContext, flat: Mapping[str, Any], before: Mapping[str, Any]) -> frozenset[str]:
    """Return the settings that cannot matter, given everything else that is compared."""
    names = set()
    if flat["num_latents"] is not None and flat["num_latents"] == before["num_latents"]:
        names.add("expansion_factor")
    # Each process has its own device.
    if str(flat["device"]).partition(":")[0] == str(before["device"]).partition(":")[0]:
        names.add("device")
    # Only the commit identifies the Python code of a model on the hub.
    if run.weights_sha256 is not None and not run.config.base.trust_remote_code:
        names.add("revision")
    if run.train_tokens is not None:
        names |= TEXT_SETTINGS
    return frozenset(names)


def _require_same_hash(current: Mapping[str, Any], saved: Mapping[str, Any], name: str, what: str) -> None:
    if current[name] != saved[name]:
        raise SaetrainError(
            f"--resume: {what} that the run began with (hash {str(current[name])[:12]}, was "
            f"{str(saved[name])[:12]}); start another --run_name"
        )


def _require_not_shorter(current: int, saved: int) -> None:
    if current < saved:
        raise SaetrainError(
            f"--resume: --max_tokens {current} is less than the {saved} that the run began with; "
            "pass at least that number"
        )
    log_rank0(
        f"--max_tokens {current:,} instead of {saved:,}: the decay of the learning rate moves to the last "
        f"{LR_DECAY_SHARE:.0%} of the longer run, and --lr auto keeps the rate of the shorter run, so the result "
        "differs from training this long from the start"
    )
