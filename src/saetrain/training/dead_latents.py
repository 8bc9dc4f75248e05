"""Dead latents: firing counters over tokens, exact under gradient accumulation and over ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from saetrain.async_copy import DelayedCopy
from saetrain.errors import SaetrainError
from saetrain.settings import Factor, Settings, Share, Total
from saetrain.types import shown_default

MAX_WINDOW_TOKENS = 10_000_000
"""Largest default of --dead_window_tokens."""
DEFAULT_DEAD_BIAS_LIFT = 4.0
"""Default of --dead_bias_lift."""
WINDOW_RUN_SHARE = 0.01
"""Share of the run's tokens in the default window."""
WINDOW_FIRINGS = 10
"""Expected firings in the shortest default window of a latent with the mean firing rate, k / num_latents."""
UNKNOWN_L0 = 32.0
"""L0 that the shortest window assumes for coders that state none."""
MIN_RATE_TOKENS = 50_000
"""Fewest tokens per block over which firing rates are measured."""


@dataclass(frozen=True, kw_only=True)
class DeadSettings(Settings):
    """Dead latents: the firing rate rule and the window rule."""

    dead_percentage_threshold: Share = 0.0005
    """A latent counts as dead if it fires on less than this share of tokens (0.0005 = 0.05 %)."""
    dead_window_tokens: Annotated[
        Total | None, shown_default("a hundredth of the run, from 10 x num_latents / k to 10000000", "INT")
    ] = None
    """Tokens without firing after which a latent is dead: its encoder bias is raised, and some losses train it."""
    dead_bias_lift: Annotated[Factor | None, shown_default("4; none with sgd, ce and kl", "FLOAT")] = None
    """Each step raises the encoder bias of dead latents by this times the learning rate; 0 disables it."""
    dead_feature_threshold: Annotated[Total | None, shown_default("unset", "INT")] = None
    """Deprecated name of --dead_window_tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dead_window_tokens is not None and self.dead_feature_threshold is not None:
            raise SaetrainError(
                "--dead_window_tokens and --dead_feature_threshold are the same setting: pass only --dead_window_tokens"
            )

    def resolve_window(self, max_tokens: int, num_latents: int, expected_l0: float | None) -> int:
        """Return the number of tokens without firing after which a latent is dead, in a run of ``max_tokens``."""
        given = self.dead_window_tokens or self.dead_feature_threshold
        min_window = math.ceil(WINDOW_FIRINGS * num_latents / (expected_l0 or UNKNOWN_L0))
        return given or min(MAX_WINDOW_TOKENS, max(min_window, int(max_tokens * WINDOW_RUN_SHARE)))


def min_dead_fraction(l0: float, num_latents: int, threshold: float) -> float:
    """Return the share of latents that are dead by the rate rule in any case.

    The firing rates sum to L0, so at most L0 / threshold latents can reach the threshold.
    """
    if threshold <= 0:
        return 0.0
    return max(0.0, 1 - l0 / (threshold * num_latents))


class FiringTracker:
    """Firing counters of F latents.

    A latent fires on a token if its code is not zero. ``since_fired`` (F,) int64 is the number of tokens since each
    latent last fired, in whole optimizer steps. Firing rates are measured over the last one to two blocks of tokens,
    so they depend neither on the logging frequency nor on micro-batches.
    """

    def __init__(self, num_latents: int, window_tokens: int, threshold: float, device: torch.device) -> None:
        self.window_tokens, self.threshold = window_tokens, threshold
        self._tokens_per_block = max(MIN_RATE_TOKENS, math.ceil(20 / threshold) if threshold else 0)
        zeros = torch.zeros(num_latents, dtype=torch.long, device=device)
        self.since_fired = zeros.clone()
        self._step_counts, self._block_counts, self._previous_block_counts = zeros.clone(), zeros.clone(), zeros.clone()
        self._step_tokens = self._block_tokens = 0
        # Tokens of the current and the previous block. The host's count of the current block includes skipped steps.
        self._counted_tokens = torch.zeros(2, dtype=torch.long, device=device)

    def count_micro_batch(self, fired: Tensor, tokens: int) -> None:
        """Add a micro-batch of ``tokens`` tokens; ``fired`` (F,) int64 is the number on which each latent fired."""
        self._step_counts += fired
        self._step_tokens += tokens

    def finish_step(self, ok: Tensor | None = None) -> None:
        """Add the counts of the optimizer step to the counters.

        If ``ok``, a bool on the device, is false, the step was skipped and changes no counter.
        """
        since = (self.since_fired + self._step_tokens).masked_fill_(self._step_counts > 0, 0)
        if ok is not None:
            since = torch.where(ok, since, self.since_fired)
            self._step_counts *= ok
        self.since_fired.copy_(since)
        if self._block_tokens >= self._tokens_per_block:
            self._previous_block_counts = self._block_counts.clone()
            self._block_counts.zero_()
            self._counted_tokens = self._counted_tokens.roll(1)
            self._counted_tokens[0] = 0
            self._block_tokens = 0
        self._block_counts += self._step_counts
        self._counted_tokens[0] += self._step_tokens if ok is None else self._step_tokens * ok
        self._block_tokens += self._step_tokens
        self.discard_step()

    def discard_step(self) -> None:
        """Discard the counts of the current step."""
        self._step_counts.zero_()
        self._step_tokens = 0

    def dead_mask(self) -> Tensor:
        """Return the latents that have not fired within the window, (F,) bool."""
        return self.since_fired >= self.window_tokens

    def dead_mask_or_none(self) -> Tensor | None:
        """Return :meth:`dead_mask`, or None if no latent is dead; synchronizes with the device."""
        mask = self.dead_mask()
        return mask if bool(mask.any()) else None

    def firing_rates(self) -> tuple[Tensor, int]:
        """Return (share of tokens on which each latent fired (F,), number of tokens measured)."""
        tokens = int(self._counted_tokens.sum())
        return (self._block_counts + self._previous_block_counts) / max(tokens, 1), tokens

    def compute_metrics(self) -> dict[str, float]:
        """Return the share of dead latents by both rules, each with the number of tokens measured."""
        rates, tokens = self.firing_rates()
        return {
            "dead_below_threshold": int((rates < self.threshold).sum()) / len(rates),
            "dead_below_threshold_tokens": tokens,
            "dead_not_fired": int(self.dead_mask().sum()) / len(rates),
            "dead_not_fired_tokens": self.window_tokens,
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Return the counters as tensors; call it between two steps."""
        return {
            "since_fired": self.since_fired,
            "current": self._block_counts,
            "previous": self._previous_block_counts,
            "tokens": torch.tensor([*self._counted_tokens.tolist(), self._block_tokens]),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load the result of :meth:`state_dict`."""
        self.since_fired.copy_(state["since_fired"])
        self._block_counts.copy_(state["current"])
        self._previous_block_counts.copy_(state["previous"])
        # Older checkpoints have no separate count of the host.
        current, previous, *block = state["tokens"].tolist()
        self._counted_tokens.copy_(torch.tensor([current, previous]))
        (self._block_tokens,) = block or (current,)


class DeadCountBound:
    """Upper bound of the number of dead latents, known to the host without waiting for the device.

    A latent that is dead ``lag_steps`` steps later has already not fired for the window minus the tokens of those
    steps. The number of such latents is copied to the host asynchronously while the steps run.
    """

    def __init__(self, firing: FiringTracker, lag_steps: int) -> None:
        self._firing, self._lag_steps, self._pending_counts = firing, lag_steps, DelayedCopy(lag_steps)
        self._max_dead: int | None = None

    def _count_candidates(self, tokens: int) -> Tensor:
        return (self._firing.since_fired >= self._firing.window_tokens - self._lag_steps * tokens).sum().unsqueeze(0)

    def max_dead_count(self, tokens: int) -> int:
        """Return the bound for the next step; all steps have ``tokens`` tokens. The first call synchronizes."""
        if self._max_dead is None:
            self._max_dead = int(self._count_candidates(tokens))
        return self._max_dead

    def update_after_step(self, tokens: int) -> None:
        """Start the count after a step of ``tokens`` tokens, and read the counts that are ready."""
        self._push_count(self._count_candidates(tokens))
        for _, (count,) in self._pending_counts.pop_ready():
            self._max_dead = int(count)

    def state_dict(self) -> Tensor:
        """Return the bound and the pending counts, so that a resumed run uses the same sizes and is bit-identical."""
        pending = [count for _, (count,) in self._pending_counts.pop_all()]
        for count in pending:
            self._push_count(torch.tensor([count]))
        return torch.tensor([-1 if self._max_dead is None else self._max_dead, *pending], dtype=torch.long)

    def load_state_dict(self, state: Tensor) -> None:
        """Load the result of :meth:`state_dict`."""
        max_dead, *pending = state.tolist()
        self._max_dead = None if max_dead < 0 else max_dead
        self._pending_counts.pop_all()
        for count in pending:
            self._push_count(torch.tensor([count]))

    def _push_count(self, count: Tensor) -> None:
        # The order in the queue identifies the step, so the step number is unused.
        self._pending_counts.put(0, count)
