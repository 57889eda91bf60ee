"""The service on two real sockets: everything is real but the engine. Fixture `served`."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import cast

import httpx
import pytest
import structlog
import uvicorn
from fastapi import FastAPI
from openai import DefaultHttpxClient, OpenAI
from pydantic import SecretStr
from starlette.types import ASGIApp

from adapters.store import AdapterStore
from service.api.ops import create_ops_app
from service.api.services import Services
from service.api.tool_format import ToolFormat
from service.app import create_app
from service.archive import Archive
from service.audit import Audit
from service.config import Settings
from service.data_reports import DataReports
from service.database import connect
from service.drift import DriftWatch
from service.drift_monitors import Monitors
from service.drift_room import open_drift
from service.engine.base_model import BaseModel
from service.engine.engine import Engine
from service.engine.grammar_compiler import GrammarCompiler
from service.estimates import Estimates
from service.health import Health
from service.http_protocol import BoundedHttp
from service.job_backlog import job_backlog
from service.merges import Merges
from service.metrics import Metrics
from service.rate_limits import RateLimits
from service.retraining import Retraining
from service.retraining_data import RetrainingFiles
from service.retraining_worker import RetrainingWorker
from service.rollout import Rollout, open_rollout
from service.tenant_removal import removal_in
from service.usage_book import open_books
from service.usage_report import UsageReport
from tests.fakes import FakeEngine
from tests.service.control_fixtures import Control, make_control

ADMIN_KEY = "the-administrators-own-key"

__all__ = ["served", "shared_service"]


@dataclass(frozen=True)
class Served:
    """A running service and its insides. Tenants `acme` and `zenith` exist; see `Control` for what it can do."""

    url: str
    ops_url: str
    control: Control
    engine: FakeEngine
    metrics: Metrics
    health: Health
    rollout: Rollout
    retraining: Retraining
    proposing: RetrainingWorker
    """Does nothing by itself: tests call `work`."""
    api: FastAPI
    drift: DriftWatch | None
    closing: ExitStack
    """Closes, with the service, what its tests opened."""

    def add_merges(self, merges: Merges, base: BaseModel) -> None:
        """From now on the service takes merges, into this base."""
        self.api.state.services = replace(self.api.state.services, merges=merges, base=base)

    @property
    def operations(self) -> list[tuple[str, str]]:
        """(method, path) of everything the API answers."""
        return [(method, path) for path, methods in self.api.openapi()["paths"].items() for method in methods]

    def client(self, api_key: str | None = None, *, strict: bool = True) -> OpenAI:
        """The official client, validating every answer, and not hiding failures behind retries."""
        client = OpenAI(
            base_url=f"{self.url}/v1",
            api_key=api_key or self.control.acme_key,
            max_retries=0,
            _strict_response_validation=strict,
            http_client=DefaultHttpxClient(verify=certificates()),
        )
        self.closing.callback(client.close)
        return client

    def http(self, api_key: str | None = None) -> httpx.Client:
        headers = {"authorization": f"Bearer {api_key or self.control.acme_key}"}
        client = httpx.Client(base_url=self.url, headers=headers, timeout=30, verify=certificates())
        return self.closing.enter_context(client)

    def admin(self) -> httpx.Client:
        return self.http(ADMIN_KEY)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """For what happens on the server's side after the client has gone."""
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline, "it never happened"
            time.sleep(0.005)

    def scrape(self, accept: str = "text/plain") -> str:
        url = f"{self.ops_url}/metrics"
        return httpx.get(url, headers={"accept": accept}, verify=certificates()).raise_for_status().text


@cache
def certificates() -> ssl.SSLContext:
    """What every client would read from the disk for itself, though none here speaks TLS."""
    return httpx.create_ssl_context()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serve_fake(tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def shared_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One service for all tests of a file that neither change it nor count what it was asked."""
    with serve_fake(tmp_path_factory.mktemp("service")) as running:
        yield running


@contextmanager
def serve_fake(directory: Path, monitors: Monitors | None = None, **settings: object) -> Iterator[Served]:
    """The service with a `FakeEngine`, real otherwise; `settings` as in `service.config`.

    Without `monitors` nothing is watched for drift.
    """
    with ExitStack() as stack:
        structlog.configure(logger_factory=structlog.ReturnLoggerFactory())  # logs would mingle with what a CLI prints
        url = f"sqlite:///{directory / 'rootstock.db'}"
        database = connect(url)
        stack.callback(database.close)
        control = make_control(database, url, directory / "storage")
        chosen = Settings(**{"data_dir": directory, **settings})  # type: ignore[arg-type]
        metrics = Metrics(max_tenant_labels=2, router_aliases=chosen.router_aliases)
        engine = FakeEngine(observer=metrics)
        metrics.watch_engine(engine.stats)
        metrics.watch_leases(control.queue.max_lease_age_seconds)
        metrics.watch_jobs(lambda: job_backlog(database))
        store = AdapterStore(str(directory / "adapters"), directory / "cache")
        health = Health(chosen.stall_seconds)
        health.watch(cast(Engine, engine))
        data_reports = stack.enter_context(closing(DataReports(control.files, engine.base)))
        estimates = Estimates(
            control.files,
            store,
            control.jobs,
            cast(BaseModel, engine.base),
            max_rank=chosen.max_lora_rank,
        )
        retraining = Retraining(database, control.registry, control.jobs, metrics)
        builder = RetrainingFiles(control.files, engine.base, engine.base.max_model_len)
        proposing = RetrainingWorker(retraining, control.files, builder, data_reports, estimates)
        drift = (
            None
            if monitors is None
            else stack.enter_context(
                open_drift(
                    database,
                    store,
                    cast(Engine, engine),
                    metrics,
                    chosen,
                    monitors=monitors,
                    listeners=[retraining.drift_changed],
                )
            )
        )
        grammars = stack.enter_context(closing(GrammarCompiler(cast(BaseModel, engine.base))))
        rate_limits = RateLimits()
        archive = Archive(database, control.files, store, str(directory))
        removal = removal_in(archive, None, cast(Engine, engine), metrics, drift, grammars, data_reports, rate_limits)
        services = Services(
            settings=chosen,
            admin_key=SecretStr(ADMIN_KEY),
            base=cast(BaseModel, engine.base),
            engine=cast(Engine, engine),
            grammars=grammars,
            tool_format=ToolFormat.of(engine.base),
            metrics=metrics,
            tenants=control.tenants,
            files=control.files,
            data_reports=data_reports,
            jobs=control.jobs,
            estimates=estimates,
            registry=control.registry,
            store=store,
            rollout=stack.enter_context(
                open_rollout(database, control.registry, cast(Engine, engine), metrics, chosen, retraining)
            ),
            drift=drift,
            retraining=retraining,
            usage=stack.enter_context(open_books(database)),
            usage_report=UsageReport(database),
            rate_limits=rate_limits,
            audit=Audit(database),
            removal=removal,
        )
        app = create_app(services)
        api_url, ops_url = stack.enter_context(serve_apps(app, create_ops_app(metrics, health)))
        yield Served(
            api_url,
            ops_url,
            control,
            engine,
            metrics,
            health,
            services.rollout,
            retraining,
            proposing,
            app,
            services.drift,
            stack,
        )


class PromptServer(uvicorn.Server):
    """Ends when it is told and every request has ended, where the original looks ten times a second."""

    END_SECONDS = 5.0

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._told = threading.Event()
        self._end: Callable[[], object] = self._told.set

    def end(self) -> None:
        """From another thread."""
        self._told.set()
        self._end()

    async def main_loop(self) -> None:
        await self.on_tick(0)
        told, loop = asyncio.Event(), asyncio.get_running_loop()
        self._end = lambda: loop.call_soon_threadsafe(told.set)
        if not self._told.is_set():
            await told.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for sock in sockets or []:
            sock.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        if self.server_state.tasks:
            _, unfinished = await asyncio.wait(self.server_state.tasks, timeout=self.END_SECONDS)
            for task in unfinished:
                task.cancel()


@contextmanager
def serve_apps(*apps: ASGIApp) -> Iterator[list[str]]:
    """Each app on a free port of its own, all on one event loop in a thread; their urls."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in apps]
    servers = [PromptServer(uvicorn.Config(app, http=BoundedHttp, log_config=None, lifespan="off")) for app in apps]

    async def run() -> None:
        await asyncio.gather(*(server.serve([sock]) for server, sock in zip(servers, sockets, strict=True)))

    thread = threading.Thread(target=asyncio.run, args=(run(),), name="http", daemon=True)
    thread.start()
    try:
        yield [f"http://127.0.0.1:{sock.getsockname()[1]}" for sock in sockets]
    finally:
        for server in servers:
            server.end()
        thread.join(30)
        assert not thread.is_alive(), "a request was never finished"
