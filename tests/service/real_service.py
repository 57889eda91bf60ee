"""The service with a real engine on a tiny random base, in this process. Fixture `real_service`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from openai import DefaultHttpxClient, OpenAI
from pydantic import SecretStr

from adapters.lora_weights import LoraWeights
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
from service.drift_room import open_drift
from service.engine.base_model import BaseModel, load_base_model
from service.engine.engine import Engine
from service.engine.engine_config import EngineConfig
from service.engine.grammar_compiler import GrammarCompiler
from service.estimates import Estimates
from service.health import Health
from service.metrics import Metrics
from service.rate_limits import RateLimits
from service.retraining import Retraining
from service.rollout import open_rollout
from service.tenant_removal import removal_in
from service.tracing.traces import Traces
from service.usage_book import open_books
from service.usage_report import UsageReport
from tests.adapters.loras import random_lora
from tests.service.control_fixtures import Control, make_control
from tests.service.http_fixtures import ADMIN_KEY, certificates, serve_apps

__all__ = ["real_service"]

ADAPTER = "e" * 64


@dataclass(frozen=True)
class RealService:
    """A running service; the tenant `acme` has the adapter `tuned`."""

    url: str
    ops_url: str
    key: str
    base: BaseModel
    engine: Engine
    grammars: GrammarCompiler
    tuned: str
    closing: ExitStack
    control: Control
    store: AdapterStore
    drift: DriftWatch | None = None

    def client(self, *, strict: bool = True) -> OpenAI:
        client = OpenAI(
            base_url=f"{self.url}/v1",
            api_key=self.key,
            max_retries=0,
            _strict_response_validation=strict,
            http_client=DefaultHttpxClient(verify=certificates()),
        )
        self.closing.callback(client.close)
        return client

    def http(self, api_key: str | None = None) -> httpx.Client:
        headers = {"authorization": f"Bearer {api_key or self.key}"}
        client = httpx.Client(base_url=self.url, headers=headers, timeout=60, verify=certificates())
        return self.closing.enter_context(client)


@pytest.fixture(scope="module")
def real_service(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealService]:
    base = load_base_model(str(tiny_llama_dir), quantization="none", name="tiny")
    with serve_real(base, tmp_path_factory.mktemp("real")) as running:
        yield running


@contextmanager
def serve_real(
    base: BaseModel,
    directory: Path,
    adapters: dict[str, LoraWeights] | None = None,
    *,
    drift: bool = False,
    traces: Traces | None = None,
    **sizes: Any,
) -> Iterator[RealService]:
    """The service on `base`: as the `tiny` of the tests' control plane, and with room for tools in its prompts.

    `adapters`, by digest, may be added to while it runs; with `drift` traffic is watched; `sizes` are the engine's.
    """
    base = replace(base, name="tiny", max_model_len=2048)
    with ExitStack() as stack:
        structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
        url = f"sqlite:///{directory / 'rootstock.db'}"
        database = connect(url)
        stack.callback(database.close)
        control = make_control(database, url, directory / "storage")
        settings, metrics = Settings(data_dir=directory, drift=drift), Metrics()
        adapters = {} if adapters is None else adapters
        adapters[ADAPTER] = random_lora(base.signature, seed=3)
        config = EngineConfig(**{"kv_cache_bytes": 32 << 20, **sizes})
        engine = Engine(base, adapters.__getitem__, config, metrics)
        engine.start()
        metrics.watch_engine(engine.stats)
        health = Health(settings.stall_seconds)
        health.watch(engine)
        stack.callback(engine.shutdown, 0.0)
        grammars = stack.enter_context(closing(GrammarCompiler(base)))
        store = AdapterStore(str(directory / "adapters"), directory / "cache")
        data_reports = stack.enter_context(closing(DataReports(control.files, base)))
        watch, rate_limits = stack.enter_context(open_drift(database, store, engine, metrics, settings)), RateLimits()
        archive = Archive(database, control.files, store, str(directory))
        removal = removal_in(archive, None, engine, metrics, watch, grammars, data_reports, rate_limits)
        services = Services(
            settings=settings,
            admin_key=SecretStr(ADMIN_KEY),
            base=base,
            engine=engine,
            grammars=grammars,
            tool_format=ToolFormat.of(base),
            metrics=metrics,
            tenants=control.tenants,
            files=control.files,
            data_reports=data_reports,
            jobs=control.jobs,
            registry=control.registry,
            estimates=Estimates(control.files, store, control.jobs, base, max_rank=64),
            store=store,
            rollout=stack.enter_context(open_rollout(database, control.registry, engine, metrics, settings)),
            drift=watch,
            retraining=Retraining(database, control.registry, control.jobs, metrics),
            usage=stack.enter_context(open_books(database)),
            usage_report=UsageReport(database),
            rate_limits=rate_limits,
            audit=Audit(database),
            removal=removal,
        )
        tuned = control.publish(suffix="tuned", digest=ADAPTER)
        ops = create_ops_app(metrics, health)
        api_url, ops_url = stack.enter_context(serve_apps(create_app(services, traces=traces), ops))
        yield RealService(
            *(api_url, ops_url, control.acme_key, base, engine, grammars, tuned, stack, control),
            store=store,
            drift=services.drift,
        )
