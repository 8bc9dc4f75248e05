"""Where the processes of a run find one another: the store of the launcher, or that of rank 0."""

from __future__ import annotations

import datetime
import os
import time
import uuid
from typing import Any

import torch.distributed as dist

from saetrain import launch
from saetrain.launch import rank, world_size

PAUSE_S = 0.05


def connect(seconds: float, *, host: bool) -> Any:
    """A connection to the store where the processes meet, which this one serves where it is the ``host``."""
    timeout = datetime.timedelta(seconds=seconds)
    where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(*where, is_master=host, timeout=timeout, wait_for_workers=False)


def meet(minutes: float) -> tuple[Any, str, int]:
    """(the store, a name for this start that no other has had, 1 where there was one before).

    torchrun keeps its store when it starts the processes anew, with all that their last start left in it, and not every
    host's agent counts the restart.
    """
    seconds = 60 * minutes
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return connect(seconds, host=rank() == 0), "saetrain", 0
    store, mine = connect(seconds, host=False), uuid.uuid4().hex
    again = int(store.add(f"saetrain/starts{rank()}", 1) > 1 or launch.restarts() > 0)
    if rank():
        store.set(f"saetrain/here{rank()}", mine)
        store.wait([f"saetrain/answer{mine}"], datetime.timedelta(seconds=seconds))
        name = store.get(f"saetrain/answer{mine}").decode()
        store.set(f"{name}/{mine}", "here")
        return store, name, again
    _answer(store, mine, time.monotonic() + seconds)
    return store, mine, again


def _answer(store: Any, mine: str, until: float) -> None:
    """As rank 0, give every other rank the name ``mine``, until each has said that it got it."""
    waiting = set(range(1, world_size()))
    answered: set[str] = set()
    while waiting:
        for number in [each for each in waiting if store.check([f"saetrain/here{each}"])]:
            other = store.get(f"saetrain/here{number}").decode()
            # What a start before this one left is answered too, which nobody reads.
            if other not in answered:
                store.set(f"saetrain/answer{other}", mine)
                answered.add(other)
            if store.check([f"{mine}/{other}"]):
                waiting.discard(number)
        if time.monotonic() > until:
            raise RuntimeError(f"no sign of rank {', '.join(map(str, sorted(waiting)))}")
        time.sleep(PAUSE_S)
