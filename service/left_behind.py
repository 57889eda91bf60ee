"""Work in threads that the process may have to end without. Knows not what work.

A daemon thread that comes back from C++ while the interpreter shuts down can abort the process, so who leaves one
behind ends by `os._exit`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")

OURS = ("loading", "engine", "tuning", "merging")
"""The names of the threads that compute."""


def in_daemon_thread(work: Callable[[], T], name: str) -> asyncio.Future[T]:
    """The result of `work`. Neither the event loop's end nor the interpreter's waits for it, as both do for an
    executor's."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def finish(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(result)  # type: ignore[arg-type]  # T may be None
        else:
            future.set_exception(error)

    def run() -> None:
        result, failure = None, None
        try:
            result = work()
        except BaseException as error:
            failure = error
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(finish, result, failure)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def threads_left_behind() -> list[str]:
    """The names of those that still run."""
    return [thread.name for thread in threading.enumerate() if thread.name in OURS]
