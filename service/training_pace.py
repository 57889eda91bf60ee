"""How much training may run while answers are being written, so that they keep to a latency target.

Pure arithmetic on the times of decode steps. Knows no clock, no thread and no training.

The answer is a ratio: of the time in which somebody waits for a token, the share in which training may run. It moves
on evidence only: down as soon as two steps among at most BATCH were slower than the target (their 99th percentile
then is, too), up after BATCH steps whose 99th percentile leaves room, and not at all in the band between. Each move is
a factor exp(± step); the step grows while moves go the same way and halves when they turn (Rprop, Riedmiller and Braun
1993), so a new load is met within some seconds and nothing swings for long, however steep latency's answer is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from math import exp
from statistics import quantiles

BATCH = 100
ALLOWED_SLOW = 1
"""Of BATCH steps; one more, and their 99th percentile is beyond the target."""

ROOM = 0.9
"""A 99th percentile below this share of the target leaves room for more training."""

FLOOR = 0.1
"""Training's share where even that misses the target: a job must end some day."""

SETTLING_STEPS = 2
"""Steps after a move that still saw the ratio before it."""

FIRST_STEP, LEAST_STEP, MOST_STEP = 0.35, 0.05, 0.7
GROWTH, REVERSAL = 1.5, 0.5
RECENT = 500


@dataclass(frozen=True)
class PaceLimits:
    """`target_seconds` between two tokens at the 99th percentile (None: no target); `share` is training's at most."""

    target_seconds: float | None
    share: float = 1.0

    @property
    def hold_nothing(self) -> bool:
        """Priorities alone arbitrate."""
        return self.target_seconds is None and self.share >= 1.0


class TrainingPace:
    """`ratio` now, from the decode steps observed so far."""

    def __init__(self, limits: PaceLimits) -> None:
        self._target = limits.target_seconds
        self._most = limits.share
        self._least = min(FLOOR, limits.share) if limits.target_seconds is not None else limits.share
        self.ratio = self._most
        self._step, self._direction = FIRST_STEP, 0
        self._batch: list[float] = []
        self._num_slow = self._num_settling = 0
        self._recent: deque[float] = deque(maxlen=RECENT)

    @property
    def p99_seconds(self) -> float | None:
        """Of the last RECENT decode steps; None while there are fewer than two."""
        if len(self._recent) < 2:
            return None
        return quantiles(self._recent, n=100, method="inclusive")[98]

    def observe(self, step_seconds: Iterable[float]) -> None:
        """Take in decode steps, in their order, and move the ratio where they say so."""
        for seconds in step_seconds:
            self._recent.append(seconds)
            if self._target is not None:
                self._judge(seconds, self._target)

    def _judge(self, seconds: float, target: float) -> None:
        if self._num_settling:
            self._num_settling -= 1
            return
        self._batch.append(seconds)
        self._num_slow += seconds > target
        if self._num_slow > ALLOWED_SLOW:
            self._move(-1)
        elif len(self._batch) == BATCH:
            has_room = sorted(self._batch)[-1 - ALLOWED_SLOW] <= ROOM * target
            self._move(1 if has_room else 0)

    def _move(self, direction: int) -> None:
        self._batch.clear()
        self._num_slow = 0
        if direction == 0:
            return
        if direction == self._direction:
            self._step = min(MOST_STEP, GROWTH * self._step)
        elif self._direction != 0:
            self._step = max(LEAST_STEP, REVERSAL * self._step)
        self._direction = direction
        self.ratio = min(self._most, max(self._least, self.ratio * exp(direction * self._step)))
        self._num_settling = SETTLING_STEPS
