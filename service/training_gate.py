"""Holds the training thread back while answers are being written, as long as the pace says. Knows no job and no tensor.

It is asked between two layers, so training runs in bursts of milliseconds: for each moment that it ran while somebody
waited for a token it then waits in proportion, and not a moment longer once nobody does. Only waiting steers, never the
size of a piece of work: other pieces would add up in another order and end in other bits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from service.heartbeat import StopRequested
from service.training_pace import TrainingPace

POLL_SECONDS = 0.005
"""How late an idle engine or a stop is noticed."""

SHORTEST_HOLD_SECONDS, LONGEST_HOLD_SECONDS = 0.005, 1.0
"""Less is owed until it adds up: every wait costs training its warm threads."""

REPORT_SECONDS = 1.0


class PaceObserver(Protocol):
    """Who counts."""

    def training_paced(self, ratio: float, p99_seconds: float | None, held_seconds: float) -> None:
        """The share of serving time that training gets, the decode steps' p99, and for how long it was held since
        the last call."""


class TrainingGate:
    """One training thread passes here, again and again. Threads that train together have a gate each, of one pace."""

    def __init__(
        self,
        pace: TrainingPace,
        *,
        is_serving: Callable[[], bool],
        step_seconds: Callable[[], list[float]],
        observer: PaceObserver,
        drain: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        work_clock: Callable[[], float] | None = None,
        sleep: Callable[[float], None] = time.sleep,
        lock: threading.Lock | None = None,
    ) -> None:
        """`step_seconds` returns the decode steps since its last call. `drain` waits until the device has done what
        training gave it: time is told only then. `work_clock` tells how long training ran, as `clock` does unless
        the device knows better. `lock` guards a pace that several gates share."""
        self._pace = pace
        self._is_serving = is_serving
        self._step_seconds = step_seconds
        self._observer = observer
        self._drain = drain
        self._clock = clock
        self._sleep = sleep
        self._lock = lock or threading.Lock()
        self._work_clock = work_clock or clock
        self._resumed_at, self._reported_at = self._work_clock(), clock()
        self._owed = self._held = 0.0

    def hold(self, check: Callable[[], None]) -> None:
        """Wait as long as training owes. When `check` raises StopRequested, return at once: it is called again
        between two pieces of work, where stopping does no harm."""
        with self._lock:
            self._pace.observe(self._step_seconds())
        if self._is_serving() and self._pace.ratio < 1.0:
            self._drain()
            self._owe(max(0.0, self._work_clock() - self._resumed_at))
            if self._owed >= SHORTEST_HOLD_SECONDS:
                self._wait(check)
        else:
            self._owed = 0.0
        self._resumed_at = self._work_clock()
        self._report()

    def _owe(self, worked: float) -> None:
        ratio = self._pace.ratio
        owed = worked * (1.0 / ratio - 1.0) if ratio > 0 else float("inf")
        longest = LONGEST_HOLD_SECONDS if ratio > 0 else float("inf")
        self._owed = min(self._owed + owed, longest)

    def _wait(self, check: Callable[[], None]) -> None:
        now = self._clock()
        until = now + self._owed
        while now < until and self._is_serving() and not _stops(check):
            self._sleep(min(until - now, POLL_SECONDS))
            before, now = now, self._clock()
            self._held += now - before
            self._report()
        self._owed = max(-LONGEST_HOLD_SECONDS, min(0.0, until - now))  # a thread of low priority wakes late

    def _report(self) -> None:
        now = self._clock()
        if now - self._reported_at >= REPORT_SECONDS:
            held, self._held = self._held, 0.0
            self._reported_at = now
            self._observer.training_paced(self._pace.ratio, self._pace.p99_seconds, held)


def _stops(check: Callable[[], None]) -> bool:
    try:
        check()
    except StopRequested:
        return True
    return False
