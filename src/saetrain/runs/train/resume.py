"""Going on from a checkpoint: which settings may have changed since, and which would change the result."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from saetrain.activations.model import hash_model_code
from saetrain.config import RunConfig, from_flat, to_flat
from saetrain.data.tokenize import hash_json, tokenizer_identity
from saetrain.distributed import env
from saetrain.errors import SaetrainError
from saetrain.evaluation.health import HealthSettings
from saetrain.evaluation.score import ScoreSettings
from saetrain.logs.console import log_rank0
from saetrain.optim import LR_DECAY_SHARE
from saetrain.runs.train import gather
from saetrain.runs.train.setup import RunContext, build_batch_plan, resolve_config
from saetrain.training.checkpoint import Checkpoint

MAY_CHANGE_ON_RESUME = frozenset(
    {
        "model",
        "dataset",
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
        "parallel",
        *(item.name for item in (*dataclasses.fields(ScoreSettings), *dataclasses.fields(HealthSettings))),
    }
)
"""Settings that may change: they do not touch the weights (model and data set are compared by their content)."""
TEXT_SETTINGS = frozenset({"split", "dataset_config", "text_column", "skip_bad_rows"})
"""Settings that say which text it is: a text that is compared whole is told by its content."""
MAY_DIFFER_BETWEEN_RANKS = frozenset({"save_dir", "device", "data_preprocessing_num_proc", "resume", "overwrite"})
"""Settings that may differ between processes."""
BATCH_SETTINGS = ("batch_size", "grad_acc_steps")
DERIVED_SETTINGS = ("lr_warmup_steps", "weight_decay", "dead_window_tokens", "model_batch_tokens")
"""Settings that follow others, or the machine, where they are not given; a resumed run keeps the first start's."""


def content_hashes(run: RunContext) -> dict[str, Any]:
    """What the model's weights and the text are, whatever their names."""
    return {
        "model_weights_sha256": run.weights_sha256,
        "model_config": hash_model_code(run.model),
        "tokenizer": hash_json(tokenizer_identity(run.tokenizer)),
        "text": run.text_metadata["fingerprint"],
    }


def require_same_run(run: RunContext) -> None:
    """SaetrainError when the processes do not agree on what they are about to train on."""
    settings = {
        f"--{name}": value for name, value in to_flat(run.config).items() if name not in MAY_DIFFER_BETWEEN_RANKS
    }
    found = {"the model's dtype": str(run.model.dtype), "--model_batch_tokens": run.extractor.batch_tokens}
    gather.require_equal_on_ranks({**settings, **found, **content_hashes(run)})


def reconcile_with_checkpoint(run: RunContext, checkpoint: Checkpoint) -> RunContext:
    """``run`` with the settings that the checkpoint's run had worked out.

    Raises SaetrainError for a setting, a model or a text that has changed and would change the result.
    """
    saved_hashes, current_hashes = checkpoint.values["identity"], content_hashes(run)
    _require_same_hash(current_hashes, saved_hashes, "model_weights_sha256", "MODEL: its weights are not those")
    _require_same_hash(current_hashes, saved_hashes, "model_config", "MODEL: its configuration or code is not the one")
    _require_same_hash(current_hashes, saved_hashes, "tokenizer", "MODEL: its tokenizer is not the one")
    before: Mapping[str, Any] = checkpoint.values["settings"]
    given = to_flat(run.config)
    flat = to_flat(resolve_config(run))
    if flat["max_tokens"] != before["max_tokens"]:
        _require_not_shorter(flat["max_tokens"], before["max_tokens"])
    # Also where the tokens are the same: an earlier resume may have asked for more of them.
    flat.update({name: before[name] for name in DERIVED_SETTINGS if given[name] is None})
    if given["lr"] == checkpoint.values["asked_lr"] == "auto":
        flat["lr"] = before["lr"]
    flat.update(_resolve_kernels(given, before))
    ignorable = _ignorable_settings(run, flat, before)
    if _sequences_per_step(flat, env.world_size()) == _sequences_per_step(before, checkpoint.values["world_size"]):
        ignorable |= set(BATCH_SETTINGS)
    changed = [
        f"--{name} is {value} now and was {before.get(name)}"
        for name, value in flat.items()
        if name not in MAY_CHANGE_ON_RESUME | ignorable | {"max_tokens"} and value != before.get(name)
    ]
    if changed and env.world_size() != checkpoint.values["world_size"]:
        changed.append(f"the number of processes is {env.world_size()} now and was {checkpoint.values['world_size']}")
    if changed:
        raise SaetrainError(
            f"--resume: {', '.join(changed)} when the run began, which would change the result; give it as it was, or "
            "start a run of another --run_name"
        )
    # Behind the settings, for some of them decide which texts are trained on.
    _require_same_hash(current_hashes, saved_hashes, "text", "DATASET: its text is not the one")
    config: RunConfig = dataclasses.replace(from_flat(flat, "checkpoint"), where=run.config.where)
    plan = build_batch_plan(config, run.framing.ctx_len, run.plan.text_tokens)
    run.extractor.batch_tokens = config.base.resolve_batch_tokens(run.model.device)
    return dataclasses.replace(run, config=config, plan=plan)


def _format_divisors(whole: int) -> str:
    """The numbers that divide ``whole``, up to a node or a few of GPUs."""
    return ", ".join(str(number) for number in range(1, min(whole, 64) + 1) if whole % number == 0)


def _sequences_per_step(settings: Mapping[str, Any], world: int) -> int:
    """Sequences of an optimizer step."""
    return world * math.prod(settings[name] for name in BATCH_SETTINGS)


def fit_batch(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The settings with a batch that keeps the steps of a checkpoint's run on another number of processes.

    Raises SaetrainError where they can't be kept; a batch of the user's own is left to :func:`reconcile`.
    """
    before, saved_n_ranks, n_ranks = values["settings"], values["world_size"], env.world_size()
    flat = to_flat(config)
    asked, last = [[settings[name] for name in BATCH_SETTINGS] for settings in (flat, before)]
    whole = math.prod(last) * saved_n_ranks
    same = math.prod(asked) * n_ranks == whole
    if same or asked not in (last, values["asked_batch"]):
        return config
    if whole % n_ranks:
        raise SaetrainError(
            f"--resume: the run's steps of {whole} sequences ({last[0]} x {last[1]} micro-steps x {saved_n_ranks} processes) "
            f"can't be dealt evenly to {n_ranks} processes; start one of {_format_divisors(whole)} processes"
        )
    # The largest micro-batch that is no larger than what was asked for.
    size = max(size for size in range(1, asked[0] + 1) if whole // n_ranks % size == 0)
    steps = whole // n_ranks // size
    log_rank0(
        f"--batch_size {size} --grad_acc_steps {steps} keep the run's steps of {whole} sequences on {n_ranks} "
        f"process{'es' if n_ranks > 1 else ''}"
    )
    return dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=size, grad_acc_steps=steps))


def _resolve_kernels(given: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The first start's choice holds, for kernels round differently; an explicit one is taken, and that is said.

    A machine that the run moves to may have no compiler.
    """
    out = {name: before[name] if given[name] == "auto" else given[name] for name in ("kernels", "compute_dtype")}
    for name, value in out.items():
        if value != before[name]:
            log_rank0(
                f"--{name} {value} instead of {before[name]}: sums are rounded otherwise, so the bits will differ"
            )
    return out


def _ignorable_settings(run: RunContext, flat: Mapping[str, Any], before: Mapping[str, Any]) -> frozenset[str]:
    """Settings that can't matter beside what else is compared."""
    names = set()
    if flat["num_latents"] is not None and flat["num_latents"] == before["num_latents"]:
        names.add("expansion_factor")
    # Each process has a device of its own.
    if str(flat["device"]).partition(":")[0] == str(before["device"]).partition(":")[0]:
        names.add("device")
    # A hub model's own code is told by its commit alone.
    if run.weights_sha256 is not None and not run.config.base.trust_remote_code:
        names.add("revision")
    if run.plan.train_tokens is not None:
        names |= TEXT_SETTINGS
    return frozenset(names)


def _require_same_hash(current: Mapping[str, Any], saved: Mapping[str, Any], name: str, what: str) -> None:
    if current[name] != saved[name]:
        raise SaetrainError(
            f"--resume: {what} that the run began with (hash {str(current[name])[:12]}, was "
            f"{str(saved[name])[:12]}); start a run of another --run_name"
        )


def _require_not_shorter(current: int, saved: int) -> None:
    if current < saved:
        raise SaetrainError(
            f"--resume: --max_tokens {current} is less than the {saved} that the run began with; "
            "only more can be asked for"
        )
    log_rank0(
        f"--max_tokens {current:,} instead of {saved:,}: the decay of the learning rate moves to the last "
        f"{LR_DECAY_SHARE:.0%} of the longer run, and a rate of --lr auto stays that of the shorter, so the result is not "
        "that of a run that was this long from the start"
    )
