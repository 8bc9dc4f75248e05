"""Memory of one micro-batch in the native training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from saetrain.ops.native import bindings as native
from saetrain.ops.native.group_search import GroupSearch
from saetrain.ops.native.threshold_search import ThresholdSearch


@dataclass(frozen=True)
class WorkspaceShape:
    """Sizes of a workspace; ``level_stops``: latents below which each level decodes, of which the last is F.

    ``k``: active latents per token, on average if ``n_groups`` is not 0 or if there are thresholds. ``wanted`` latents
    are active in each of ``n_groups`` groups of tokens.
    """

    tokens: int
    width: int
    level_stops: tuple[int, ...]
    k: int
    n_groups: int
    wanted: int
    use_bf16: bool
    use_dense: bool
    has_thresholds: bool

    @property
    def latents(self) -> int:
        """Number of latents."""
        return self.level_stops[-1]

    @property
    def levels(self) -> int:
        """Number of nested reconstructions."""
        return len(self.level_stops)


class Workspace:
    """Memory of one micro-batch of N tokens with P pairs; SAEs of the same shape share it."""

    def __init__(self, shape: WorkspaceShape) -> None:
        dtype = torch.bfloat16 if shape.use_bf16 else torch.float32
        tokens, width, latents, levels = shape.tokens, shape.width, shape.latents, shape.levels
        self.owner: Callable[[], object] = lambda: None
        rows = max(64, native.CHUNK_BYTES // (latents * dtype.itemsize))
        self.pre = torch.empty(min(rows, tokens), latents, dtype=dtype)
        self.dense = native.DenseWorkspace(latents, tokens, width, self.pre) if shape.use_dense else None
        self.group_search = GroupSearch(tokens, latents, shape.n_groups, shape.wanted) if shape.n_groups else None
        self.threshold_search = ThresholdSearch(tokens, shape.k) if shape.has_thresholds else None
        pairs = self.group_search.max_pairs if self.group_search else tokens * shape.k
        codes = self.group_search or self.threshold_search or _FixedCodes(tokens, shape.k)
        self.tensors: dict[str, Tensor | None] = {
            "x_enc": torch.empty(tokens, width, dtype=dtype),
            "x_norms": torch.empty(tokens),
            "values": codes.values,
            "indices": codes.indices,
            "offsets": codes.offsets,
            "level_stops": torch.tensor(shape.level_stops),
            "residual": torch.empty(levels, tokens, width),
            "residual_copy": torch.empty(levels, tokens, width, dtype=dtype) if shape.use_bf16 else None,
            "residual_norms": torch.empty(levels, tokens),
            "residual_sum": torch.empty(levels, width, dtype=torch.double),
            "residual_square": torch.empty(levels, dtype=torch.double),
            "starts": torch.empty(latents + 1, dtype=torch.long),
            **_build_pairs(pairs),
        }
        if self.threshold_search is not None:
            self.tensors |= {"active_stops": self.threshold_search.active_stops, "l0_grad": torch.empty(tokens)}

    def fit_pairs(self) -> dict[str, Tensor]:
        """Make room for the pairs that the search for thresholds has found; return all tensors of pairs."""
        assert self.threshold_search is not None
        codes = {"values": self.threshold_search.values, "indices": self.threshold_search.indices}
        size = len(codes["values"])
        pairs = {name: self[name] for name in PAIR_DTYPES} if size == len(self["grad_pre"]) else _build_pairs(size)
        self.tensors |= codes | pairs
        return codes | pairs

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        assert tensor is not None, name
        return tensor


PAIR_DTYPES = {
    "grad_pre": torch.float,
    "pair_token": torch.int32,
    "pair_value": torch.float,
    "pair_grad_pre": torch.float,
}
"""Names of the results of each pair -> dtype."""


def _build_pairs(size: int) -> dict[str, Tensor]:
    return {name: torch.empty(size, dtype=dtype) for name, dtype in PAIR_DTYPES.items()}


class _FixedCodes:
    """Codes with k pairs per token."""

    def __init__(self, tokens: int, k: int) -> None:
        self.values, self.indices = torch.empty(tokens, k), torch.empty(tokens, k, dtype=torch.int32)
        self.offsets = torch.arange(0, tokens * k + 1, k)


_workspaces: WeakValueDictionary[WorkspaceShape, Workspace] = WeakValueDictionary()


def get_workspace(shape: WorkspaceShape) -> Workspace:
    """Return the workspace of this shape, which all steps share that hold it."""
    found = _workspaces.get(shape)
    if found is None:
        found = _workspaces[shape] = Workspace(shape)
    return found
