"""What other threads ask of the engine, until its own thread takes it. Knows nothing of what runs.

Submissions are refused here: when their tenant has too many waiting, and when the engine is stopping.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from service.engine.errors import EngineDeadError, QueueFullError
from service.engine.response import Response
from service.engine.sequence import Sequence
from service.engine.waiting import WaitingQueue

IDLE_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Submit:
    sequence: Sequence
    response: Response


@dataclass(frozen=True)
class Abort:
    request_id: str


@dataclass(frozen=True)
class Retire:
    digest: str


@dataclass(frozen=True)
class Forget:
    """A deleted tenant. Its id is never given to another."""

    tenant: str


Command = Submit | Abort | Retire | Forget


class Intake:
    """The inbox, and the bell that wakes the engine's thread."""

    def __init__(self, *, max_waiting: int, max_num_seqs: int) -> None:
        self._max_waiting = max_waiting
        self._max_num_seqs = max_num_seqs
        self._condition = threading.Condition()
        self._inbox: deque[Command] = deque()
        self._arriving: Counter[str] = Counter()
        """Submissions in the inbox, by tenant."""
        self._woken = False
        self.num_wakes = 0
        self.draining = False
        self.stopped = False
        self._error: str | None = None

    # -- for any thread ---------------------------------------------------------------------------------------

    def submit(self, submitted: Submit, waiting: WaitingQueue) -> None:
        """Raises QueueFullError and EngineDeadError. `waiting`: those that were taken and have no seat yet."""
        tenant = submitted.sequence.request.tenant
        with self._condition:
            if self.draining or self.stopped:
                raise EngineDeadError(self._error or "the service is shutting down")
            self._check_room(tenant, waiting)
            self._inbox.append(submitted)
            self._arriving[tenant] += 1
            self._condition.notify_all()

    def post(self, command: Abort | Retire | Forget) -> None:
        with self._condition:
            if not self.stopped:
                self._inbox.append(command)
                self._condition.notify_all()

    def wake(self) -> None:
        """Something that no command tells of has changed: an adapter is there, the engine has restarted."""
        with self._condition:
            self.num_wakes += 1
            self._woken = True
            self._condition.notify_all()

    def drain(self, seconds: float, is_busy: Callable[[], bool]) -> None:
        """Take no more submissions; stop when all are answered or the time is up."""
        deadline = time.monotonic() + seconds
        with self._condition:
            self.draining = True
            while not self.stopped and (self._inbox or is_busy()) and (left := deadline - time.monotonic()) > 0:
                self._condition.wait(min(left, IDLE_POLL_SECONDS))
            self.stopped = True
            self._condition.notify_all()

    # -- for the engine's thread ------------------------------------------------------------------------------

    def wait(self, *, has_running: bool, has_work: bool, deadline: float | None) -> bool:
        """Sleep until there is something to do; False when it is time to end."""
        with self._condition:
            while not (self.stopped or self._inbox or self._woken or has_running):
                self._condition.notify_all()  # whoever drains may have waited for this
                patience = IDLE_POLL_SECONDS if deadline is None else deadline - time.monotonic()
                if not self._condition.wait(min(patience, IDLE_POLL_SECONDS)) and has_work:
                    break  # nothing should be stuck in the queue, but nobody may depend on that
            self._woken = False
            return not self.stopped

    def stay_awake(self) -> None:
        """The next `wait` returns at once."""
        self._woken = True

    def take(self, handle: Callable[[Command], None]) -> None:
        """Hand over all commands."""
        with self._condition:  # whoever drains must not find a submission neither here nor there
            while self._inbox:
                handle(self._inbox.popleft())
            self._arriving.clear()

    def close(self, error: str | None) -> list[Submit]:
        """Nothing will be taken any more; returns the submissions that had come in."""
        with self._condition:
            self.stopped, self._error = True, error
            left = [command for command in self._inbox if isinstance(command, Submit)]
            self._inbox.clear()
            self._condition.notify_all()
        return left

    def _check_room(self, tenant: str, waiting: WaitingQueue) -> None:
        """A tenant may have no more requests waiting than the queue has room for: alone it fills one half of it, two
        fill a third each, and a newcomer always finds room."""
        mine = waiting.num_waiting_of(tenant) + self._arriving[tenant]
        room = self._max_waiting - len(waiting) - self._arriving.total()
        if mine >= room:
            retry_after = self._retry_after(len(waiting))
            raise QueueFullError(f"{mine} of your requests are waiting already", retry_after=retry_after)

    def _retry_after(self, num_waiting: int) -> float:
        """A guess from how long the queue is; clients stop obeying above 120 s."""
        return min(60.0, 1.0 + num_waiting / max(1, self._max_num_seqs))
