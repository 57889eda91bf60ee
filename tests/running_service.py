"""Starts `rootstock serve` as a real process for tests that have to kill it, drain it or look at it from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from socket import create_server

import httpx
import openai

ADMIN_KEY = "the-administrators-own-key"


@dataclass(frozen=True)
class Running:
    """A serving process."""

    process: subprocess.Popen[bytes]
    url: str
    ops_url: str

    def ready(self) -> bool:
        return self.probe("readyz") == 200

    def probe(self, name: str) -> int | None:
        """The status of a probe; None while nobody listens."""
        try:
            return httpx.get(f"{self.ops_url}/{name}", timeout=30).status_code
        except httpx.TransportError:
            return None

    def wait_until(self, condition: Callable[[], object], seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it never happened"
            time.sleep(0.02)

    def client(self, tenant: str = "acme") -> openai.OpenAI:
        """The client of a new tenant."""
        made = httpx.post(
            f"{self.url}/v1/admin/tenants", json={"name": tenant}, headers={"authorization": f"Bearer {ADMIN_KEY}"}
        )
        return self.client_with(made.raise_for_status().json()["api_key"])

    def client_with(self, key: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, _strict_response_validation=True)


@contextmanager
def rootstock_serve(base: Path, data_dir: Path, *, wait: bool = True, **settings: object) -> Iterator[Running]:
    """A service on free ports until the block ends, then killed. `settings` are further flags; without `wait` it has
    only just been started."""
    port, ops_port = _free_port(), _free_port()
    command = [sys.executable, "-c", "from service.cli import main; main()", "serve"]
    options: dict[str, object] = {
        "port": port,
        "ops-port": ops_port,
        "base": base,
        "data-dir": data_dir,
        "log-format": "json",
    }
    options |= {name.replace("_", "-"): value for name, value in settings.items() if not isinstance(value, bool)}
    flags = [f"--{name}={value}" for name, value in options.items()]
    flags += [
        f"--{'' if on else 'no-'}{name.replace('_', '-')}" for name, on in settings.items() if isinstance(on, bool)
    ]
    environment = {**os.environ, "ROOTSTOCK_ADMIN_KEY": ADMIN_KEY, "OMP_NUM_THREADS": "1"}
    with (data_dir / "log").open("ab") as log:
        process = subprocess.Popen([*command, *flags], env=environment, stdout=log, stderr=log)
    running = Running(process, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{ops_port}")
    try:
        deadline = time.monotonic() + 120
        while wait and not running.ready():
            assert process.poll() is None and time.monotonic() < deadline, (data_dir / "log").read_text()
            time.sleep(0.1)
        yield running
    finally:
        process.kill()
        process.wait()


def _free_port() -> int:
    with create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port
