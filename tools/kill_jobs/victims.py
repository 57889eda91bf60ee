"""Services that are forked off the nursery, killed, stopped and waited for. Knows no job."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from socket import create_server
from typing import Any

import httpx

ADMIN_KEY = "the-administrators-own-key"
REPOSITORY = Path(__file__).parents[2]


@dataclass
class Victim:
    """A running service."""

    pid: int
    url: str
    ops_url: str
    ended: threading.Event = field(default_factory=threading.Event)
    status: int | None = None
    """As `os.waitpid` tells it, once it has ended."""

    @property
    def was_killed(self) -> bool:
        return self.status is not None and os.WIFSIGNALED(self.status)

    def send(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        assert self.ended.wait(900), "a killed service did not end"

    def wait_ready(self, seconds: float = 900.0) -> bool:
        """False when it ended before."""
        deadline = time.monotonic() + seconds
        while not self.ended.is_set():
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.ops_url}/readyz", timeout=60).status_code == 200:
                    return True
            assert time.monotonic() < deadline, "a service did not become ready"
            time.sleep(0.02)
        return False

    def is_stopped(self) -> bool:
        """By SIGSTOP."""
        with suppress(FileNotFoundError):
            return Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"
        return False


class Nursery:
    """Starts services in about a second. Close it: whatever it started is killed."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tools.kill_jobs.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environment, "TOKENIZERS_PARALLELISM": "false", "ROOTSTOCK_ADMIN_KEY": ADMIN_KEY},
            cwd=REPOSITORY,
            text=True,
        )
        self._started: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._ended: dict[int, int] = {}
        self._victims: dict[int, Victim] = {}
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._started.get(timeout=900)

    def start(self, data_dir: Path, *, fault: str = "", **settings: Any) -> Victim:
        """On free ports. `fault` as in `service.fault_points`."""
        port, ops_port = free_port(), free_port()
        order = {
            "settings": {
                "port": port, "ops_port": ops_port, "data_dir": str(data_dir), "log_format": "json",
                "engine_process": False, "quantization": "none", "kv_cache_bytes": "16MiB", "lease_seconds": 2.0,
                **settings,
            },
            "environment": {"ROOTSTOCK_TEST_FAULT": fault, "TMPDIR": str(data_dir / "tmp")},
            "log": str(data_dir / "log"),
        }  # fmt: skip
        (data_dir / "tmp").mkdir(parents=True, exist_ok=True)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        victim = Victim(self._started.get(timeout=900), f"http://127.0.0.1:{port}", f"http://127.0.0.1:{ops_port}")
        with self._lock:
            self._victims[victim.pid] = victim
            if victim.pid in self._ended:
                self._end(victim.pid)
        return victim

    def close(self) -> None:
        with self._lock:
            running = [victim for victim in self._victims.values() if not victim.ended.is_set()]
        for victim in running:
            victim.kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(900)
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)
            if "ended" in said:
                with self._lock:
                    self._ended[said["ended"]] = said["status"]
                    if said["ended"] in self._victims:
                        self._end(said["ended"])
            else:
                self._started.put(said.get("started", 0))

    def _end(self, pid: int) -> None:
        self._victims[pid].status = self._ended[pid]
        self._victims[pid].ended.set()


@contextmanager
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    try:
        yield made
    finally:
        made.close()


def free_port() -> int:
    with create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port
