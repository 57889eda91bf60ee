"""A `rootstock serve` of the demo's own: temporary data, free ports, stopped at the end. Knows no tenant."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

START_SECONDS = 180.0
STOP_SECONDS = 30.0


class ServerError(Exception):
    """The service did not start, or did not stop, as it should; the message ends with its log."""


@dataclass(frozen=True)
class Server:
    """Where the running service is reached."""

    url: str
    ops_url: str
    admin_key: str


@asynccontextmanager
async def running_server(*options: str) -> AsyncIterator[Server]:
    """A ready service on the bundled base; stopped with SIGTERM afterwards. `options` are further ones of `rootstock
    serve`. Raises ServerError."""
    with TemporaryDirectory(prefix="rootstock-demo-") as directory:
        log = Path(directory) / "server.log"
        port, ops_port = _free_ports(2)
        server = Server(f"http://127.0.0.1:{port}", f"http://127.0.0.1:{ops_port}", secrets.token_urlsafe(24))
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *(str(Path(sys.executable).with_name("rootstock")), "serve", "--host", "127.0.0.1"),
                *("--port", str(port), "--ops-port", str(ops_port), "--data-dir", str(Path(directory) / "data")),
                *options,
                env={**_environment(), "ROOTSTOCK_ADMIN_KEY": server.admin_key},
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
            )
        try:
            await _wait_until_ready(server, process, log)
            yield server
        except BaseException:
            await _stop(process)
            raise
        status = await _stop(process)
        if status != 0:
            raise ServerError(f"rootstock serve ended with status {status}\n{_tail(log)}")


def _environment() -> dict[str, str]:
    """Ours, without settings meant for another service."""
    return {name: value for name, value in os.environ.items() if not name.startswith("ROOTSTOCK_")}


def _free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [int(listening.getsockname()[1]) for listening in sockets]
    for listening in sockets:
        listening.close()
    return ports


async def _wait_until_ready(server: Server, process: asyncio.subprocess.Process, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    async with httpx.AsyncClient(base_url=server.ops_url, trust_env=False) as client:
        while time.monotonic() < deadline:
            if process.returncode is not None:
                raise ServerError(f"rootstock serve ended with status {process.returncode}\n{_tail(log)}")
            try:
                if (await client.get("/readyz", timeout=2.0)).is_success:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            await asyncio.sleep(0.2)
    raise ServerError(f"rootstock serve was not ready after {START_SECONDS:.0f} s\n{_tail(log)}")


async def _stop(process: asyncio.subprocess.Process) -> int:
    """End it, by force if it does not go; its exit status."""
    if process.returncode is None:
        process.send_signal(signal.SIGTERM)
    try:
        return await asyncio.wait_for(process.wait(), STOP_SECONDS)
    except TimeoutError:
        process.kill()
        return await process.wait()


def _tail(log: Path, num_lines: int = 30) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-num_lines:])
