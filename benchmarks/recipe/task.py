"""One training run: its tool, activations, length and settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Task:
    """A run of a tool; with ``lr`` None it uses its default rate and schedule."""

    tool: str
    site: str
    latents: int
    k: int
    steps: int
    tokens: int
    """Activations per step."""
    seed: int
    lr: float | None = None
    fp32_products: bool = False
    """Matrix products in fp32 instead of bfloat16."""
    options: dict[str, Any] = field(default_factory=dict)
    architecture: str = "topk"

    @property
    def module(self) -> str:
        """Module of this package that runs the tool."""
        return self.tool.split()[0].replace("-", "_")


class Batches:
    """Batches (N, D) in random order, pass after pass; the order depends only on the seed, so all tools share it."""

    def __init__(self, rows_TD: Tensor, task: Task) -> None:
        self._rows, self._tokens, self._steps = rows_TD, task.tokens, task.steps
        self._per_pass = len(rows_TD) // task.tokens
        assert self._per_pass > 0, (len(rows_TD), task.tokens)
        self._seed = task.seed
        self._pass = (-1, torch.empty(0, dtype=torch.long))

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Tensor:
        number, at = divmod(step, self._per_pass)
        if self._pass[0] != number:
            generator = torch.Generator().manual_seed(1000 * self._seed + number)
            self._pass = (number, torch.randperm(len(self._rows), generator=generator))
        return self._rows[self._pass[1][at * self._tokens : (at + 1) * self._tokens]]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[step] for step in range(self._steps))
