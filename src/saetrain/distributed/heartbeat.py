"""Heartbeat: each rank reports that it is alive, and ends when a rank has failed, is dead or makes no progress.

Once per second, each rank writes a beat and its phase to the store and reads the beats of the other ranks. A rank that
raises an error writes it to the store. The beat of a rank that was killed or suspended no longer changes. A rank that
is alive but makes no progress reports itself. Collectives have no short timeout, so a slow phase is never mistaken for
a dead rank.

A rank that waits for another one makes no progress either. Every rank enters the same collectives in the same order, so
a rank waits for those that have entered fewer. Therefore only the rank that has entered the fewest reports itself.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from saetrain.distributed.env import PROGRESS_TIMEOUT_VARIABLE, should_print_error
from saetrain.errors import RankFailure
from saetrain.untrusted import format_error

BEAT_INTERVAL_S = 1.0
PEER_TIMEOUT_S = 20.0
"""Seconds without a beat after which a rank counts as dead."""
BROKEN_PEER_TIMEOUT_S = 4.0
"""Seconds without a beat after which a rank counts as dead once a collective has failed."""
SUSPENDED_GAP_S = 5.0
"""Seconds between two checks that show that this process was suspended, so that missed beats mean nothing."""
BLOCKED_PYTHON_S = 15.0
"""Seconds without a check after which the stacks are printed: C code holds Python's lock, so no thread can report."""
LOADING_TIMEOUT_FACTOR = 12
"""Factor of the progress timeout in phases that download or read whole files, where libraries show no progress."""
CLOSE_TIMEOUT_S = 5.0
"""Seconds in which the logs can close before the process ends."""
STACK_FRAMES = 8
"""Innermost stack frames of the main thread in the message about a rank without progress."""
FAILURE_KEY = "failed"
STDERR = 2
"""File descriptor, because `faulthandler` writes without Python's file objects."""


@dataclass(frozen=True)
class _Peer:
    """Last beat of another rank, and the time at which it was first seen; a rank that is done needs no more beats."""

    count: int = 0
    phase: str = ""
    n_collectives: float = 0
    beat_s: float = math.inf


class Heartbeat:
    """The beats of this rank, and the checks of the other ranks, in two threads.

    ``store`` is a connection to the common store that nothing else uses. A rank that makes no progress for
    ``progress_timeout_s`` reports itself as failed.
    """

    def __init__(self, store: Any, rank: int, world_size: int, progress_timeout_s: float = math.inf) -> None:
        self._store, self._rank, self._progress_timeout_s = store, rank, progress_timeout_s
        self._n_beats, self._phase, self._is_loading, self._progress = 0, "starting", False, ""
        self._n_collectives, self._is_in_collective = 0, False
        # Processes that this rank forks, for example to tokenize, share this value.
        self._progress_s = multiprocessing.RawValue("d", time.monotonic())
        self._peers = {number: _Peer() for number in range(world_size) if number != rank}
        self._reported_failure: dict[str, Any] | None = None
        self._last_reply_s, self._resumed_s = time.monotonic(), 0.0
        self._stop_event = threading.Event()
        self._exit_deferred_until_s = 0.0
        self._threads: list[threading.Thread] = []
        self.on_exit: Callable[[], None] | None = None
        """Called before the heartbeat ends the process, to close the logs."""
        self._write_beat()

    def start(self) -> None:
        """Start the threads, after every rank has written its first beat."""
        self._last_reply_s = time.monotonic()
        # A forked process would wait at its end for the thread that prints the stacks, because it does not have it.
        os.register_at_fork(before=faulthandler.cancel_dump_traceback_later)
        for loop in (self._beat_loop, self._monitor_loop):
            self._threads.append(threading.Thread(target=loop, name=f"heartbeat{loop.__name__}", daemon=True))
            self._threads[-1].start()

    def set_phase(self, phase: str, is_loading: bool) -> tuple[str, bool]:
        """Set the phase of this rank for the messages of the other ranks, and return the previous arguments."""
        previous = self._phase, self._is_loading
        self._phase, self._is_loading = phase, is_loading
        self.record_progress()
        return previous

    def set_progress(self, progress: str) -> None:
        """Set the progress of this rank, such as ``step 12``."""
        self._progress = progress
        self.record_progress()

    def record_progress(self) -> None:
        """Record that this rank makes progress; also works in a forked process."""
        self._progress_s.value = time.monotonic()

    def enter_collective(self) -> None:
        """Count a collective, in which this rank may wait for others."""
        self._n_collectives, self._is_in_collective = self._n_collectives + 1, True
        self.record_progress()

    def leave_collective(self) -> None:
        """Record that this rank waits no longer."""
        self._is_in_collective = False
        self.record_progress()

    def report_failure(self, message: str, code: int) -> bool:
        """Write the error of this rank to the store; return False if another rank's error was first."""
        # The other ranks end because of this error, and their end must not stop this rank while it closes its logs.
        self._exit_deferred_until_s = time.monotonic() + 3 * CLOSE_TIMEOUT_S
        own_report = json.dumps({"rank": self._rank, "phase": self.describe_phase(), "message": message, "code": code})
        with contextlib.suppress(RuntimeError):
            is_first = self._store.compare_set(FAILURE_KEY, "", own_report).decode() == own_report
            self._write_beat()
            return bool(is_first)
        return True

    def stop(self) -> None:
        """Stop the threads and mark this rank as done, so that the other ranks expect no more beats."""
        self._stop_event.set()
        # The interpreter's shutdown must not destroy the store while a thread uses it.
        for thread in self._threads:
            thread.join(CLOSE_TIMEOUT_S)
        faulthandler.cancel_dump_traceback_later()
        self._phase = "done"
        with contextlib.suppress(RuntimeError):
            self._write_beat()

    def describe_phase(self) -> str:
        """Return the phase and progress of this rank."""
        return f"{self._phase}, {self._progress}" if self._progress else self._phase

    def explain_broken_collective(self, error: BaseException) -> RankFailure:
        """Return the failure of the rank that broke a collective, or a general one if no rank is found."""
        failure = self.wait_for_failure(BROKEN_PEER_TIMEOUT_S, 3 * BROKEN_PEER_TIMEOUT_S)
        return failure or RankFailure(
            f"communication between the ranks failed in {self.describe_phase()}: {str(error).splitlines()[0]}", 1
        )

    def wait_for_failure(self, silence_s: float, timeout_s: float) -> RankFailure | None:
        """Wait up to ``timeout_s`` for a rank that has failed or has not beaten for ``silence_s``; None if none has."""
        deadline_s = time.monotonic() + timeout_s
        # The main thread ends the run more cleanly than the monitor thread, which gives it a limited time to do so.
        self._exit_deferred_until_s = deadline_s + 3 * CLOSE_TIMEOUT_S
        while time.monotonic() < deadline_s:
            failure = self._find_dead_rank(silence_s)
            if failure is not None:
                return failure
            time.sleep(BEAT_INTERVAL_S / 4)
        return None

    def _write_beat(self) -> None:
        """Write one beat and the phase to the store."""
        self._n_beats += 1
        beat = {
            "count": self._n_beats,
            "phase": self.describe_phase(),
            "n_collectives": self._n_collectives,
            "done": self._phase == "done",
        }
        self._store.set(f"beat{self._rank}", json.dumps(beat))

    def _beat_loop(self) -> None:
        while not self._stop_event.wait(BEAT_INTERVAL_S):
            # Errors are ignored here, because a dead store is detected by the age of its last reply.
            with contextlib.suppress(RuntimeError):
                self.exchange_beats()

    def exchange_beats(self) -> None:
        """Write a beat, and read the beats and failures of the other ranks."""
        self._write_beat()
        if self._store.check([FAILURE_KEY]):
            self._reported_failure = json.loads(self._store.get(FAILURE_KEY))
        texts = self._store.multi_get([f"beat{number}" for number in self._peers])
        for number, text in zip(self._peers, texts, strict=True):
            beat, peer = json.loads(text), self._peers[number]
            beat_s = time.monotonic() if beat["count"] != peer.count else peer.beat_s
            n_collectives = beat["n_collectives"]
            if beat["done"]:
                beat_s = n_collectives = math.inf
            self._peers[number] = _Peer(beat["count"], beat["phase"], n_collectives, beat_s)
        self._last_reply_s = time.monotonic()

    def _monitor_loop(self) -> None:
        last_check_s = time.monotonic()
        while not self._stop_event.wait(BEAT_INTERVAL_S / 4):
            faulthandler.dump_traceback_later(BLOCKED_PYTHON_S, file=STDERR)
            now_s = time.monotonic()
            if now_s - last_check_s > SUSPENDED_GAP_S:
                self._resumed_s = now_s
            last_check_s = now_s
            failure = self._find_dead_rank(PEER_TIMEOUT_S)
            if failure is None:
                self._end_if_stalled()
            elif now_s > self._exit_deferred_until_s:
                self._end_process(failure)

    def describe_stall(self) -> str | None:
        """Return a message if this rank has made no progress for too long and waits for no other rank, else None."""
        idle_s = time.monotonic() - max(self._progress_s.value, self._resumed_s)
        limit_s = self._progress_timeout_s * (LOADING_TIMEOUT_FACTOR if self._is_loading else 1)
        if idle_s <= limit_s or any(peer.n_collectives < self._n_collectives for peer in self._peers.values()):
            return None
        stuck = "every rank has arrived, so the communication is stuck; " if self._is_in_collective else ""
        return (
            f"no progress for {idle_s:.0f} s, and the limit is {limit_s:.0f} s ({PROGRESS_TIMEOUT_VARIABLE}); {stuck}"
            f"stack of the main thread, innermost first: {_describe_main_thread()}"
        )

    def _end_if_stalled(self) -> None:
        message = self.describe_stall()
        if message is None or not self.report_failure(message, 1):
            return
        # This prints the stacks without Python's own input and output, which may be what is stuck.
        faulthandler.dump_traceback(file=STDERR)
        # The other ranks must read the report before this process, which may serve the store, ends.
        time.sleep(3 * BEAT_INTERVAL_S)
        self._end_process(RankFailure(f"rank {self._rank} failed in {self.describe_phase()}: {message}", 1))

    def _find_dead_rank(self, silence_s: float) -> RankFailure | None:
        """Return the failure of a rank that reported one or has not beaten for ``silence_s`` seconds, else None."""
        reported, now_s = self._reported_failure, time.monotonic()
        if reported is not None and reported["rank"] != self._rank:
            return RankFailure(
                f"rank {reported['rank']} failed in {reported['phase']}: {reported['message']}", reported["code"]
            )
        for number, peer in self._peers.items():
            peer_silence_s = now_s - max(peer.beat_s, self._resumed_s)
            if peer_silence_s > silence_s:
                return RankFailure(
                    f"rank {number} has not answered for {peer_silence_s:.0f} s (it was killed, suspended or "
                    f"disconnected), so the run ends; its last phase was {peer.phase}",
                    1,
                )
        store_silence_s = now_s - max(self._last_reply_s, self._resumed_s)
        if store_silence_s > silence_s:
            return RankFailure(f"the host of rank 0 has not answered for {store_silence_s:.0f} s", 1)
        return None

    def _end_process(self, failure: RankFailure) -> None:
        faulthandler.cancel_dump_traceback_later()
        if should_print_error(failure):
            print(format_error(f"saetrain: rank {self._rank}: error: ", failure), file=sys.stderr, flush=True)
        if self.on_exit is not None:
            closer = threading.Thread(target=self.on_exit, daemon=True)
            closer.start()
            closer.join(CLOSE_TIMEOUT_S)
        os._exit(failure.exit_code)


def _describe_main_thread() -> str:
    """Return the innermost stack frames of the main thread, such as ``wait (threading.py:320), …``."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    frames: list[str] = []
    while frame is not None and len(frames) < STACK_FRAMES:
        frames.append(f"{frame.f_code.co_name} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})")
        frame = frame.f_back
    return ", ".join(frames)
