"""Faults: every rank's heartbeat, and the end of the others when one has failed or fallen silent.

Each rank writes a beat and its phase into the store once a second and reads those of the others. A rank that raises
leaves its error there; one that was killed or stopped leaves a beat that no longer changes. A collective may take as
long as it likes meanwhile, so slow phases are never taken for dead ones.
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

from saetrain.errors import RankLost
from saetrain.launch import worth_saying

BEAT_S = 1.0
SILENT_S = 20.0
"""Seconds without a beat after which a rank is given up."""
BROKEN_S = 4.0
"""The same where a collective has broken already, so that somebody must be gone."""
HELD_S = 5.0
"""A gap between two looks after which this process itself was held, and the others' silence means nothing."""
CLOSING_S = 5.0
"""Seconds that the logs get to close before the process ends."""
FAILED = "failed"


class Watch:
    """This rank's beats, and its look at the others'. ``store`` is a connection of its own to the common store."""

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self._store, self._rank, self._world = store, rank, world
        self._count, self._phase, self._where = 0, "starting", ""
        self._seen: dict[int, tuple[int, float]] = {}
        self._phases: dict[int, str] = {}
        self._posted: dict[str, Any] | None = None
        self._answered = time.monotonic()
        self._ended = threading.Event()
        self._explaining_until = 0.0
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self.closing: Callable[[], None] | None = None
        """Called before the process is ended from here: closes the logs."""
        self._beat()

    def start(self) -> None:
        """Begin to beat and to look; every rank has made its first beat by then."""
        self._answered = time.monotonic()
        for loop in (self._beating, self._looking):
            self._threads.append(threading.Thread(target=loop, name=f"watch{loop.__name__}", daemon=True))
            self._threads[-1].start()

    def enter(self, phase: str) -> str:
        """What this rank is doing now, for the others' messages; gives what it was doing before."""
        before, self._phase = self._phase, phase
        return before

    def at(self, where: str) -> None:
        """How far this rank is, such as ``step 12``."""
        self._where = where

    def post(self, message: str, code: int) -> bool:
        """Leave this rank's error for the others; False where another rank's is there already."""
        # What the others do about it must not overtake what this rank still closes.
        self._explaining_until = time.monotonic() + 3 * CLOSING_S
        mine = json.dumps({"rank": self._rank, "phase": self.doing(), "message": message, "code": code})
        with contextlib.suppress(RuntimeError):
            first = self._store.compare_set(FAILED, "", mine).decode() == mine
            self._beat()
            return bool(first)
        return True

    def end(self) -> None:
        """This rank leaves in order; nobody waits for its beats any more."""
        self._ended.set()
        # A thread inside the store's code would be torn down with it at the interpreter's end.
        for thread in self._threads:
            thread.join(CLOSING_S)
        self._phase = "done"
        with contextlib.suppress(RuntimeError):
            self._beat()

    def doing(self) -> str:
        """Phase and place of this rank."""
        return f"{self._phase}, {self._where}" if self._where else self._phase

    def explain(self, error: BaseException) -> RankLost:
        """Why a collective broke: which rank has failed or gone, as far as that can be found out."""
        found = self.find(BROKEN_S, 3 * BROKEN_S)
        return found or RankLost(
            f"the exchange between the processes broke in {self.doing()}: {str(error).splitlines()[0]}", 1
        )

    def find(self, silence: float, patience: float) -> RankLost | None:
        """The rank that has failed, or been silent for so long, as soon as it is known; None when patience ends."""
        until = time.monotonic() + patience
        # The main thread, which now knows, ends the run in better order; but not for ever.
        self._explaining_until = until + 3 * CLOSING_S
        while time.monotonic() < until:
            found = self._lost(silence)
            if found is not None:
                return found
            time.sleep(BEAT_S / 4)
        return None

    def _beat(self) -> None:
        """Write one beat."""
        self._count += 1
        beat = {"count": self._count, "phase": self.doing(), "done": self._phase == "done"}
        self._store.set(f"beat{self._rank}", json.dumps(beat))

    def _beating(self) -> None:
        others = [number for number in range(self._world) if number != self._rank]
        while not self._ended.wait(BEAT_S):
            # A store that does not answer shows in the time of its last answer.
            with contextlib.suppress(RuntimeError):
                self._beat()
                if self._store.check([FAILED]):
                    self._posted = json.loads(self._store.get(FAILED))
                beats = self._store.multi_get([f"beat{number}" for number in others])
                for number, text in zip(others, beats, strict=True):
                    self._note(number, json.loads(text))
                self._answered = time.monotonic()

    def _note(self, number: int, beat: dict[str, Any]) -> None:
        with self._lock:
            count, _ = self._seen.get(number, (0, 0.0))
            self._phases[number] = beat["phase"]
            if beat["done"]:
                self._seen[number] = beat["count"], float("inf")
            elif beat["count"] != count:
                self._seen[number] = beat["count"], time.monotonic()

    def _looking(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(BEAT_S / 4):
            now = time.monotonic()
            if now - last > HELD_S:
                self._answered = now
                with self._lock:
                    self._seen = {number: (count, max(at, now)) for number, (count, at) in self._seen.items()}
            last = now
            found = self._lost(SILENT_S)
            if found is not None and now > self._explaining_until:
                self._end_process(found)

    def _lost(self, silence: float) -> RankLost | None:
        """The rank that failed, or has been silent for so many seconds."""
        posted, now = self._posted, time.monotonic()
        if posted is not None and posted["rank"] != self._rank:
            return RankLost(f"rank {posted['rank']} failed in {posted['phase']}: {posted['message']}", posted["code"])
        with self._lock:
            seen = sorted(self._seen.items())
        for number, (_, at) in seen:
            if now - at > silence:
                return RankLost(
                    f"rank {number} has not answered for {now - at:.0f} s and is given up (killed, stopped, or cut "
                    f"off); its last phase was {self._phases[number]}",
                    1,
                )
        if now - self._answered > silence:
            return RankLost(f"the host of rank 0 has not answered for {now - self._answered:.0f} s", 1)
        return None

    def _end_process(self, found: RankLost) -> None:
        if worth_saying(found):
            print(f"saetrain: rank {self._rank}: error: {found}", file=sys.stderr, flush=True)
        if self.closing is not None:
            closer = threading.Thread(target=self.closing, daemon=True)
            closer.start()
            closer.join(CLOSING_S)
        os._exit(found.exit_code)
