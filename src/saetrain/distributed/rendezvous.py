"""Rendezvous: the processes of a run find one another through the launcher's store, or through rank 0's."""

from __future__ import annotations

import datetime
import os
import time
import uuid
from typing import Any

import torch.distributed as dist

from saetrain.distributed import env
from saetrain.distributed.env import rank, world_size

POLL_INTERVAL_S = 0.05


def connect_store(timeout_s: float, *, is_master: bool) -> Any:
    """Connect to the TCP store at MASTER_ADDR:MASTER_PORT; the process with ``is_master`` serves it."""
    timeout = datetime.timedelta(seconds=timeout_s)
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(*address, is_master=is_master, timeout=timeout, wait_for_workers=False)


def rendezvous(timeout_minutes: float) -> tuple[Any, str, int]:
    """Return (store, unique key prefix of this launch, 1 if the processes were restarted, else 0).

    When torchrun restarts the processes, its store keeps the keys of the previous start, and not every host's agent
    counts the restart.
    """
    timeout_s = 60 * timeout_minutes
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return connect_store(timeout_s, is_master=rank() == 0), "saetrain", 0
    store, own_id = connect_store(timeout_s, is_master=False), uuid.uuid4().hex
    is_restart = int(store.add(f"saetrain/starts{rank()}", 1) > 1 or env.restart_count() > 0)
    if rank():
        store.set(f"saetrain/here{rank()}", own_id)
        store.wait([f"saetrain/answer{own_id}"], datetime.timedelta(seconds=timeout_s))
        launch_id = store.get(f"saetrain/answer{own_id}").decode()
        store.set(f"{launch_id}/{own_id}", "here")
        return store, launch_id, is_restart
    _reply_to_ranks(store, own_id, time.monotonic() + timeout_s)
    return store, own_id, is_restart


def _reply_to_ranks(store: Any, launch_id: str, deadline_s: float) -> None:
    """Send ``launch_id`` to every other rank, as rank 0, until each one has confirmed it."""
    waiting = set(range(1, world_size()))
    answered: set[str] = set()
    while waiting:
        for number in [each for each in waiting if store.check([f"saetrain/here{each}"])]:
            other_id = store.get(f"saetrain/here{number}").decode()
            # Keys of a previous start are answered too, but nobody reads those answers.
            if other_id not in answered:
                store.set(f"saetrain/answer{other_id}", launch_id)
                answered.add(other_id)
            if store.check([f"{launch_id}/{other_id}"]):
                waiting.discard(number)
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"no answer from rank {', '.join(map(str, sorted(waiting)))}")
        time.sleep(POLL_INTERVAL_S)
