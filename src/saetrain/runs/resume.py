"""Going on from a checkpoint: which settings may have changed since, and which would change the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from saetrain.config import RunConfig, from_flat, to_flat
from saetrain.errors import SaetrainError
from saetrain.logs.console import say
from saetrain.optim import DECAY_SHARE
from saetrain.runs.prepare import Prepared, make_plan, resolved
from saetrain.training.checkpoint import Checkpoint

FREE = frozenset(
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
        "trust_remote_code",
        "finetune",
    }
)
"""Settings that may change: they do not touch the weights (model and data set are compared by their content)."""
DERIVED = ("lr_warmup_steps", "dead_window_tokens")
"""Settings that follow --max_tokens where they are not given; a resumed run keeps the first start's."""


def identity(run: Prepared) -> dict[str, Any]:
    """What the model's weights and the text are, whatever their names."""
    return {"model_weights_sha256": run.weights_sha256, "text": run.data["fingerprint"]}


def reconcile(run: Prepared, checkpoint: Checkpoint) -> Prepared:
    """``run`` with the settings that the checkpoint's run had worked out.

    Raises SaetrainError for a setting, a model or a text that has changed and would change the result.
    """
    _same_identity(identity(run), checkpoint.values["identity"])
    before: Mapping[str, Any] = checkpoint.values["settings"]
    given = to_flat(run.config)
    flat = to_flat(resolved(run))
    if flat["max_tokens"] != before["max_tokens"]:
        _check_longer(flat["max_tokens"], before["max_tokens"])
    # Also where the tokens are the same: an earlier resume may have asked for more of them.
    flat.update({name: before[name] for name in DERIVED if given[name] is None})
    for name, value in flat.items():
        if name in FREE or name == "max_tokens" or value == before.get(name):
            continue
        raise SaetrainError(
            f"--resume: --{name} is {value} now and was {before.get(name)} when the run began, which would change "
            f"the result; give it as it was, or start a run of another --run_name"
        )
    config: RunConfig = dataclasses.replace(from_flat(flat, "checkpoint"), where=run.config.where)
    plan = make_plan(config, run.framing.ctx_len, run.plan.text_tokens)
    return dataclasses.replace(run, config=config, plan=plan)


def _same_identity(now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    for name, what in (("model_weights_sha256", "MODEL: its weights are"), ("text", "DATASET: its text is")):
        if now[name] != before[name]:
            raise SaetrainError(
                f"--resume: {what} not those that the run began with (hash {str(now[name])[:12]}, was "
                f"{str(before[name])[:12]}); start a run of another --run_name"
            )


def _check_longer(now: int, before: int) -> None:
    if now < before:
        raise SaetrainError(
            f"--resume: --max_tokens {now} is less than the {before} that the run began with; "
            "only more can be asked for"
        )
    say(
        f"--max_tokens {now:,} instead of {before:,}: the learning rate's last {DECAY_SHARE:.0%} of decay moves to the "
        "new end, so the result is not that of a run that was this long from the start"
    )
