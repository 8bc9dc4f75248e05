"""The values in a checkpoint's ``state.json``, with their types; a checkpoint without them is damaged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from saetrain.runs.train.resolve import Resolved
from saetrain.training.trainer import EndedSae


@dataclass(frozen=True)
class SavedSettings:
    """The settings of the last start that are read before the settings are compared by name."""

    batch_size: int
    grad_acc_steps: int
    max_tokens: int
    data_shards: int
    lr_warmup_steps: int | None
    weight_decay: float | None
    dead_window_tokens: int | None
    model_batch_tokens: int | None
    kernels: str
    compute_dtype: str
    num_latents: int | None
    device: str


@dataclass(frozen=True)
class ContentHashes:
    """Hashes of the model and the text, see :func:`saetrain.runs.train.resume.content_hashes`."""

    model_weights_sha256: str | None
    model_config: Any
    tokenizer: str
    text: str | list[str]


@dataclass(frozen=True)
class NormalizerConstants:
    """The constants of a normalizer that are no tensors."""

    scale: float
    variance: float


@dataclass(frozen=True)
class CheckpointState:
    """What :class:`saetrain.runs.train.checkpointing.Checkpointing` writes; raises ValueError for contradictions."""

    step: int
    files: dict[str, str]
    settings: SavedSettings
    identity: ContentHashes
    normalizers: dict[str, NormalizerConstants]
    norm_limits: dict[str, float]
    resolved: Resolved
    losses: dict[str, list[float]]
    ended: dict[str, EndedSae]
    buffer: dict[str, list[int]]
    logs: dict[str, str]
    world_size: int
    asked_batch: tuple[int, int]
    asked_lr: float | Literal["auto"]

    def __post_init__(self) -> None:
        if self.step > self.resolved.steps:
            raise ValueError(f"step {self.step} is above the {self.resolved.steps} steps of the run")
        counts = (self.world_size, self.settings.batch_size, self.settings.grad_acc_steps, *self.asked_batch)
        if min(counts) < 1:
            raise ValueError("a batch or the number of processes is below 1")
        if self.files.keys() != {*self.losses, *(f"normalizer:{name}" for name in self.normalizers)}:
            raise ValueError("files, losses and normalizers are not of the same SAEs")
        if not self.ended.keys() <= self.losses.keys():
            raise ValueError("an SAE has ended that is not of this run")
        if self.buffer.keys() != {str(shard) for shard in range(self.settings.data_shards)}:
            raise ValueError(f"buffer does not have the {self.settings.data_shards} shards")
        if any(min(row, default=-1) < 0 for row in self.buffer.values()):
            raise ValueError("buffer has a shard without a position")
