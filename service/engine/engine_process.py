"""The operating system's side of an engine in its own process: start it, talk to it, see it end. Knows no message.

Importing this loads no library: the process is started before this one has imported its own.
"""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
from multiprocessing.connection import Connection

from service.engine.line import Line

logger = logging.getLogger(__name__)


ENGINE_MAIN = "service.engine_main"
"""The module that it runs."""


class EngineProcess:
    """A fresh interpreter, not a fork: threads, event loops and CUDA do not survive one."""

    def __init__(self, orders: object) -> None:
        """Run `python -m service.engine_main FD`; `orders` is the first message there."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", ENGINE_MAIN, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # the parent's is the operator's; complaints go to the log on stderr
            )
        self.line = Line(Connection(ours.detach()))
        self.line.send(orders)

    @property
    def pid(self) -> int:
        return self._process.pid

    def join(self, timeout_seconds: float) -> None:
        """Wait until it has ended; kill it when it takes longer."""
        try:
            self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()
        self.line.close()

    def kill(self) -> None:
        """Whoever receives from it notices; no effect once it has ended."""
        if not self.ended:
            logger.warning("engine_process.killed", extra={"pid": self.pid})
            self._process.kill()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def describe_end(self) -> str:
        code = self._process.poll()
        if code is None:
            return "it does not answer"
        return f"killed by signal {-code}" if code < 0 else f"exit status {code}"
