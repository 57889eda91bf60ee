"""A service whose API leaks memory, handles, threads and temporary files: a soak has to find it. For soaks only."""

from __future__ import annotations

import socket
import tempfile
import threading
import time
from pathlib import Path

PROGRAM = "from tools.soak.planted import main; main()"
PERIOD_SECONDS = 0.1
LEAKED_BYTES = 256 * 1024
"""Ten times a second: 150 MiB a minute."""


def leak(until: threading.Event) -> None:
    """A bit of everything, again and again."""
    memory, sockets = [], []
    while not until.wait(PERIOD_SECONDS):
        memory.append(bytearray(b"x" * LEAKED_BYTES))
        sockets.append(socket.socket())
        threading.Thread(target=time.sleep, args=(3600,), daemon=True).start()
        Path(tempfile.mkstemp(prefix="planted-")[1]).write_text("left")


def main() -> None:
    from service.cli import main as serve

    threading.Thread(target=leak, args=(threading.Event(),), daemon=True).start()
    serve()
