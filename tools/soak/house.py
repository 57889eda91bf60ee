"""The service under test, as an operator runs it: started, killed, started again on the same ports and data. Knows no
tenant."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from bench.subject import Sizes, write_checkpoint
from tools.soak.processes import children, command_of, is_alive

SIZES = Sizes(hidden=128, layers=2, ffn=192, heads=4, kv_heads=2, vocabulary=512, positions=512, r=4)
BASE_NAME = "soaked"
MAX_WAITING = 64
START_SECONDS = 600.0
ORPHAN_SECONDS = 20.0
"""For the engine's process to notice that the service is gone."""
ENGINE_MODULE = "service.engine_main"
SERVICE = "from service.cli import main; main()"


class HouseError(Exception):
    """The service does not start or does not end; the message says where its log is."""


@dataclass
class House:
    """`directory` holds data, temporary files, base and log, all of this run alone."""

    directory: Path
    program: str = SERVICE
    admin_key: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.port, self.ops_port = _free_ports(2)
        self.url, self.ops_url = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{self.ops_port}"
        self.data_dir, self.temporary = self.directory / "data", self.directory / "tmp"
        self.data_dir.mkdir()
        self.temporary.mkdir()
        write_checkpoint(self.directory / "base", SIZES)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def engine_pid(self) -> int | None:
        found = [pid for pid in children(self.pid) if ENGINE_MODULE in command_of(pid) and is_alive(pid)]
        return found[-1] if found else None

    async def start(self) -> None:
        """Returns when it is ready. Raises HouseError."""
        command = [sys.executable, "-c", self.program, "serve"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--ops-port", str(self.ops_port)]
        command += ["--base", str(self.directory / "base"), "--base-name", BASE_NAME, "--quantization", "none"]
        command += ["--data-dir", str(self.data_dir), "--kv-cache-bytes", "32MiB", "--max-num-seqs", "16"]
        command += ["--max-waiting", str(MAX_WAITING), "--max-host-adapters", "64", "--max-lora-slots", "8"]
        command += ["--training-jobs", "2", "--lease-seconds", "5", "--log-format", "json"]
        kept = {name: value for name, value in os.environ.items() if not name.startswith("ROOTSTOCK_")}
        added = {"ROOTSTOCK_ADMIN_KEY": self.admin_key, "TMPDIR": str(self.temporary), "HF_HUB_OFFLINE": "1"}
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(command, env={**kept, **added}, stdout=log, stderr=log)
        await self.until_ready()

    async def until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not await self.is_ready():
            assert self.process is not None
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise HouseError(f"the service is not ready; its log is {self.directory / 'log'}")
            await asyncio.sleep(0.1)

    async def is_ready(self) -> bool:
        try:
            async with httpx.AsyncClient(trust_env=False) as client:
                return (await client.get(f"{self.ops_url}/readyz", timeout=5)).is_success
        except httpx.TransportError:
            return False

    async def kill(self) -> bool:
        """SIGKILL to the service alone; whether its engine noticed and went, too."""
        engine = self.engine_pid
        assert self.process is not None
        self.process.kill()
        await asyncio.to_thread(self.process.wait)
        deadline = time.monotonic() + ORPHAN_SECONDS
        while engine is not None and is_alive(engine):
            if time.monotonic() > deadline:
                os.kill(engine, signal.SIGKILL)
                return False
            await asyncio.sleep(0.1)
        return True

    async def kill_engine(self) -> None:
        """SIGKILL to the engine's process; returns when another one has taken its place and is ready."""
        engine = self.engine_pid
        assert engine is not None
        os.kill(engine, signal.SIGKILL)
        deadline = time.monotonic() + START_SECONDS
        while self.engine_pid in (None, engine) or not await self.is_ready():
            if time.monotonic() > deadline:
                raise HouseError(f"the engine did not come back; the log is {self.directory / 'log'}")
            await asyncio.sleep(0.1)

    async def stop(self) -> int:
        """SIGTERM; its exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return await asyncio.to_thread(self.process.wait, 60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    async def gauges(self) -> dict[str, float]:
        """What a scrape shows, series without labels and with, by their text."""
        async with httpx.AsyncClient(trust_env=False) as client:
            text = (await client.get(f"{self.ops_url}/metrics", timeout=10)).text
        found = re.findall(r"^(\w+(?:\{[^}]*\})?) ([^\s]+)", text, re.MULTILINE)
        return {name: float(value) for name, value in found}


def _free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [int(listening.getsockname()[1]) for listening in sockets]
    for listening in sockets:
        listening.close()
    return ports
