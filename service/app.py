"""Wires everything, once: the collaborators, the routes, the order in which they start and stop."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from pydantic import SecretStr

from service.api.description import FAILURES
from service.api.errors import install_error_handlers
from service.api.middleware import OPERATIONS, OTHER_OPERATION, RequestMiddleware
from service.api.routes import ROUTERS
from service.api.services import Services
from service.api.tool_format import ToolFormat
from service.archive import Archive
from service.audit import Audit
from service.caretaker import Caretaker, Scrubber
from service.config import Settings
from service.data_reports import DataReports
from service.drain import Drain
from service.drift_room import open_drift
from service.engine.engine_process import EngineProcess
from service.engine.grammar_compiler import GrammarCompiler
from service.engine.remote_engine import RemoteEngine
from service.engine.serving_engine import ServingEngine
from service.estimates import Estimates
from service.fallback import Fallback
from service.garbage import Garbage
from service.job_backlog import job_backlog
from service.job_queue import JobQueue
from service.jobs import Jobs
from service.merges import merges_in
from service.metrics import Metrics
from service.process_memory import resident_bytes
from service.rate_limits import RateLimits
from service.registry import BaseIdentity, Registry
from service.resume_points import ResumePoints
from service.retraining import Retraining
from service.retraining_data import RetrainingFiles
from service.retraining_worker import RetrainingWorker
from service.rollout import open_rollout
from service.tenant_removal import removal_in, sweeping
from service.tenants import Tenants
from service.usage_book import open_books
from service.usage_report import UsageReport

if TYPE_CHECKING:
    from service.tracing.traces import Traces


def create_app(services: Services, drain: Drain | None = None, traces: Traces | None = None) -> FastAPI:
    """The API. It starts and stops nothing: `open_services` does. `drain` tells it that the service is going."""
    app = FastAPI(title="Rootstock", openapi_url=None, responses=FAILURES)  # nothing is shown to who has no key
    app.state.services, app.state.routers = services, ROUTERS
    for router in ROUTERS:
        app.include_router(router)
    install_error_handlers(app)
    services.metrics.expect_operations((*OPERATIONS.values(), OTHER_OPERATION))
    app.add_middleware(
        RequestMiddleware,
        metrics=services.metrics,
        max_body_bytes=services.settings.max_body_bytes,
        max_file_bytes=services.settings.max_file_bytes,
        drain=drain or Drain(),
        traces=traces,
    )
    return app


@contextmanager
def open_services(
    settings: Settings,
    metrics: Metrics,
    admin_key: SecretStr,
    engine_process: EngineProcess | None = None,
    traces: Traces | None = None,
) -> Iterator[Services]:
    """Everything the routes need, running; stopped in the opposite order. `traces` are for what trains in this process.

    `engine_process` is the engine's, where it has been started already. Takes as long as the base takes to load.
    Raises ServiceError, AdapterError or EngineError with a message for the operator when something cannot be opened.
    """
    with ExitStack() as stack:
        archive = stack.enter_context(Archive.open(settings, metrics.adapter_verify_failed))
        queue = JobQueue(archive.database, lease_seconds=settings.lease_seconds, observer=metrics)
        metrics.watch_leases(queue.max_lease_age_seconds)
        metrics.watch_jobs(lambda: job_backlog(archive.database))
        engine = stack.enter_context(_engine(settings, archive, metrics, engine_process, traces))
        metrics.watch_engine(engine.stats)
        metrics.watch_processes(lambda: resident_bytes({"api": os.getpid(), "engine": engine.process_id}))
        base = engine.base
        data_reports = DataReports(archive.files, base)
        stack.callback(data_reports.close)
        grammars = GrammarCompiler(base)
        stack.callback(grammars.close)
        registry = Registry(archive.database, BaseIdentity(base.name, base.identity), archive.reached)
        metrics.watch_stale(registry.num_stale)
        jobs = Jobs(archive.database, metrics)
        estimates = Estimates(archive.files, archive.store, jobs, base, max_rank=settings.max_lora_rank)
        retraining = Retraining(
            archive.database,
            registry,
            jobs,
            metrics,
            cooldown_seconds=settings.retraining_cooldown_hours * 3600.0,
        )
        builder = RetrainingFiles(archive.files, base, base.max_model_len)
        proposing = RetrainingWorker(retraining, archive.files, builder, data_reports, estimates)
        proposing.start()
        stack.callback(proposing.stop)
        merges, rate_limits = merges_in(settings, archive.database), RateLimits()
        drift = stack.enter_context(
            open_drift(
                archive.database,
                archive.store,
                engine,
                metrics,
                settings,
                listeners=[retraining.drift_changed],
            )
        )
        removal = removal_in(archive, merges, engine, metrics, drift, grammars, data_reports, rate_limits)
        fallback = Fallback(archive.database, registry, archive.store, metrics)
        stack.enter_context(looked_after(settings, archive, engine, fallback, metrics))
        yield Services(
            settings=settings,
            admin_key=admin_key,
            base=base,
            engine=engine,
            grammars=grammars,
            tool_format=ToolFormat.of(base),
            metrics=metrics,
            tenants=Tenants(archive.database),
            files=archive.files,
            data_reports=data_reports,
            estimates=estimates,
            jobs=jobs,
            registry=registry,
            store=archive.store,
            rollout=stack.enter_context(
                open_rollout(archive.database, registry, engine, metrics, settings, retraining)
            ),
            retraining=retraining,
            usage=stack.enter_context(open_books(archive.database)),
            usage_report=UsageReport(archive.database),
            rate_limits=rate_limits,
            audit=Audit(archive.database),
            removal=stack.enter_context(sweeping(removal)),
            merges=merges,
            fallback=fallback,
            drift=drift,
        )


@contextmanager
def looked_after(
    settings: Settings, archive: Archive, engine: ServingEngine, fallback: Fallback, metrics: Metrics
) -> Iterator[None]:
    """While the block runs, what is stored is verified and swept."""

    def in_use() -> set[str]:
        stats = engine.stats()
        return {*stats.waiting_adapters, *(digest for digests in stats.resident.values() for digest in digests)}

    caretaker = Caretaker(sweep_seconds=settings.gc_hours * 3600.0, scrub_seconds=settings.scrub_hours * 3600.0)
    garbage = Garbage(
        archive.database,
        archive.store,
        archive.files,
        ResumePoints(archive.url),
        grace_seconds=settings.gc_grace_hours * 3600.0,
        in_use=in_use,
    )
    rate = float(settings.scrub_bytes_per_second)
    scrubber = Scrubber(
        archive.database, archive.store, fallback, metrics, bytes_per_second=rate, sleep=caretaker.sleep
    )
    caretaker.start(garbage, scrubber)
    try:
        yield
    finally:
        caretaker.stop()


@contextmanager
def _engine(
    settings: Settings, archive: Archive, metrics: Metrics, started: EngineProcess | None, traces: Traces | None
) -> Iterator[ServingEngine]:
    """In a process of its own, or in this one."""
    if not settings.engine_process:
        from service.engine_room import running_engine  # kernels and quantization: 200 MB that the API does without

        with running_engine(settings, archive, metrics, traces=traces) as engine:
            yield engine
        return
    remote = RemoteEngine(lambda: EngineProcess(settings), metrics, started)
    try:
        yield remote
    finally:
        remote.shutdown(0.0)
