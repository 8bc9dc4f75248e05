"""Gradient all-reduce that overlaps with computation, like the reducer of DDP (Li et al. 2020, arXiv 2006.15704)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from saetrain.distributed.process_group import current_group, phase, track_wait

BUCKET_BYTES = 4 << 20
"""Tensors below this size are packed into one all-reduce; larger tensors are reduced in place."""


class GradientBuckets:
    """Sum tensors over the ranks in place while other work continues.

    Every rank must add the same tensors in the same order.
    """

    def __init__(self) -> None:
        self._works: list[Any] = []
        self._open_buckets: dict[torch.dtype, list[Tensor]] = {}
        self._flat_buckets: list[tuple[Tensor, list[Tensor]]] = []

    def add(self, tensors: list[Tensor]) -> None:
        """Start to sum contiguous tensors, which must not be used until :meth:`wait` returns."""
        group = current_group()
        if group is None:
            return
        for tensor in tensors:
            assert tensor.is_contiguous(), tensor.stride()
            if tensor.nbytes >= BUCKET_BYTES:
                self._start_all_reduce(tensor)
                continue
            bucket = self._open_buckets.setdefault(tensor.dtype, [])
            bucket.append(tensor)
            if sum(each.nbytes for each in bucket) >= BUCKET_BYTES:
                self._reduce_bucket(tensor.dtype)

    def _reduce_bucket(self, dtype: torch.dtype) -> None:
        tensors = self._open_buckets.pop(dtype)
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self._flat_buckets.append((flat, tensors))
        self._start_all_reduce(flat)

    def _start_all_reduce(self, tensor: Tensor) -> None:
        group = current_group()
        assert group is not None
        with track_wait(group):
            self._works.append(dist.all_reduce(tensor, group=group.tensor_group, async_op=True))
        group.comm_stats.n_tensor_collectives += 1
        group.comm_stats.n_bytes += tensor.nbytes

    def flush(self) -> None:
        """Start the all-reduce of partly filled buckets, after the last :meth:`add` of a step."""
        for dtype in list(self._open_buckets):
            self._reduce_bucket(dtype)

    def wait(self, phase_name: str = "reducing gradients") -> None:
        """Block until the added tensors contain their sums over the ranks."""
        group = current_group()
        if group is None:
            return
        self.flush()
        with phase(phase_name), track_wait(group):
            for work in self._works:
                work.wait()
        for flat, tensors in self._flat_buckets:
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))
