"""When crashes are too many: an engine that keeps crashing must end, so that its process is restarted."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable


class CrashLimit:
    """At most `max_crashes` within `window_seconds`."""

    def __init__(self, max_crashes: int, window_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_crashes = max_crashes
        self.window_seconds = window_seconds
        self._clock = clock
        self._times: deque[float] = deque()

    def exceeded_by_another(self) -> bool:
        """Count a crash; True when it is one too many."""
        now = self._clock()
        self._times.append(now)
        while now - self._times[0] > self.window_seconds:
            self._times.popleft()
        return len(self._times) > self.max_crashes
