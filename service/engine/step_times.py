"""How long the last decode steps took, for one who watches. Knows not what for."""

from __future__ import annotations

from collections import deque

CAPACITY = 1024


class StepTimes:
    """Seconds between two tokens of whoever decoded, one value per step that computed no prompt.

    The engine's thread adds, one other thread takes; what nobody takes is forgotten.
    """

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=CAPACITY)

    def add(self, seconds: float) -> None:
        self._seconds.append(seconds)

    def take(self) -> list[float]:
        """Those since the last call, oldest first."""
        taken = []
        while True:
            try:
                taken.append(self._seconds.popleft())
            except IndexError:
                return taken
