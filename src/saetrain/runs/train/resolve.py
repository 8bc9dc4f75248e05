"""What a run computes once from its settings, its model and the machine: step, rates, windows, placement and plan."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from saetrain.activations.model import BaseModel
from saetrain.coders import GroupSettings, SparseCoder
from saetrain.config import RunConfig
from saetrain.distributed import env
from saetrain.errors import SaetrainError
from saetrain.logs.console import log_rank0
from saetrain.optim import resolve_warmup_steps
from saetrain.runs.train.choose_step import choose_kernels, step_request
from saetrain.runs.train.plan import SaePlan
from saetrain.training.placement import Placement, SaeCost, plan_placement
from saetrain.training.steps.base import KernelSettings


@dataclass(frozen=True)
class Resolved:
    """The values that a run computes before its first step, and stores in its checkpoints.

    ``kernels`` {SAE: training step and dtype of its products, without `auto`}; ``lrs`` {SAE: peak learning rate};
    ``dead_windows`` {SAE: tokens without firing after which a latent is dead}.
    """

    kernels: Mapping[str, KernelSettings]
    lrs: Mapping[str, float]
    dead_windows: Mapping[str, int]
    warmup_steps: int
    placement: Placement
    tokens_per_step: int
    """Activations per optimizer step, over all processes."""
    steps: int
    group_tokens: int | None = None
    """Activations per group in which coders select latents; None if all coders select per token."""

    @property
    def n_tokens(self) -> int:
        """Number of activations that the run trains on."""
        return self.steps * self.tokens_per_step

    @property
    def is_data_parallel(self) -> bool:
        """Whether every rank trains every SAE on a part of the tokens."""
        return env.world_size() > 1 and not self.placement.owners

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Resolved:
        """Return what ``dataclasses.asdict`` stored in a checkpoint."""
        kernels = {name: KernelSettings(**each) for name, each in values["kernels"].items()}
        return cls(**{**values, "kernels": kernels, "placement": Placement(**values["placement"])})


def resolve_run(
    config: RunConfig,
    model: BaseModel,
    plans: Mapping[str, SaePlan],
    widths: Mapping[str, int],
    ctx_len: int,
    kept: Resolved | None = None,
) -> Resolved:
    """Resolve the settings of a run; ``widths``: {hookpoint: D}.

    ``kept``: the values of the first start of a run that is resumed, which keeps its rates and windows.
    Raises SaetrainError for settings that are impossible.
    """
    per_step = count_step_tokens(config, ctx_len)
    steps = _count_steps(config, ctx_len, per_step)
    kernels, lrs, windows, costs = {}, {}, {}, {}
    for name, plan in plans.items():
        own, site = plan.config, plan.site
        kernels[name] = _resolve_kernels(plan, model.device, kept.kernels.get(name) if kept else None)
        coder = build_without_memory(own, *site.sum_widths(widths), is_sae=site.is_sae)
        # A setting that is given was kept or refused before, so only what the rules derive is from the first start. A
        # changed setting that makes other SAEs is refused later, by its name.
        known = kept if kept is not None and name in kept.lrs else None
        kept_lr = known.lrs[name] if known and own.optim.lr == "auto" else None
        kept_window = known.dead_windows[name] if known and own.dead.dead_window_tokens is None else None
        lrs[name] = kept_lr or _resolve_lr(own, coder, per_step, steps)
        windows[name] = kept_window or own.dead.resolve_window(
            own.train.max_tokens, coder.num_latents, coder.expected_l0()
        )
        costs[name] = SaeCost(count_parameters(coder), {each: widths[each] for each in site.hookpoints})
    placement = plan_placement(
        config.processes,
        costs,
        world_size=env.world_size(),
        step_tokens=per_step,
        bytes_per_element=model.dtype.itemsize,
        is_spliced=config.train.end_to_end,
    )
    if placement.reason:
        log_rank0(f"{env.world_size()} processes, {placement.reason}")
    warmup = resolve_warmup_steps(config.optim, steps)
    return Resolved(
        kernels, lrs, windows, warmup, placement, per_step, steps, _resolve_group_tokens(plans, ctx_len, kept)
    )


def _resolve_kernels(plan: SaePlan, device: torch.device, kept: KernelSettings | None) -> KernelSettings:
    """Return the kernels of an SAE: those that the flags name, or else those of the first start."""
    given = plan.config.compute
    if kept is not None:
        given = KernelSettings(
            kernels=kept.kernels if given.kernels == "auto" else given.kernels,
            compute_dtype=kept.compute_dtype if given.compute_dtype == "auto" else given.compute_dtype,
        )
    return choose_kernels(given, step_request(plan.config, device, plan.site))


def build_without_memory(config: RunConfig, d_in: int, d_out: int, *, is_sae: bool) -> SparseCoder:
    """Return a coder of the run whose weights have shapes but no memory."""
    with torch.device("meta"):
        return config.coder_class.build(config.sae, d_in, None if is_sae else d_out)


def count_parameters(coder: SparseCoder) -> int:
    """Return the number of weights of a coder."""
    return sum(parameter.numel() for parameter in coder.parameters())


def count_step_tokens(config: RunConfig, ctx_len: int) -> int:
    """Return the number of activations per optimizer step, over all processes."""
    return config.train.batch_size * ctx_len * config.train.grad_acc_steps * env.world_size()


def _resolve_group_tokens(plans: Mapping[str, SaePlan], ctx_len: int, kept: Resolved | None) -> int | None:
    """Return the activations per selection group; SaetrainError if a micro-batch does not hold whole groups."""
    config = next((plan.config for plan in plans.values() if isinstance(plan.config.sae, GroupSettings)), None)
    if config is None:
        return None
    assert isinstance(config.sae, GroupSettings)
    unit = ctx_len * env.world_size()
    micro_tokens = config.train.batch_size * unit
    group_tokens = config.sae.group_tokens or (kept.group_tokens if kept else None) or micro_tokens
    if micro_tokens % group_tokens:
        multiple = math.lcm(group_tokens, unit) // unit
        raise SaetrainError(
            f"{'--resume: ' if kept else ''}--group_tokens {group_tokens}: a micro-batch of {micro_tokens} activations "
            f"(batch_size {config.train.batch_size} x ctx_len {ctx_len} x {env.world_size()} ranks) does not hold "
            f"whole groups; pass a multiple of {multiple} as --batch_size"
            + (", and --grad_acc_steps to keep the optimizer step" if kept else ", or another --group_tokens")
        )
    return group_tokens


def _count_steps(config: RunConfig, ctx_len: int, tokens_per_step: int) -> int:
    """Return the number of optimizer steps; SaetrainError if --max_tokens is less than one step."""
    steps = config.train.max_tokens // tokens_per_step
    if steps < 1:
        raise SaetrainError(
            f"--max_tokens {config.train.max_tokens}: less than one optimizer step, which takes {tokens_per_step} "
            f"tokens (batch_size {config.train.batch_size} x ctx_len {ctx_len} x grad_acc_steps "
            f"{config.train.grad_acc_steps} x {env.world_size()} ranks)"
        )
    return steps


def _resolve_lr(config: RunConfig, coder: SparseCoder, tokens_per_step: int, steps: int) -> float:
    """Return the peak learning rate: the given value, or that of the coder's rule."""
    lr = config.optim.lr
    if lr != "auto":
        return lr
    recommended = coder.recommended_lr(tokens_per_step, steps)
    if recommended is None:
        raise SaetrainError(f"--lr auto: --architecture {config.architecture} has no rule; pass a number")
    return recommended


def fill_in_resolved(config: RunConfig, resolved: Resolved, names: Collection[str]) -> RunConfig:
    """Return settings that name resolved values instead of rules, where one value holds for the SAEs ``names``."""
    optim = dataclasses.replace(
        config.optim, lr_warmup_steps=resolved.warmup_steps, weight_decay=config.optim.effective_weight_decay
    )
    lrs, windows = {resolved.lrs[name] for name in names}, {resolved.dead_windows[name] for name in names}
    kernels, dead = {resolved.kernels[name] for name in names}, config.dead
    if len(lrs) == 1:
        optim = dataclasses.replace(optim, lr=lrs.pop())
    if len(windows) == 1 and dead.dead_feature_threshold is None:
        dead = dataclasses.replace(dead, dead_window_tokens=windows.pop())
    compute = kernels.pop() if len(kernels) == 1 else config.compute
    return dataclasses.replace(config, optim=optim, dead=dead, compute=compute)
