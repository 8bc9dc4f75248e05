"""Process group of a launch: start, phases, failures and shutdown; with one rank, every function is a no-op.

There are two groups. The control group (gloo) carries numbers and JSON in host memory. The tensor group carries tensors
on the SAEs' device (NCCL on GPUs). Their collectives have no short timeout, because
:mod:`saetrain.distributed.heartbeat` finds dead ranks.
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
"""Minutes in which all processes must have started."""
COLLECTIVE_TIMEOUT_DAYS = 30
SIGTERM_GRACE_S = 3.0
"""Seconds in which a rank looks for another rank's failure after SIGTERM, which torchrun sends after a failure."""


@dataclass
class CommStats:
    """Communication of this rank: numbers of collectives, bytes of its own tensors, and seconds waited."""

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
    """Run the rendezvous, create the groups and start the heartbeat.

    Raises SaetrainError if the environment is incomplete or if the other processes can't be reached.
    """
    global _group
    if world_size() == 1 or _group is not None:
        return
    env.require_rendezvous_env()
    timeout_s = env.progress_timeout_s()
    try:
        store, launch_id, is_restart = rendezvous(RENDEZVOUS_TIMEOUT_MINUTES)
        timeout = datetime.timedelta(minutes=RENDEZVOUS_TIMEOUT_MINUTES)
        prefix_store = dist.PrefixStore(launch_id, store)
        dist.init_process_group("gloo", store=prefix_store, rank=rank(), world_size=world_size(), timeout=timeout)
        # The heartbeat has its own connection, because another thread may block in the first one.
        heartbeat_store = connect_store(STORE_TIMEOUT_S, is_master=False)
    except (RuntimeError, ValueError, OSError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise SaetrainError(
            f"rank {rank()}: rendezvous of {world_size()} processes at {address} failed: "
            f"{str(error).splitlines()[0]}; start every process with the same MASTER_ADDR and MASTER_PORT"
        ) from error
    prefix_store = dist.PrefixStore(f"{launch_id}/heartbeat", heartbeat_store)
    heartbeat = Heartbeat(prefix_store, rank(), world_size(), timeout_s)
    control_group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=COLLECTIVE_TIMEOUT_DAYS))
    _group = _ProcessGroup(heartbeat, control_group, control_group)
    restarts = torch.tensor(int(is_restart))
    with phase("rendezvous"), track_wait(_group):
        dist.all_reduce(restarts, op=dist.ReduceOp.MAX, group=control_group)
    _group.is_restart = bool(restarts)
    heartbeat.start()
    signal.signal(signal.SIGTERM, _handle_sigterm)


def _handle_sigterm(signum: int, frame: Any) -> None:
    """Raise the failure of another rank if one caused the signal, else end the process as the signal would."""
    failure = _group.heartbeat.wait_for_failure(SIGTERM_GRACE_S, SIGTERM_GRACE_S) if _group is not None else None
    if failure is not None:
        raise failure
    raise SystemExit(128 + signum)


def init_tensor_group(device: torch.device) -> None:
    """Create the NCCL group for tensors on ``device``; on a CPU, the control group carries tensors too."""
    if _group is not None and device.type == "cuda":
        torch.cuda.set_device(device)
        _group.tensor_group = dist.new_group(backend="nccl", timeout=datetime.timedelta(days=COLLECTIVE_TIMEOUT_DAYS))


@contextlib.contextmanager
def process_group_context() -> Iterator[None]:
    """Initialize the process group for the block, and destroy it afterwards.

    An unexpected error is reported to the other ranks, printed, and ends the process. The caller handles SaetrainError.
    """
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
    """Shut down the heartbeat and the process group."""
    global _group
    if _group is not None:
        _group.heartbeat.stop()
        dist.destroy_process_group()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _group = None


class CoordinatedExit(SystemExit):
    """Exit that all ranks have agreed on, with the exit code of a signal."""


def was_restarted() -> bool:
    """Return whether torchrun has restarted the processes of this run, on any host."""
    return _group.is_restart if _group is not None else env.restart_count() > 0


def current_group() -> _ProcessGroup | None:
    """Return the process group of this launch, or None if there is one process."""
    return _group


def report_failure(message: str, code: int) -> bool:
    """Report to the other ranks that this rank ends with an error; return False if another rank's error was first."""
    if _group is not None:
        # torchrun sends SIGTERM as soon as another rank has ended, and this rank must still print its error.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return _group is None or _group.heartbeat.report_failure(message, code)


def rank_prefix() -> str:
    """Return the prefix of a message, such as ``rank 2: ``; with one process it is empty."""
    return f"rank {rank()}: " if _group is not None else ""


def exit_now(code: int) -> None:
    """End the process at once if it is one of several, because threads of libraries may wait for dead ranks."""
    if _group is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def on_peer_failure(callback: Callable[[], None]) -> None:
    """Call ``callback`` before the heartbeat ends this process, because another rank failed or this one is stuck."""
    if _group is not None:
        _group.heartbeat.on_exit = callback


def set_progress(progress: str) -> None:
    """Set the progress of this rank, such as ``step 12``, for the messages of the other ranks."""
    if _group is not None:
        _group.heartbeat.set_progress(progress)


def record_progress() -> None:
    """Record that this rank makes progress, in work that takes long within one phase."""
    if _group is not None:
        _group.heartbeat.record_progress()


def set_phase(name: str, *, is_loading: bool = False) -> None:
    """Set the phase of this rank for the messages of the other ranks.

    ``is_loading``: libraries download or read whole files, so the phase may last long without recorded progress.
    """
    if _group is not None:
        _group.heartbeat.set_phase(name, is_loading)


@contextlib.contextmanager
def phase(name: str, *, is_loading: bool = False) -> Iterator[None]:
    """Set the phase of this rank for the block, as :func:`set_phase`."""
    previous = _group.heartbeat.set_phase(name, is_loading) if _group is not None else ("", False)
    yield
    # After an error the phase is kept, because it names the place of the error.
    if _group is not None:
        _group.heartbeat.set_phase(*previous)


def comm_stats() -> CommStats:
    """Return the communication of this rank since the start."""
    return _group.comm_stats if _group is not None else CommStats()


@contextlib.contextmanager
def track_wait(group: _ProcessGroup) -> Iterator[None]:
    """Count the block as a collective and its time as waiting; raise a RankFailure if the collective fails."""
    start_s = time.perf_counter()
    group.heartbeat.enter_collective()
    try:
        yield
    except RuntimeError as error:
        raise group.heartbeat.explain_broken_collective(error) from error
    finally:
        group.heartbeat.leave_collective()
        group.comm_stats.waited_s += time.perf_counter() - start_s
