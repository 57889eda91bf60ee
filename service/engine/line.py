"""One end of a socket between two processes that run the same code: pickled values, whole. Knows no message."""

from __future__ import annotations

import pickle
import threading
from multiprocessing.connection import Connection
from typing import Any


class Line:
    """Any thread may send; one receives."""

    def __init__(self, connection: Connection[Any, Any]) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, message: object) -> None:
        """Raises OSError when the other side is gone."""
        data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        with self._lock:
            self._connection.send_bytes(data)

    def receive(self) -> Any:
        """The next message. Raises EOFError or OSError when the other side is gone."""
        return pickle.loads(self._connection.recv_bytes())  # from our own code in a process that we started

    def close(self) -> None:
        self._connection.close()
