"""Where training may be held for a moment: at every adapted layer, forward and backward. Knows not why it is held.

Whoever trains beside something more urgent installs a pause; a whole forward and backward takes too long to wait for.
Waiting changes no bit of the result, which cutting the work into smaller pieces would.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Pause = Callable[[], None]

_current = threading.local()


def current_pause() -> Pause | None:
    """What this thread calls between two layers of what it trains."""
    pause: Pause | None = getattr(_current, "pause", None)
    return pause


@contextmanager
def pausing(pause: Pause | None) -> Iterator[None]:
    """Inside the block this thread's training calls `pause` between layers; it may wait there and must not raise."""
    before = current_pause()
    _current.pause = pause
    try:
        yield
    finally:
        _current.pause = before
