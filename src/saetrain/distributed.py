"""All communication between ranks; with one rank, every function is a no-op.

Two groups: one of gloo for numbers and texts between the hosts' memories, and one for tensors on the SAEs' device (NCCL
on GPUs). Their collectives have no short timeout: :mod:`saetrain.watch` finds a rank that is gone.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from saetrain import launch
from saetrain.errors import SaetrainError
from saetrain.launch import local_rank, rank, world_size
from saetrain.meeting import connect_store, rendezvous
from saetrain.watch import Heartbeat

STORE_TIMEOUT_S = 10
RENDEZVOUS_TIMEOUT_MINUTES = 10
"""Minutes that the processes get to find one another."""
COLLECTIVE_TIMEOUT_DAYS = 30
SIGTERM_GRACE_S = 3.0
"""Seconds in which a process that is told to end looks for another's failure, which torchrun answers so."""
BUCKET_BYTES = 4 << 20
"""Smaller tensors travel together, larger ones as they lie."""


@dataclass
class CommStats:
    """What this rank has exchanged: tensor collectives, their bytes (of this rank's tensors), and seconds waited."""

    n_tensor_collectives: int = 0
    n_bytes: int = 0
    n_control_collectives: int = 0
    waited_s: float = 0.0


@dataclass
class _ProcessGroup:
    heartbeat: Heartbeat
    control_group: Any
    tensor_group: Any
    is_restart: bool = False
    comm_stats: CommStats = field(default_factory=CommStats)


_group: _ProcessGroup | None = None


def init_process_group() -> None:
    """Meet the other processes and begin to watch them; SaetrainError when they can't be met."""
    global _group
    if world_size() == 1 or _group is not None:
        return
    launch.require_rendezvous_env()
    try:
        store, launch_id, is_restart = rendezvous(RENDEZVOUS_TIMEOUT_MINUTES)
        timeout = datetime.timedelta(minutes=RENDEZVOUS_TIMEOUT_MINUTES)
        prefix_store = dist.PrefixStore(launch_id, store)
        dist.init_process_group("gloo", store=prefix_store, rank=rank(), world_size=world_size(), timeout=timeout)
        # The watch has its own connection, for another thread may wait in the first.
        heartbeat_store = connect_store(STORE_TIMEOUT_S, is_master=False)
    except (RuntimeError, ValueError, OSError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise SaetrainError(
            f"rank {rank()} could not meet the other {world_size() - 1} processes at {address}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    heartbeat = Heartbeat(dist.PrefixStore(f"{launch_id}/watch", heartbeat_store), rank(), world_size())
    control_group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=COLLECTIVE_TIMEOUT_DAYS))
    _group = _ProcessGroup(heartbeat, control_group, control_group)
    _group.is_restart = all_reduce_max([is_restart], "meeting")[0] > 0
    heartbeat.start()
    signal.signal(signal.SIGTERM, _handle_sigterm)


def _handle_sigterm(signum: int, frame: Any) -> None:
    """Ends the process as the signal would, once it is known whether another rank's failure is behind it."""
    failure = _group.heartbeat.wait_for_failure(SIGTERM_GRACE_S, SIGTERM_GRACE_S) if _group is not None else None
    if failure is not None:
        raise failure
    raise SystemExit(128 + signum)


def barrier(phase_name: str) -> None:
    """Wait until every rank is here."""
    all_reduce_max([0], phase_name)


def init_tensor_group(device: torch.device) -> None:
    """Let tensors travel between ``device`` and its likes on the other ranks."""
    if _group is not None and device.type == "cuda":
        torch.cuda.set_device(device)
        _group.tensor_group = dist.new_group(backend="nccl", timeout=datetime.timedelta(days=COLLECTIVE_TIMEOUT_DAYS))


@contextlib.contextmanager
def process_group_context() -> Iterator[None]:
    """Within it, the processes work together; an error that is not for the user is left for the others as well."""
    init_process_group()
    try:
        yield
    except (SaetrainError, CoordinatedExit):
        raise
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if code:
            report_failure(f"exit code {code}", code)
            exit_now(code)
        raise
    except BaseException as error:
        is_interrupt = isinstance(error, KeyboardInterrupt)
        report_failure("Ctrl-C" if is_interrupt else f"{type(error).__name__}: {error}", 130 if is_interrupt else 1)
        if _group is not None and not is_interrupt:
            traceback.print_exc()
        exit_now(130 if is_interrupt else 1)
        raise
    finally:
        if not isinstance(sys.exc_info()[1], SaetrainError):
            destroy_process_group()


def destroy_process_group() -> None:
    """Leave in order: nobody waits for this rank any more, and it for nobody."""
    global _group
    if _group is not None:
        _group.heartbeat.stop()
        dist.destroy_process_group()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _group = None


class CoordinatedExit(SystemExit):
    """An end that all ranks have agreed on, with the exit code of a signal."""


def was_restarted() -> bool:
    """Whether torchrun started the processes of this run before, of any host."""
    return _group.is_restart if _group is not None else launch.restart_count() > 0


def report_failure(message: str, code: int) -> bool:
    """Tell the others that this rank ends for an error; False where another rank's error was first."""
    return _group is None or _group.heartbeat.report_failure(message, code)


def rank_prefix() -> str:
    """``rank 2: `` before a message, nothing where there is one process."""
    return f"rank {rank()}: " if _group is not None else ""


def exit_now(code: int) -> None:
    """End the process here where it is one of several: the libraries' threads may wait for ranks that are gone."""
    if _group is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def on_peer_failure(callback: Callable[[], None]) -> None:
    """Call ``closing`` before this process is ended because another is gone."""
    if _group is not None:
        _group.heartbeat.on_exit = callback


def set_progress(progress: str) -> None:
    """How far this rank is, for the others' messages."""
    if _group is not None:
        _group.heartbeat.set_progress(progress)


def set_phase(name: str) -> None:
    """What this rank is doing from here on, for the others' messages."""
    if _group is not None:
        _group.heartbeat.set_phase(name)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """What this rank is doing within, for the others' messages."""
    previous = _group.heartbeat.set_phase(name) if _group is not None else ""
    yield
    # Left as it is by an error, for that is where it happened.
    if _group is not None:
        _group.heartbeat.set_phase(previous)


def comm_stats() -> CommStats:
    """What this rank has exchanged since the start."""
    return _group.comm_stats if _group is not None else CommStats()


@contextlib.contextmanager
def _track_wait(group: _ProcessGroup) -> Iterator[None]:
    """Within it, time counts as waiting, and a broken connection is explained."""
    start_s = time.perf_counter()
    try:
        yield
    except RuntimeError as error:
        raise group.heartbeat.explain_broken_collective(error) from error
    finally:
        group.comm_stats.waited_s += time.perf_counter() - start_s


class AsyncAllReduce:
    """Each number's largest over the ranks, or what ``op`` makes of them, found while other work goes on."""

    def __init__(
        self, values: list[int], phase_name: str = "agreeing on the next step", op: Any = dist.ReduceOp.MAX
    ) -> None:
        self._reduced, self._phase_name = torch.tensor(values, dtype=torch.long), phase_name
        self._work: Any = None
        if _group is not None:
            with phase(phase_name), _track_wait(_group):
                self._work = dist.all_reduce(self._reduced, op=op, group=_group.control_group, async_op=True)
            _group.comm_stats.n_control_collectives += 1

    def wait(self) -> list[int]:
        """What was found, once every rank has asked."""
        if _group is not None:
            with phase(self._phase_name), _track_wait(_group):
                self._work.wait()
        return [int(number) for number in self._reduced]


def all_reduce_max(values: list[int], phase_name: str) -> list[int]:
    """The largest of each number over the ranks."""
    return AsyncAllReduce(values, phase_name).wait()


def all_reduce_sum(values: list[int], phase_name: str) -> list[int]:
    """The sum of each number over the ranks."""
    return AsyncAllReduce(values, phase_name, dist.ReduceOp.SUM).wait()


def all_gather_json(value: Any, phase_name: str) -> list[Any]:
    """Every rank's ``value`` (of JSON), by rank."""
    if _group is None:
        return [value]
    own_bytes = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    (max_length,) = all_reduce_max([len(own_bytes)], phase_name)
    padded = torch.full((max_length,), ord(" "), dtype=torch.uint8)
    padded[: len(own_bytes)] = own_bytes
    rows = [torch.empty_like(padded) for _ in range(world_size())]
    with phase(phase_name), _track_wait(_group):
        dist.all_gather(rows, padded, group=_group.control_group)
    _group.comm_stats.n_control_collectives += 1
    return [json.loads(bytes(row.tolist())) for row in rows]


def broadcast_from_rank0(value: Any, phase_name: str) -> Any:
    """Rank 0's ``value`` (of JSON)."""
    return all_gather_json(value if rank() == 0 else None, phase_name)[0]


def local_rank0_first(phase_name: str, func: Callable[[], Any]) -> Any:
    """``work()`` on one process of every host first, so that what it leaves in a cache is there for the others."""
    if local_rank() == 0:
        with phase(phase_name):
            out = func()
    barrier(f"waiting for the host's first process: {phase_name}")
    if local_rank() != 0:
        with phase(phase_name):
            out = func()
    return out


def run_on_rank0(phase_name: str, func: Callable[[], Any]) -> Any:
    """``work()`` on rank 0 while the others wait; what it gives (of JSON), everywhere."""
    out = None
    if rank() == 0:
        with phase(phase_name):
            out = func()
    return broadcast_from_rank0(out, f"waiting for rank 0: {phase_name}")


class GradientBuckets:
    """Sums tensors over the ranks in place while other work goes on; all add the same ones in the same order."""

    def __init__(self) -> None:
        self._works: list[Any] = []
        self._open_buckets: dict[torch.dtype, list[Tensor]] = {}
        self._flat_buckets: list[tuple[Tensor, list[Tensor]]] = []

    def add(self, tensors: list[Tensor]) -> None:
        """Begin; each is contiguous and left alone until :meth:`wait` is done."""
        if _group is None:
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
        assert _group is not None
        with _track_wait(_group):
            self._works.append(dist.all_reduce(tensor, group=_group.tensor_group, async_op=True))
        _group.comm_stats.n_tensor_collectives += 1
        _group.comm_stats.n_bytes += tensor.nbytes

    def flush(self) -> None:
        """Nothing more is added: also what waited for company sets out."""
        for dtype in list(self._open_buckets):
            self._reduce_bucket(dtype)

    def wait(self, phase_name: str = "adding up gradients") -> None:
        """Until the tensors hold their sums."""
        if _group is None:
            return
        self.flush()
        with phase(phase_name), _track_wait(_group):
            for work in self._works:
                work.wait()
        for flat, tensors in self._flat_buckets:
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))


def all_to_all_by_owner(
    parts: Mapping[str, Tensor], owners: Mapping[str, int], rows_per_rank: list[int]
) -> dict[str, Tensor]:
    """Every rank's rows (n, D) of each name, sent to the rank that owns the name: {name of its own: (sum of n, D)}.

    ``rows``: each rank's n, which all names share.
    """
    if _group is None:
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
    with phase("exchanging activations"), _track_wait(_group):
        dist.all_to_all_single(received, sent, receive_bytes, send_bytes, group=_group.tensor_group)
    _group.comm_stats.n_tensor_collectives += 1
    _group.comm_stats.n_bytes += sum(send_bytes) - send_bytes[rank()]
    out: dict[str, list[Tensor]] = {name: [] for name in own_names}
    for block, count in zip(received.split(receive_bytes), rows_per_rank, strict=True):
        pieces = block.split([count * row_bytes[name] for name in own_names])
        for name, piece in zip(own_names, pieces, strict=True):
            out[name].append(piece.view(dtype).view(count, -1))
    return {name: torch.cat(pieces) for name, pieces in out.items()}


def gather_tensors_to_rank0(
    source_rank: int, tensors: Mapping[str, Tensor], phase_name: str
) -> dict[str, Tensor] | None:
    """The named tensors of rank ``source`` as rank 0 gets them; None on the others."""
    if _group is None or source_rank == 0:
        return dict(tensors) if rank() == 0 else None
    shapes = all_gather_json(_shapes_and_dtypes(tensors) if rank() == source_rank else None, phase_name)[source_rank]
    out: dict[str, Tensor] = {}
    with phase(phase_name), _track_wait(_group):
        for key, (shape, dtype) in shapes.items():
            if rank() == source_rank:
                dist.send(tensors[key].detach().cpu().contiguous(), 0, group=_group.control_group)
            elif rank() == 0:
                out[key] = torch.empty(shape, dtype=getattr(torch, dtype))
                dist.recv(out[key], source_rank, group=_group.control_group)
    return out if rank() == 0 else None


def broadcast_tensors(tensors: Mapping[str, Tensor] | None, phase_name: str) -> dict[str, Tensor]:
    """Rank 0's named tensors, everywhere, in the hosts' memory."""
    if _group is None:
        return dict(tensors or {})
    shapes = broadcast_from_rank0(_shapes_and_dtypes(tensors or {}), phase_name)
    out: dict[str, Tensor] = {}
    with phase(phase_name), _track_wait(_group):
        for key, (shape, dtype) in shapes.items():
            own = tensors[key].detach().cpu().contiguous() if tensors is not None and rank() == 0 else None
            out[key] = own if own is not None else torch.empty(shape, dtype=getattr(torch, dtype))
            dist.broadcast(out[key], 0, group=_group.control_group)
    return out


def _shapes_and_dtypes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[list[int], str]]:
    return {key: (list(value.shape), str(value.dtype).removeprefix("torch.")) for key, value in tensors.items()}
