"""Collectives between ranks, under their MPI names; with one rank, each returns its own value.

Values are small (integers, JSON) and go through gloo; large tensors use the tensor group (NCCL on GPUs).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from saetrain.distributed.env import local_rank, rank, world_size
from saetrain.distributed.process_group import current_group, phase, track_wait


def barrier(phase_name: str) -> None:
    """Wait until every rank has reached this call."""
    all_reduce_max([0], phase_name)


class AsyncAllReduce:
    """All-reduce of integers that runs while other work continues; ``op`` is the maximum by default."""

    def __init__(
        self, values: list[int], phase_name: str = "agreeing on the next step", op: Any = dist.ReduceOp.MAX
    ) -> None:
        group = current_group()
        self._reduced, self._phase_name = torch.tensor(values, dtype=torch.long), phase_name
        self._work: Any = None
        if group is not None:
            with phase(phase_name), track_wait(group):
                self._work = dist.all_reduce(self._reduced, op=op, group=group.control_group, async_op=True)
            group.comm_stats.n_control_collectives += 1

    def wait(self) -> list[int]:
        """Block until every rank has contributed, then return the reduced values."""
        group = current_group()
        if group is not None:
            with phase(self._phase_name), track_wait(group):
                self._work.wait()
        return [int(number) for number in self._reduced]


def all_reduce_max(values: list[int], phase_name: str) -> list[int]:
    """Return the maximum of each value over the ranks."""
    return AsyncAllReduce(values, phase_name).wait()


def all_reduce_sum(values: list[int], phase_name: str) -> list[int]:
    """Return the sum of each value over the ranks."""
    return AsyncAllReduce(values, phase_name, dist.ReduceOp.SUM).wait()


def all_reduce_tensor_(tensor: Tensor, phase_name: str) -> None:
    """Replace a contiguous ``tensor`` by its sum over the ranks."""
    group = current_group()
    if group is None:
        return
    with phase(phase_name), track_wait(group):
        dist.all_reduce(tensor, group=group.tensor_group)
    group.comm_stats.n_tensor_collectives += 1
    group.comm_stats.n_bytes += tensor.nbytes


def all_gather_json(value: Any, phase_name: str) -> list[Any]:
    """Return the ``value`` (JSON) of every rank, ordered by rank."""
    group = current_group()
    if group is None:
        return [value]
    own_bytes = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    (max_length,) = all_reduce_max([len(own_bytes)], phase_name)
    padded = torch.full((max_length,), ord(" "), dtype=torch.uint8)
    padded[: len(own_bytes)] = own_bytes
    rows = [torch.empty_like(padded) for _ in range(world_size())]
    with phase(phase_name), track_wait(group):
        dist.all_gather(rows, padded, group=group.control_group)
    group.comm_stats.n_control_collectives += 1
    return [json.loads(bytes(row.tolist())) for row in rows]


def broadcast_from_rank0(value: Any, phase_name: str) -> Any:
    """Return rank 0's ``value`` (JSON) on every rank."""
    return all_gather_json(value if rank() == 0 else None, phase_name)[0]


def local_rank0_first(phase_name: str, func: Callable[[], Any]) -> Any:
    """Call ``func`` on one process per host first, so that the other processes find its files in the cache."""
    if local_rank() == 0:
        with phase(phase_name, is_loading=True):
            out = func()
    barrier(f"waiting for local rank 0: {phase_name}")
    if local_rank() != 0:
        with phase(phase_name, is_loading=True):
            out = func()
    return out


def run_on_rank0(phase_name: str, func: Callable[[], Any]) -> Any:
    """Call ``func`` on rank 0 while the other ranks wait, and return its result (JSON) on every rank."""
    out = None
    if rank() == 0:
        with phase(phase_name):
            out = func()
    return broadcast_from_rank0(out, f"waiting for rank 0: {phase_name}")


def all_to_all_by_owner(
    parts: Mapping[str, Tensor], owners: Mapping[str, int], rows_per_rank: list[int]
) -> dict[str, Tensor]:
    """Send the rows of each name to the rank that owns the name.

    ``parts`` are this rank's {name: (n, D)}, ``owners`` are {name: rank}, and ``rows_per_rank`` is the n of each
    rank, which is the same for all names. Return {name: (sum of n, D)} of the names that this rank owns, with the rows
    ordered by rank.
    """
    group = current_group()
    if group is None:
        return dict(parts)
    dtype = next(iter(parts.values())).dtype
    names_by_rank = [[name for name in parts if owners[name] == number] for number in range(world_size())]
    own_names = names_by_rank[rank()]
    row_bytes = {name: part.shape[1] * part.element_size() for name, part in parts.items()}
    flat = [parts[name].contiguous().view(torch.uint8).reshape(-1) for names in names_by_rank for name in names]
    sent = torch.cat(flat)
    send_bytes = [rows_per_rank[rank()] * sum(row_bytes[name] for name in names) for names in names_by_rank]
    receive_bytes = [count * sum(row_bytes[name] for name in own_names) for count in rows_per_rank]
    received = sent.new_empty(sum(receive_bytes))
    with phase("exchanging activations"), track_wait(group):
        dist.all_to_all_single(received, sent, receive_bytes, send_bytes, group=group.tensor_group)
    group.comm_stats.n_tensor_collectives += 1
    group.comm_stats.n_bytes += sum(send_bytes) - send_bytes[rank()]
    out: dict[str, list[Tensor]] = {name: [] for name in own_names}
    for block, count in zip(received.split(receive_bytes), rows_per_rank, strict=True):
        pieces = block.split([count * row_bytes[name] for name in own_names])
        for name, piece in zip(own_names, pieces, strict=True):
            out[name].append(piece.view(dtype).view(count, -1))
    return {name: torch.cat(pieces) for name, pieces in out.items()}


def gather_tensors_to_rank0(
    source_rank: int, tensors: Mapping[str, Tensor], phase_name: str
) -> dict[str, Tensor] | None:
    """Send the named tensors of ``source_rank`` to rank 0, through host memory; return None on the other ranks."""
    group = current_group()
    if group is None or source_rank == 0:
        return dict(tensors) if rank() == 0 else None
    shapes = all_gather_json(_shapes_and_dtypes(tensors) if rank() == source_rank else None, phase_name)[source_rank]
    out: dict[str, Tensor] = {}
    with phase(phase_name), track_wait(group):
        for key, (shape, dtype) in shapes.items():
            if rank() == source_rank:
                dist.send(tensors[key].detach().cpu().contiguous(), 0, group=group.control_group)
            elif rank() == 0:
                out[key] = torch.empty(shape, dtype=getattr(torch, dtype))
                dist.recv(out[key], source_rank, group=group.control_group)
    return out if rank() == 0 else None


def broadcast_tensors(tensors: Mapping[str, Tensor] | None, phase_name: str) -> dict[str, Tensor]:
    """Return rank 0's named tensors on every rank, in host memory."""
    group = current_group()
    if group is None:
        return dict(tensors or {})
    shapes = broadcast_from_rank0(_shapes_and_dtypes(tensors or {}), phase_name)
    out: dict[str, Tensor] = {}
    with phase(phase_name), track_wait(group):
        for key, (shape, dtype) in shapes.items():
            own = tensors[key].detach().cpu().contiguous() if tensors is not None and rank() == 0 else None
            out[key] = own if own is not None else torch.empty(shape, dtype=getattr(torch, dtype))
            dist.broadcast(out[key], 0, group=group.control_group)
    return out


def _shapes_and_dtypes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[list[int], str]]:
    return {key: (list(value.shape), str(value.dtype).removeprefix("torch.")) for key, value in tensors.items()}
