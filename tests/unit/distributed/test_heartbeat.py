"""A rank that makes no progress finds itself, and neither a rank that waits for another nor a slow one does."""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from multiprocessing.synchronize import Event

import pytest
import torch.distributed as dist

from saetrain.distributed import env, heartbeat
from saetrain.distributed.heartbeat import Heartbeat
from saetrain.errors import SaetrainError

LIMIT_S = 60.0


def build_ranks(progress_timeout_s: float) -> list[Heartbeat]:
    """Return three ranks of one run, each with its own connection to the store."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stores = [server, *(dist.TCPStore("127.0.0.1", server.port, is_master=False) for _ in range(2))]
    return [Heartbeat(store, number, 3, progress_timeout_s) for number, store in enumerate(stores)]


@pytest.fixture
def ranks() -> list[Heartbeat]:
    return build_ranks(LIMIT_S)


def age_progress(ranks: list[Heartbeat], seconds: float) -> None:
    """Let the last progress of the ranks be so many seconds older."""
    for rank in ranks:
        rank._progress_s.value -= seconds


def find_stalled(ranks: list[Heartbeat]) -> dict[int, str]:
    """Exchange beats, and return {rank: message} of the ranks that report themselves."""
    for rank in [*ranks, *ranks]:
        rank.exchange_beats()
    messages = {number: rank.describe_stall() for number, rank in enumerate(ranks)}
    return {number: message for number, message in messages.items() if message is not None}


def test_the_rank_that_others_wait_for_is_stalled(ranks: list[Heartbeat]) -> None:
    for number in (0, 2):
        ranks[number].enter_collective()
    age_progress(ranks, 50)
    assert not find_stalled(ranks)
    age_progress(ranks, 20)
    stalled = find_stalled(ranks)
    assert list(stalled) == [1]
    limit = r"the limit is 60 s \(SAETRAIN_PROGRESS_TIMEOUT_MINUTES\)"
    assert re.match(rf"no progress for 7\d s, and {limit}; stack of the main thread", stalled[1])
    assert "test_the_rank_that_others_wait_for_is_stalled (test_heartbeat.py:" in stalled[1]
    assert "communication is stuck" not in stalled[1]
    ranks[1].enter_collective()
    ranks[1].leave_collective()
    assert 1 not in find_stalled(ranks)


def test_ranks_that_all_wait_have_stuck_communication(ranks: list[Heartbeat]) -> None:
    for rank in ranks:
        rank.enter_collective()
    age_progress(ranks, 70)
    assert all("every rank has arrived, so the communication is stuck" in text for text in find_stalled(ranks).values())
    assert len(find_stalled(ranks)) == 3


def test_a_rank_that_is_done_delays_nobody(ranks: list[Heartbeat]) -> None:
    for rank in ranks[:2]:
        rank.enter_collective()
        rank.leave_collective()
    ranks[2].stop()
    age_progress(ranks, 70)
    for _ in range(2):
        for rank in ranks[:2]:
            rank.exchange_beats()
    assert ranks[0].describe_stall() is not None


@pytest.mark.parametrize("sign", ["phase", "progress", "recorded", "recorded in a forked process"])
def test_a_sign_of_progress_resets_the_time(ranks: list[Heartbeat], sign: str) -> None:
    age_progress(ranks, 70)
    assert list(find_stalled(ranks)) == [0, 1, 2]
    for rank in ranks[1:]:
        if sign == "phase":
            rank.set_phase("scoring", False)
        elif sign == "progress":
            rank.set_progress("step 2")
        elif sign == "recorded":
            rank.record_progress()
        else:
            process = multiprocessing.get_context("fork").Process(target=rank.record_progress)
            process.start()
            process.join()
    assert list(find_stalled(ranks)) == [0]


def test_loading_has_a_longer_limit(ranks: list[Heartbeat], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "LOADING_TIMEOUT_FACTOR", 4)
    previous = ranks[0].set_phase("reading the data set", True)
    assert previous == ("starting", False)
    age_progress(ranks, 70)
    assert list(find_stalled(ranks)) == [1, 2]
    age_progress(ranks, 200)
    message = find_stalled(ranks)[0]
    assert re.match(r"no progress for 27\d s, and the limit is 240 s", message)
    assert ranks[0].set_phase(*previous) == ("reading the data set", True)
    assert 0 not in find_stalled(ranks)


@pytest.mark.parametrize(("text", "seconds"), [(None, 3600), ("", 3600), ("1.5", 90), ("0", math.inf)])
def test_the_limit_comes_from_the_environment(
    text: str | None, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(env.PROGRESS_TIMEOUT_VARIABLE, raising=False)
    if text is not None:
        monkeypatch.setenv(env.PROGRESS_TIMEOUT_VARIABLE, text)
    assert env.progress_timeout_s() == seconds


@pytest.mark.parametrize("text", ["one hour", "-1", "nan"])
def test_a_bad_limit_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.PROGRESS_TIMEOUT_VARIABLE, text)
    with pytest.raises(SaetrainError, match=f"SAETRAIN_PROGRESS_TIMEOUT_MINUTES={text}: must be a number of minutes"):
        env.progress_timeout_s()


def be_idle_rank(started: Event) -> None:
    """Be a rank with a limit of 3 s that makes no progress for 5 s, and then for 5 s all the time."""
    heartbeat.SUSPENDED_GAP_S = 1.0
    ranks = build_ranks(3)
    find_stalled(ranks)
    ranks[0].start()
    start_s = time.monotonic()
    started.set()
    # Short sleeps, because a process that is stopped may sleep for longer.
    while time.monotonic() < start_s + 10:
        time.sleep(0.05)
        if time.monotonic() > start_s + 5:
            ranks[0].record_progress()


@pytest.mark.slow
@pytest.mark.parametrize(("stopped_s", "code"), [(4, 0), (0, 1)])
def test_a_suspended_process_is_not_stalled(stopped_s: float, code: int) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=be_idle_rank, args=(started,))
    process.start()
    assert started.wait(60)
    assert process.pid is not None
    if stopped_s:
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(stopped_s)
        os.kill(process.pid, signal.SIGCONT)
    process.join(60)
    assert process.exitcode == code


FORK = """
import os, time
import torch.distributed as dist
from saetrain.distributed.heartbeat import Heartbeat
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
ranks = [Heartbeat(store, number, 2) for number in range(2)]
ranks[0].start()
time.sleep(1)
pid = os.fork()
if pid:
    os._exit(os.waitpid(pid, 0)[1])
"""


@pytest.mark.slow
def test_a_forked_process_can_end() -> None:
    """The fork has no heartbeat threads, and its interpreter must not wait for one."""
    assert subprocess.run([sys.executable, "-c", FORK], timeout=60, check=False).returncode == 0
