"""Runs the two ports in one process, and ends them gracefully. Knows no route.

SIGTERM or SIGINT: /readyz turns 503, new requests are refused with a 503, running answers may finish for
`drain_seconds` while jobs save their states, then everything stops. A second signal does not wait for answers. At any
time, while the base is loaded too, the process ends with status 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog
import uvicorn
from pydantic import SecretStr

from service.api.ops import create_ops_app
from service.config import Settings, SettingsError
from service.drain import Drain
from service.engine.engine_process import EngineProcess
from service.health import Health
from service.http_protocol import BoundedHttp
from service.left_behind import in_daemon_thread, threads_left_behind
from service.loop_lag import watching_loop_lag
from service.memory_limit import memory_limit_bytes
from service.metrics import Metrics
from service.stop_signals import StopSignals
from service.tracing.configuration import open_traces

if TYPE_CHECKING:
    from service.api.services import Services
    from service.tracing.traces import Traces

log = structlog.get_logger("service.server")

LAST_BYTES_SECONDS = 2
"""For what has been written to reach its client, once nothing more is computed."""
ABANDON_SECONDS = 5.0
"""For a service that is still being opened when it shall end."""


class _Server(uvicorn.Server):
    """Two of them share one process, so neither may take its signals."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(settings: Settings) -> None:
    """Serve until a signal comes. Raises SettingsError when a port is taken, and what `open_services` raises."""
    traces = open_traces(settings, "api")
    api_socket = _listen(settings.host, settings.port, "port")
    ops_socket = _listen(settings.host, settings.ops_port, "ops_port")
    with (
        contextlib.nullcontext() if traces is None else contextlib.closing(traces),
        asyncio.Runner(loop_factory=uvicorn.Config("", log_config=None).get_loop_factory()) as runner,
    ):
        runner.run(_serve(settings, traces, api_socket, ops_socket))
    left = threads_left_behind()
    log.info("service_stopped", left_behind=left)
    if left:
        logging.shutdown()
        os._exit(0)


async def _serve(
    settings: Settings, traces: Traces | None, api_socket: socket.socket, ops_socket: socket.socket
) -> None:
    signals = StopSignals()
    signals.take()
    metrics = Metrics(router_aliases=settings.router_aliases)
    health = Health(settings.stall_seconds)
    metrics.watch_process(lambda: health.not_ready() is None, memory_limit_bytes())
    ops = _server(create_ops_app(metrics, health))
    ops_task = asyncio.create_task(ops.serve([ops_socket]))
    try:
        engine_process = EngineProcess(settings) if settings.engine_process else None
        opening = in_daemon_thread(lambda: _open(settings, metrics, engine_process, traces), "loading")
        if await _stopped_before(opening, signals, engine_process):
            return
        services, close = await opening
        try:
            health.watch(services.engine)
            await _answer(services, health, signals, traces, api_socket, ops_socket)
        finally:
            health.drain()
            await asyncio.to_thread(close)
    finally:
        ops.should_exit = True
        await ops_task


def _open(
    settings: Settings, metrics: Metrics, engine_process: EngineProcess | None, traces: Traces | None
) -> tuple[Services, Callable[[], object]]:
    """The services and what closes them. Takes seconds for imports alone; /livez answers meanwhile."""
    from service.app import open_services

    opened = open_services(settings, metrics, _admin_key(settings), engine_process, traces)
    return opened.__enter__(), partial(opened.__exit__, None, None, None)


async def _stopped_before(
    opening: asyncio.Future[tuple[Services, Callable[[], object]]],
    signals: StopSignals,
    engine_process: EngineProcess | None,
) -> bool:
    """Wait for `opening`; True when a signal came first. A base that is still loading is left behind."""
    asked = asyncio.create_task(signals.asked.wait())
    await asyncio.wait((opening, asked), return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    if opening.done():
        return False
    log.info("service_stopped_while_loading")
    if engine_process is not None:
        engine_process.kill()
    await asyncio.wait((opening,), timeout=ABANDON_SECONDS)
    if not opening.done():
        return True
    if opening.exception() is None:
        _, close = opening.result()
        await asyncio.to_thread(close)
    return True


async def _answer(
    services: Services,
    health: Health,
    signals: StopSignals,
    traces: Traces | None,
    api_socket: socket.socket,
    ops_socket: socket.socket,
) -> None:
    """Until asked to stop, and then for those who wait for an answer."""
    from service.app import create_app

    drain = Drain()
    api = _server(create_app(services, drain, traces))
    checking = asyncio.create_task(health.keep_checking())
    asked = asyncio.create_task(signals.asked.wait())
    async with watching_loop_lag(services.metrics.loop_lagged):
        serving = asyncio.create_task(api.serve([api_socket]))
        _announce(services.settings, services.base.name, api_socket, ops_socket)
        await asyncio.wait((serving, asked), return_when=asyncio.FIRST_COMPLETED)
        health.drain()
        drain.begin()
        log.info("service_draining", num_open=drain.num_open)
        await _drain(services, drain, signals)
        api.should_exit = True
        await serving
    checking.cancel()
    asked.cancel()


async def _drain(services: Services, drain: Drain, signals: StopSignals) -> None:
    """Until all is answered or the time is up; then running answers end with an error. Jobs save their states beside.

    A second signal says that the time is up.
    """
    seconds = services.settings.drain_seconds
    deadline = time.monotonic() + seconds
    hastened = asyncio.create_task(signals.hastened.wait())
    ending = asyncio.create_task(asyncio.to_thread(services.engine.shutdown, seconds))
    await asyncio.wait((ending, hastened), return_when=asyncio.FIRST_COMPLETED)
    if hastened.done():
        log.info("service_hastened")
        await asyncio.to_thread(services.engine.shutdown, 0.0)
    await ending
    others = asyncio.create_task(drain.wait(deadline - time.monotonic()))
    await asyncio.wait((others, hastened), return_when=asyncio.FIRST_COMPLETED)
    hastened.cancel()
    others.cancel()


def _server(app: Any) -> _Server:
    return _Server(
        uvicorn.Config(
            app,
            http=BoundedHttp,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=LAST_BYTES_SECONDS,
        )
    )


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
