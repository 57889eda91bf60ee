"""Runs the two ports in one process, and ends them gracefully. Knows no route.

SIGTERM or SIGINT: /readyz turns 503, no new connection is taken, running answers may finish for
`drain_seconds`, then training checkpoints and everything stops. A second signal does not wait.
"""

from __future__ import annotations

import asyncio
import importlib
import secrets
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import structlog
import uvicorn
from pydantic import SecretStr

from service.api.ops import create_ops_app
from service.config import Settings, SettingsError
from service.engine.engine_process import EngineProcess
from service.health import Health
from service.loop_lag import watching_loop_lag
from service.memory_limit import memory_limit_bytes
from service.metrics import Metrics

log = structlog.get_logger("service.server")


class _Server(uvicorn.Server):
    """Two of them share one process, so neither may take its signals."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(settings: Settings) -> None:
    """Serve until a signal comes. Raises SettingsError when a port is taken, and what `open_services` raises."""
    api_socket = _listen(settings.host, settings.port, "port")
    ops_socket = _listen(settings.host, settings.ops_port, "ops_port")
    with asyncio.Runner(loop_factory=uvicorn.Config("", log_config=None).get_loop_factory()) as runner:
        runner.run(_serve(settings, api_socket, ops_socket))


async def _serve(settings: Settings, api_socket: socket.socket, ops_socket: socket.socket) -> None:
    metrics = Metrics(router_aliases=settings.router_aliases)
    health = Health(settings.stall_seconds)
    metrics.watch_process(lambda: health.not_ready() is None, memory_limit_bytes())
    ops = _server(create_ops_app(metrics, health), 0.0)
    ops_task = asyncio.create_task(ops.serve([ops_socket]))
    try:
        engine_process = EngineProcess(settings) if settings.engine_process else None
        await asyncio.to_thread(importlib.import_module, "service.app")  # torch: seconds, /livez answers meanwhile
        from service.app import create_app, open_services

        opening = open_services(settings, metrics, _admin_key(settings), engine_process)
        services = await asyncio.to_thread(opening.__enter__)
        try:
            health.watch(services.engine)
            api = _server(create_app(services), settings.drain_seconds)
            _on_signal(api, health)
            checking = asyncio.create_task(health.keep_checking())
            _announce(settings, services.base.name, api_socket, ops_socket)
            async with watching_loop_lag(metrics.loop_lagged):
                await api.serve([api_socket])
            checking.cancel()
        finally:
            health.drain()
            await asyncio.to_thread(opening.__exit__, None, None, None)
    finally:
        ops.should_exit = True
        await ops_task
    log.info("service_stopped")


def _server(app: Any, drain_seconds: float) -> _Server:
    return _Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=max(1, round(drain_seconds)),
        )
    )


def _on_signal(api: _Server, health: Health) -> None:
    def stop() -> None:
        log.info("service_draining", again=api.should_exit)
        health.drain()
        api.force_exit = api.should_exit
        api.should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)


def _listen(host: str, port: int, setting: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise SettingsError(f"{setting}: cannot listen on {host}:{port}: {error.strerror}") from None


def _admin_key(settings: Settings) -> SecretStr:
    """The operator's, or one for this run, which is shown this once (on the terminal, not in the log)."""
    if settings.admin_key is not None:
        return settings.admin_key
    key = f"rs-admin-{secrets.token_urlsafe(32)}"
    print(f"Admin key of this run (ROOTSTOCK_ADMIN_KEY sets your own): {key}", file=sys.stderr, flush=True)
    return SecretStr(key)


def _announce(settings: Settings, base: str, api_socket: socket.socket, ops_socket: socket.socket) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    api_port, ops_port = api_socket.getsockname()[1], ops_socket.getsockname()[1]
    log.info("service_started", base=base, data_dir=str(settings.data_dir))
    print(f"Rootstock serves {base}: API http://{host}:{api_port}/v1, operations http://{host}:{ops_port}", flush=True)
