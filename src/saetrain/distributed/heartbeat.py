"""Heartbeat: each rank reports that it is alive, and ends when another rank has failed or is dead.

Once per second, each rank writes a beat and its phase to the store and reads the beats of the other ranks. A rank that
raises an error writes it to the store. The beat of a rank that was killed or suspended no longer changes. Collectives
have no short timeout, so a slow phase is never mistaken for a dead rank.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from saetrain.distributed.env import should_print_error
from saetrain.errors import RankFailure

BEAT_INTERVAL_S = 1.0
PEER_TIMEOUT_S = 20.0
"""Seconds without a beat after which a rank counts as dead."""
BROKEN_PEER_TIMEOUT_S = 4.0
"""Seconds without a beat after which a rank counts as dead once a collective has failed."""
SUSPENDED_GAP_S = 5.0
"""Seconds between two checks that show that this process was suspended, so that missed beats mean nothing."""
CLOSE_TIMEOUT_S = 5.0
"""Seconds in which the logs can close before the process ends."""
FAILURE_KEY = "failed"


class Heartbeat:
    """The beats of this rank, and the checks of the other ranks, in two threads.

    ``store`` is a connection to the common store that nothing else uses.
    """

    def __init__(self, store: Any, rank: int, world_size: int) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._n_beats, self._phase, self._progress = 0, "starting", ""
        self._last_beats: dict[int, tuple[int, float]] = {}
        self._phases: dict[int, str] = {}
        self._reported_failure: dict[str, Any] | None = None
        self._last_reply_s = time.monotonic()
        self._stop_event = threading.Event()
        self._exit_deferred_until_s = 0.0
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self.on_exit: Callable[[], None] | None = None
        """Called before the heartbeat ends the process, to close the logs."""
        self._write_beat()

    def start(self) -> None:
        """Start the threads, after every rank has written its first beat."""
        self._last_reply_s = time.monotonic()
        for loop in (self._beat_loop, self._monitor_loop):
            self._threads.append(threading.Thread(target=loop, name=f"heartbeat{loop.__name__}", daemon=True))
            self._threads[-1].start()

    def set_phase(self, phase: str) -> str:
        """Set the phase of this rank for the messages of the other ranks, and return the previous phase."""
        previous, self._phase = self._phase, phase
        return previous

    def set_progress(self, progress: str) -> None:
        """Set the progress of this rank, such as ``step 12``."""
        self._progress = progress

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
        beat = {"count": self._n_beats, "phase": self.describe_phase(), "done": self._phase == "done"}
        self._store.set(f"beat{self._rank}", json.dumps(beat))

    def _beat_loop(self) -> None:
        others = [number for number in range(self._world_size) if number != self._rank]
        while not self._stop_event.wait(BEAT_INTERVAL_S):
            # Errors are ignored here, because a dead store is detected by the age of its last reply.
            with contextlib.suppress(RuntimeError):
                self._write_beat()
                if self._store.check([FAILURE_KEY]):
                    self._reported_failure = json.loads(self._store.get(FAILURE_KEY))
                beats = self._store.multi_get([f"beat{number}" for number in others])
                for number, text in zip(others, beats, strict=True):
                    self._record_beat(number, json.loads(text))
                self._last_reply_s = time.monotonic()

    def _record_beat(self, number: int, beat: dict[str, Any]) -> None:
        with self._lock:
            count, _ = self._last_beats.get(number, (0, 0.0))
            self._phases[number] = beat["phase"]
            if beat["done"]:
                self._last_beats[number] = beat["count"], float("inf")
            elif beat["count"] != count:
                self._last_beats[number] = beat["count"], time.monotonic()

    def _monitor_loop(self) -> None:
        last_check_s = time.monotonic()
        while not self._stop_event.wait(BEAT_INTERVAL_S / 4):
            now_s = time.monotonic()
            if now_s - last_check_s > SUSPENDED_GAP_S:
                self._last_reply_s = now_s
                with self._lock:
                    self._last_beats = {
                        number: (count, max(beat_s, now_s)) for number, (count, beat_s) in self._last_beats.items()
                    }
            last_check_s = now_s
            failure = self._find_dead_rank(PEER_TIMEOUT_S)
            if failure is not None and now_s > self._exit_deferred_until_s:
                self._end_process(failure)

    def _find_dead_rank(self, silence_s: float) -> RankFailure | None:
        """Return the failure of a rank that reported one or has not beaten for ``silence_s`` seconds, else None."""
        reported, now_s = self._reported_failure, time.monotonic()
        if reported is not None and reported["rank"] != self._rank:
            return RankFailure(
                f"rank {reported['rank']} failed in {reported['phase']}: {reported['message']}", reported["code"]
            )
        with self._lock:
            last_beats = sorted(self._last_beats.items())
        for number, (_, beat_s) in last_beats:
            if now_s - beat_s > silence_s:
                return RankFailure(
                    f"rank {number} has not answered for {now_s - beat_s:.0f} s (it was killed, suspended or "
                    f"disconnected), so the run ends; its last phase was {self._phases[number]}",
                    1,
                )
        if now_s - self._last_reply_s > silence_s:
            return RankFailure(f"the host of rank 0 has not answered for {now_s - self._last_reply_s:.0f} s", 1)
        return None

    def _end_process(self, failure: RankFailure) -> None:
        if should_print_error(failure):
            print(f"saetrain: rank {self._rank}: error: {failure}", file=sys.stderr, flush=True)
        if self.on_exit is not None:
            closer = threading.Thread(target=self.on_exit, daemon=True)
            closer.start()
            closer.join(CLOSE_TIMEOUT_S)
        os._exit(failure.exit_code)
