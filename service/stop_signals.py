"""SIGTERM and SIGINT, taken for the whole process: the first asks to stop, the next not to wait. Knows nothing else."""

from __future__ import annotations

import asyncio
import os
import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def end_at_once_on_signal() -> None:
    """Until somebody else takes the signals: nothing has been opened yet, so there is nothing to close."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: os._exit(0))


class StopSignals:
    """Belongs to the running event loop."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.hastened = asyncio.Event()

    def take(self) -> None:
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self.receive)

    def receive(self) -> None:
        (self.hastened if self.asked.is_set() else self.asked).set()
