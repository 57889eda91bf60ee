"""Trains in a thread of the priority the service gives its own, whenever it is told to. Knows no engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from adapters.pausing import Pause, pausing
from adapters.thread_priority import lower_priority
from adapters.trainer import Trainer
from service import tuning_worker


class Learner:
    """`start` and `stop` it as often as you like; `close` it once."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._changed = threading.Condition()
        self._wanted = self._working = self._ending = False
        self._pause: Pause | None = None
        self._around: AbstractContextManager[object] = nullcontext()
        self._started_at = 0.0
        self._steps: list[tuple[float, int]] = []  # when it was done, its tokens
        self._thread = threading.Thread(target=self._loop, name="training", daemon=True)
        self._thread.start()

    @property
    def num_steps(self) -> int:
        """Done since the last `start`."""
        return len(self._steps)

    def start(self, pause: Pause | None = None, around: AbstractContextManager[object] | None = None) -> None:
        """`pause` is called between layers; `around` is entered anew for every step."""
        with self._changed:
            self._pause, self._around = pause, around or nullcontext()
            self._steps = []
            self._started_at = time.perf_counter()
            self._wanted = True
            self._changed.notify_all()

    def stop(self) -> float:
        """Tokens per second over the steps done by now; the one under way is waited for and not counted."""
        with self._changed:
            self._wanted = False
            done = list(self._steps)
            self._changed.wait_for(lambda: not self._working)
        return sum(num_tokens for _, num_tokens in done) / (done[-1][0] - self._started_at) if done else 0.0

    def close(self) -> None:
        with self._changed:
            self._ending = True
            self._changed.notify_all()
        self._thread.join()

    def _loop(self) -> None:
        # The service's own way of standing back, not a copy of it.
        lower_priority()
        with tuning_worker.background_stream(self._trainer.device):
            while self._may_go_on():
                with pausing(self._pause), self._around:
                    result = self._trainer.step()
                self._steps.append((time.perf_counter(), result.num_tokens))

    def _may_go_on(self) -> bool:
        """Wait until training is wanted; False when it never will be again."""
        with self._changed:
            self._working = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._wanted or self._ending)
            self._working = not self._ending
            return self._working


@contextmanager
def learning(trainer: Trainer) -> Iterator[Learner]:
    learner = Learner(trainer)
    try:
        yield learner
    finally:
        learner.stop()
        learner.close()
