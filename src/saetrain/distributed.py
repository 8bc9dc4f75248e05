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
from saetrain.meeting import connect, meet
from saetrain.watch import Watch

STORE_S = 10
MEET_MINUTES = 10
"""Minutes that the processes get to find one another."""
LONG_DAYS = 30
TERM_S = 3.0
"""Seconds in which a process that is told to end looks for another's failure, which torchrun answers so."""
BUCKET_BYTES = 4 << 20
"""Smaller tensors travel together, larger ones as they lie."""


@dataclass
class Traffic:
    """What this rank has exchanged: tensor collectives, their bytes (of this rank's tensors), and seconds waited."""

    calls: int = 0
    bytes: int = 0
    control_calls: int = 0
    waited_s: float = 0.0


@dataclass
class _Team:
    watch: Watch
    control: Any
    tensors: Any
    restarted: bool = False
    traffic: Traffic = field(default_factory=Traffic)


_team: _Team | None = None


def start() -> None:
    """Meet the other processes and begin to watch them; SaetrainError when they can't be met."""
    global _team
    if world_size() == 1 or _team is not None:
        return
    launch.check()
    try:
        store, name, again = meet(MEET_MINUTES)
        limit = datetime.timedelta(minutes=MEET_MINUTES)
        place = dist.PrefixStore(name, store)
        dist.init_process_group("gloo", store=place, rank=rank(), world_size=world_size(), timeout=limit)
        # The watch has its own connection, for another thread may wait in the first.
        own = connect(STORE_S, host=False)
    except (RuntimeError, ValueError, OSError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise SaetrainError(
            f"rank {rank()} could not meet the other {world_size() - 1} processes at {where}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    watch = Watch(dist.PrefixStore(f"{name}/watch", own), rank(), world_size())
    control = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=LONG_DAYS))
    _team = _Team(watch, control, control)
    _team.restarted = agree([again], "meeting")[0] > 0
    watch.start()
    signal.signal(signal.SIGTERM, _terminated)


def _terminated(number: int, at: Any) -> None:
    """Ends the process as the signal would, once it is known whether another rank's failure is behind it."""
    found = _team.watch.find(TERM_S, TERM_S) if _team is not None else None
    if found is not None:
        raise found
    raise SystemExit(128 + number)


def barrier(name: str) -> None:
    """Wait until every rank is here."""
    agree([0], name)


def use_device(device: torch.device) -> None:
    """Let tensors travel between ``device`` and its likes on the other ranks."""
    if _team is not None and device.type == "cuda":
        torch.cuda.set_device(device)
        _team.tensors = dist.new_group(backend="nccl", timeout=datetime.timedelta(days=LONG_DAYS))


@contextlib.contextmanager
def team() -> Iterator[None]:
    """Within it, the processes work together; an error that is not for the user is left for the others as well."""
    start()
    try:
        yield
    except (SaetrainError, AgreedExit):
        raise
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if code:
            fail(f"exit code {code}", code)
            leave(code)
        raise
    except BaseException as error:
        wish = isinstance(error, KeyboardInterrupt)
        fail("Ctrl-C" if wish else f"{type(error).__name__}: {error}", 130 if wish else 1)
        if _team is not None and not wish:
            traceback.print_exc()
        leave(130 if wish else 1)
        raise
    finally:
        if not isinstance(sys.exc_info()[1], SaetrainError):
            end()


def end() -> None:
    """Leave in order: nobody waits for this rank any more, and it for nobody."""
    global _team
    if _team is not None:
        _team.watch.end()
        dist.destroy_process_group()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _team = None


class AgreedExit(SystemExit):
    """An end that all ranks have agreed on, with the exit code of a signal."""


def restarted() -> bool:
    """Whether torchrun started the processes of this run before, of any host."""
    return _team.restarted if _team is not None else launch.restarts() > 0


def fail(message: str, code: int) -> bool:
    """Tell the others that this rank ends for an error; False where another rank's error was first."""
    return _team is None or _team.watch.post(message, code)


def who() -> str:
    """``rank 2: `` before a message, nothing where there is one process."""
    return f"rank {rank()}: " if _team is not None else ""


def leave(code: int) -> None:
    """End the process here where it is one of several: the libraries' threads may wait for ranks that are gone."""
    if _team is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def on_loss(closing: Callable[[], None]) -> None:
    """Call ``closing`` before this process is ended because another is gone."""
    if _team is not None:
        _team.watch.closing = closing


def at(where: str) -> None:
    """How far this rank is, for the others' messages."""
    if _team is not None:
        _team.watch.at(where)


def now(name: str) -> None:
    """What this rank is doing from here on, for the others' messages."""
    if _team is not None:
        _team.watch.enter(name)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """What this rank is doing within, for the others' messages."""
    before = _team.watch.enter(name) if _team is not None else ""
    yield
    # Left as it is by an error, for that is where it happened.
    if _team is not None:
        _team.watch.enter(before)


def traffic() -> Traffic:
    """What this rank has exchanged since the start."""
    return _team.traffic if _team is not None else Traffic()


@contextlib.contextmanager
def _waiting(team: _Team) -> Iterator[None]:
    """Within it, time counts as waiting, and a broken connection is explained."""
    begun = time.perf_counter()
    try:
        yield
    except RuntimeError as error:
        raise team.watch.explain(error) from error
    finally:
        team.traffic.waited_s += time.perf_counter() - begun


class Agreement:
    """Each number's largest over the ranks, or what ``op`` makes of them, found while other work goes on."""

    def __init__(self, values: list[int], name: str = "agreeing on the next step", op: Any = dist.ReduceOp.MAX) -> None:
        self._numbers, self._name = torch.tensor(values, dtype=torch.long), name
        self._work: Any = None
        if _team is not None:
            with phase(name), _waiting(_team):
                self._work = dist.all_reduce(self._numbers, op=op, group=_team.control, async_op=True)
            _team.traffic.control_calls += 1

    def wait(self) -> list[int]:
        """What was found, once every rank has asked."""
        if _team is not None:
            with phase(self._name), _waiting(_team):
                self._work.wait()
        return [int(number) for number in self._numbers]


def agree(values: list[int], name: str) -> list[int]:
    """The largest of each number over the ranks."""
    return Agreement(values, name).wait()


def total(values: list[int], name: str) -> list[int]:
    """The sum of each number over the ranks."""
    return Agreement(values, name, dist.ReduceOp.SUM).wait()


def gather(value: Any, name: str) -> list[Any]:
    """Every rank's ``value`` (of JSON), by rank."""
    if _team is None:
        return [value]
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    (longest,) = agree([len(mine)], name)
    padded = torch.full((longest,), ord(" "), dtype=torch.uint8)
    padded[: len(mine)] = mine
    rows = [torch.empty_like(padded) for _ in range(world_size())]
    with phase(name), _waiting(_team):
        dist.all_gather(rows, padded, group=_team.control)
    _team.traffic.control_calls += 1
    return [json.loads(bytes(row.tolist())) for row in rows]


def first(value: Any, name: str) -> Any:
    """Rank 0's ``value`` (of JSON)."""
    return gather(value if rank() == 0 else None, name)[0]


def turns(name: str, work: Callable[[], Any]) -> Any:
    """``work()`` on one process of every host first, so that what it leaves in a cache is there for the others."""
    if local_rank() == 0:
        with phase(name):
            out = work()
    barrier(f"waiting for the host's first process: {name}")
    if local_rank() != 0:
        with phase(name):
            out = work()
    return out


def on_first(name: str, work: Callable[[], Any]) -> Any:
    """``work()`` on rank 0 while the others wait; what it gives (of JSON), everywhere."""
    out = None
    if rank() == 0:
        with phase(name):
            out = work()
    return first(out, f"waiting for rank 0: {name}")


class Reduction:
    """Sums tensors over the ranks in place while other work goes on; all add the same ones in the same order."""

    def __init__(self) -> None:
        self._works: list[Any] = []
        self._small: dict[torch.dtype, list[Tensor]] = {}
        self._packed: list[tuple[Tensor, list[Tensor]]] = []

    def add(self, tensors: list[Tensor]) -> None:
        """Begin; each is contiguous and left alone until :meth:`wait` is done."""
        if _team is None:
            return
        for tensor in tensors:
            assert tensor.is_contiguous(), tensor.stride()
            if tensor.nbytes >= BUCKET_BYTES:
                self._launch(tensor)
                continue
            bucket = self._small.setdefault(tensor.dtype, [])
            bucket.append(tensor)
            if sum(each.nbytes for each in bucket) >= BUCKET_BYTES:
                self._pack(tensor.dtype)

    def _pack(self, dtype: torch.dtype) -> None:
        tensors = self._small.pop(dtype)
        packed = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self._packed.append((packed, tensors))
        self._launch(packed)

    def _launch(self, tensor: Tensor) -> None:
        assert _team is not None
        with _waiting(_team):
            self._works.append(dist.all_reduce(tensor, group=_team.tensors, async_op=True))
        _team.traffic.calls += 1
        _team.traffic.bytes += tensor.nbytes

    def launch(self) -> None:
        """Nothing more is added: also what waited for company sets out."""
        for dtype in list(self._small):
            self._pack(dtype)

    def wait(self, name: str = "adding up gradients") -> None:
        """Until the tensors hold their sums."""
        if _team is None:
            return
        self.launch()
        with phase(name), _waiting(_team):
            for work in self._works:
                work.wait()
        for packed, tensors in self._packed:
            for tensor, part in zip(tensors, packed.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))


def exchange(parts: Mapping[str, Tensor], owners: Mapping[str, int], rows: list[int]) -> dict[str, Tensor]:
    """Every rank's rows (n, D) of each name, sent to the rank that owns the name: {name of its own: (sum of n, D)}.

    ``rows``: each rank's n, which all names share.
    """
    if _team is None:
        return dict(parts)
    dtype = next(iter(parts.values())).dtype
    by_owner = [[name for name in parts if owners[name] == number] for number in range(world_size())]
    mine = by_owner[rank()]
    widths = {name: part.shape[1] * part.element_size() for name, part in parts.items()}
    flat = [parts[name].contiguous().view(torch.uint8).reshape(-1) for names in by_owner for name in names]
    sent = torch.cat(flat)
    leaving = [rows[rank()] * sum(widths[name] for name in names) for names in by_owner]
    coming = [count * sum(widths[name] for name in mine) for count in rows]
    received = sent.new_empty(sum(coming))
    with phase("exchanging activations"), _waiting(_team):
        dist.all_to_all_single(received, sent, coming, leaving, group=_team.tensors)
    _team.traffic.calls += 1
    _team.traffic.bytes += sum(leaving) - leaving[rank()]
    out: dict[str, list[Tensor]] = {name: [] for name in mine}
    for block, count in zip(received.split(coming), rows, strict=True):
        pieces = block.split([count * widths[name] for name in mine])
        for name, piece in zip(mine, pieces, strict=True):
            out[name].append(piece.view(dtype).view(count, -1))
    return {name: torch.cat(pieces) for name, pieces in out.items()}


def tensors_from(source: int, tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor] | None:
    """The named tensors of rank ``source`` as rank 0 gets them; None on the others."""
    if _team is None or source == 0:
        return dict(tensors) if rank() == 0 else None
    shapes = gather(_shapes(tensors) if rank() == source else None, name)[source]
    out: dict[str, Tensor] = {}
    with phase(name), _waiting(_team):
        for key, (shape, dtype) in shapes.items():
            if rank() == source:
                dist.send(tensors[key].detach().cpu().contiguous(), 0, group=_team.control)
            elif rank() == 0:
                out[key] = torch.empty(shape, dtype=getattr(torch, dtype))
                dist.recv(out[key], source, group=_team.control)
    return out if rank() == 0 else None


def tensors_of_first(tensors: Mapping[str, Tensor] | None, name: str) -> dict[str, Tensor]:
    """Rank 0's named tensors, everywhere, in the hosts' memory."""
    if _team is None:
        return dict(tensors or {})
    shapes = first(_shapes(tensors or {}), name)
    out: dict[str, Tensor] = {}
    with phase(name), _waiting(_team):
        for key, (shape, dtype) in shapes.items():
            mine = tensors[key].detach().cpu().contiguous() if tensors is not None and rank() == 0 else None
            out[key] = mine if mine is not None else torch.empty(shape, dtype=getattr(torch, dtype))
            dist.broadcast(out[key], 0, group=_team.control)
    return out


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[list[int], str]]:
    return {key: (list(value.shape), str(value.dtype).removeprefix("torch.")) for key, value in tensors.items()}
