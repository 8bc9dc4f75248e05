"""All communication between ranks; with one rank, every function is a no-op.

Two groups: one of gloo for numbers and texts between the hosts' memories, and one for tensors on the SAEs' device (NCCL
on GPUs). Their collectives have no short timeout: :mod:`saetrain.distributed.heartbeat` finds a rank that is gone.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from saetrain.distributed import env
from saetrain.distributed.env import rank, world_size
from saetrain.distributed.heartbeat import Heartbeat
from saetrain.distributed.rendezvous import connect_store, rendezvous
from saetrain.errors import SaetrainError

STORE_TIMEOUT_S = 10
RENDEZVOUS_TIMEOUT_MINUTES = 10
"""Minutes that the processes get to find one another."""
COLLECTIVE_TIMEOUT_DAYS = 30
SIGTERM_GRACE_S = 3.0
"""Seconds in which a process that is told to end looks for another's failure, which torchrun answers so."""


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
    env.require_rendezvous_env()
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
    restarts = torch.tensor(int(is_restart))
    with phase("rendezvous"), track_wait(_group):
        dist.all_reduce(restarts, op=dist.ReduceOp.MAX, group=control_group)
    _group.is_restart = bool(restarts)
    heartbeat.start()
    signal.signal(signal.SIGTERM, _handle_sigterm)


def _handle_sigterm(signum: int, frame: Any) -> None:
    """Ends the process as the signal would, once it is known whether another rank's failure is behind it."""
    failure = _group.heartbeat.wait_for_failure(SIGTERM_GRACE_S, SIGTERM_GRACE_S) if _group is not None else None
    if failure is not None:
        raise failure
    raise SystemExit(128 + signum)


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
    return _group.is_restart if _group is not None else env.restart_count() > 0


def current_group() -> _ProcessGroup | None:
    """The process group of this launch, or None when there is one process."""
    return _group


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
def track_wait(group: _ProcessGroup) -> Iterator[None]:
    """Within it, time counts as waiting, and a broken connection is explained."""
    start_s = time.perf_counter()
    try:
        yield
    except RuntimeError as error:
        raise group.heartbeat.explain_broken_collective(error) from error
    finally:
        group.comm_stats.waited_s += time.perf_counter() - start_s
