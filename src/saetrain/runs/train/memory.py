"""The memory that a run needs, and the memory that is available."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import psutil
import torch

from saetrain.activations.buffer import MAX_EARLY_POOLS
from saetrain.activations.model import BaseModel
from saetrain.config import RunConfig
from saetrain.distributed import env
from saetrain.errors import SaetrainError
from saetrain.runs.train.plan import SaePlan
from saetrain.runs.train.resolve import build_without_memory, count_parameters
from saetrain.training.placement import FP32_BYTES, Placement

LOGIT_COPIES = 5
"""Copies of the logits that an end-to-end step holds: outputs of both models, their difference, gradients."""
CGROUP_LIMIT_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def count_sae_parameters(plans: Iterable[SaePlan], widths: Mapping[str, int]) -> int:
    """Return the number of parameters of the SAEs; ``widths``: {hookpoint: D}."""
    return sum(
        count_parameters(build_without_memory(plan.config, *plan.site.sum_widths(widths), is_sae=plan.site.is_sae))
        for plan in plans
    )


def required_memory_bytes(
    config: RunConfig,
    model: BaseModel,
    plans: Mapping[str, SaePlan],
    widths: Mapping[str, int],
    ctx_len: int,
    placement: Placement,
) -> int:
    """Return the bytes that a run needs in addition to the program itself.

    They are for the model, the SAEs with gradients, moments and a copy for scoring, the shuffle buffer, and the codes
    of a micro-batch. Data-parallel ranks fill some pools of the buffer early. For the end-to-end losses, the logits of
    a micro-batch take the place of the buffer.
    """
    model_bytes = sum(p.numel() * p.element_size() for p in model.module.parameters())
    own = [plan for name, plan in plans.items() if placement.is_owned_by(name, env.rank())]
    sae_bytes = 5 * FP32_BYTES * count_sae_parameters(own, widths)
    # Each shard's pool holds whole model batches.
    batch_tokens = config.loader.data_shards * config.base.resolve_batch_tokens(model.device)
    buffered = (min(config.buffer.buffer_tokens, config.train.max_tokens) + batch_tokens // 2) // env.world_size()
    buffer_bytes = buffered * sum(widths.values()) * model.dtype.itemsize
    if env.world_size() > 1 and not placement.owners:
        own_shards = max(1, config.loader.data_shards // env.world_size())
        buffer_bytes += buffer_bytes * min(MAX_EARLY_POOLS, own_shards) // own_shards
    if config.train.end_to_end:
        vocabulary = model.module.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        buffer_bytes = LOGIT_COPIES * FP32_BYTES * config.train.batch_size * ctx_len * vocabulary
    widest = max(_count_latents(plans, widths).values())
    rows = config.train.batch_size * ctx_len * (env.world_size() if placement.owners else 1)
    return model_bytes + sae_bytes + buffer_bytes + 3 * FP32_BYTES * rows * widest


def available_memory_bytes(device: torch.device) -> int:
    """Return the bytes that this process can use on ``device``, including what it already holds.

    The processes of a host share its memory.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    free = psutil.virtual_memory().available
    own, here = psutil.Process().memory_info().rss, env.local_world_size()
    for name in CGROUP_LIMIT_FILES:
        limit = Path(name).read_text().strip() if Path(name).exists() else "max"
        if limit.isdigit():
            return min(free // here + own, int(limit) // here)
    return free // here + own


def check_memory(
    config: RunConfig,
    model: BaseModel,
    plans: Mapping[str, SaePlan],
    widths: Mapping[str, int],
    ctx_len: int,
    placement: Placement,
) -> None:
    """Raise SaetrainError if the run needs more memory than is available, unless --force is set."""

    def count_needed(names: Iterable[str]) -> int:
        return required_memory_bytes(config, model, {name: plans[name] for name in names}, widths, ctx_len, placement)

    needed, available = count_needed(plans), available_memory_bytes(model.device)
    if needed <= available or config.force:
        return
    counts = _count_latents(plans, widths)
    latents = ", ".join(f"{count:,}" for count in sorted(set(counts.values())))
    n_sites = len({plan.site.name for plan in plans.values()})
    remedy = (
        f"lower --expansion_factor (now {config.sae.expansion_factor}) or --num_latents, train fewer --layers at once, "
        "lower --buffer_tokens"
    )
    parts = split_to_fit(list(plans), lambda names: count_needed(names) <= available) if env.world_size() == 1 else []
    if len(plans) > 1 and parts:
        shown = "; ".join(f"({number}) {', '.join(names)}" for number, names in enumerate(parts, 1))
        remedy += f", train the SAEs in {len(parts)} runs: {shown}"
    raise SaetrainError(
        f"{len(plans)} SAE{'s' if len(plans) > 1 else ''} of {latents} latents over {n_sites} "
        f"hookpoint{'s' if n_sites > 1 else ''}: need about {format_bytes(needed)} of memory, but only "
        f"{format_bytes(available)} are available on {model.device}; {remedy}, or pass --force to start anyway"
    )


def split_to_fit(names: Sequence[str], fits: Callable[[Sequence[str]], bool]) -> list[list[str]]:
    """Split names, in order, into the fewest parts of which each fits; an empty list if one name alone does not."""
    parts: list[list[str]] = []
    for name in names:
        if not fits([name]):
            return []
        if parts and fits([*parts[-1], name]):
            parts[-1].append(name)
        else:
            parts.append([name])
    return parts


def _count_latents(plans: Mapping[str, SaePlan], widths: Mapping[str, int]) -> dict[str, int]:
    return {name: plan.config.sae.resolve_num_latents(plan.site.sum_widths(widths)[0]) for name, plan in plans.items()}


def format_bytes(count: int) -> str:
    """Return a number of bytes as text, in GiB, MiB or KiB."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1024:.1f} KiB"
