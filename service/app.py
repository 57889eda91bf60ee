"""Wires everything, once: the collaborators, the routes, the order in which they start and stop."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from fastapi import FastAPI
from pydantic import SecretStr

from adapters.peft_format import LoraWeights, read_adapter
from adapters.store import AdapterStore
from service.api import adapters, admin, aliases, chat, completions, embeddings, files, fine_tuning, models
from service.api.errors import install_error_handlers
from service.api.middleware import RequestMiddleware
from service.api.services import Services
from service.api.tool_format import ToolFormat
from service.config import Settings
from service.database import connect
from service.engine.base_model import BaseModel, Quantization, load_base_model
from service.engine.engine import Engine
from service.engine.engine_config import EngineConfig
from service.engine.grammar_compiler import GrammarCompiler
from service.files import Files
from service.job_queue import JobQueue
from service.jobs import Jobs
from service.metrics import Metrics
from service.registry import BaseIdentity, Registry
from service.resume_points import ResumePoints
from service.tenants import Tenants
from service.tuning import TuningServices
from service.tuning_worker import TuningWorker


def create_app(services: Services) -> FastAPI:
    """The API. It starts and stops nothing: `open_services` does."""
    app = FastAPI(title="Rootstock", openapi_url=None)  # nothing is shown to who has no key
    app.state.services = services
    for module in (chat, completions, embeddings, files, fine_tuning, models, adapters, aliases, admin):
        app.include_router(module.router)
    install_error_handlers(app)
    app.add_middleware(
        RequestMiddleware,
        metrics=services.metrics,
        max_body_bytes=services.settings.max_body_bytes,
        max_file_bytes=services.settings.max_file_bytes,
    )
    return app


@contextmanager
def open_services(settings: Settings, metrics: Metrics, admin_key: SecretStr) -> Iterator[Services]:
    """Everything the routes need, running; stopped in the opposite order.

    Takes as long as the base takes to load. Raises ServiceError, AdapterError or EngineError with a message for
    the operator when something cannot be opened.
    """
    with ExitStack() as stack:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        database = connect(settings.resolved_database_url)
        stack.callback(database.close)
        storage = settings.resolved_storage_url.rstrip("/")
        store = AdapterStore(f"{storage}/adapters", settings.data_dir / "cache" / "adapters")
        files_ = Files(database, f"{storage}/files", max_bytes=settings.max_file_bytes)
        base = load_base_model(
            settings.base,
            quantization=Quantization(settings.quantization),
            device=settings.device,
            name=settings.base_name,
            max_model_len=settings.max_model_len,
        )
        registry = Registry(database, BaseIdentity(base.name, base.fingerprint))
        engine = Engine(base, _adapter_source(store, base, settings), _engine_config(settings), metrics)
        engine.start()
        stack.callback(engine.shutdown, 0.0)
        metrics.watch_engine(engine.stats)
        grammars = GrammarCompiler(base)
        stack.callback(grammars.close)
        queue = JobQueue(database, lease_seconds=settings.lease_seconds, observer=metrics)
        metrics.watch_leases(queue.max_lease_age_seconds)
        services = Services(
            settings=settings,
            admin_key=admin_key,
            base=base,
            engine=engine,
            grammars=grammars,
            tool_format=ToolFormat.of(base),
            metrics=metrics,
            tenants=Tenants(database),
            files=files_,
            jobs=Jobs(database, metrics),
            registry=registry,
            store=store,
        )
        if settings.training:
            tuning = TuningServices(
                queue=queue,
                files=files_,
                store=store,
                resume_points=ResumePoints(storage),
                base=base,
                engine=engine,
                observer=metrics,
                max_lora_rank=settings.max_lora_rank,
                save_every_seconds=settings.resume_point_seconds,
            )
            worker = TuningWorker(tuning, name=f"{socket.gethostname()}-{os.getpid()}")
            worker.start()
            stack.callback(worker.stop)
        yield services


def _adapter_source(store: AdapterStore, base: BaseModel, settings: Settings) -> Callable[[str], LoraWeights]:
    def load(digest: str) -> LoraWeights:
        return read_adapter(store.directory(digest), base.signature, max_rank=settings.max_lora_rank)

    return load


def _engine_config(settings: Settings) -> EngineConfig:
    return EngineConfig(
        kv_cache_bytes=settings.kv_cache_bytes,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        prefill_chunk=settings.prefill_chunk,
        max_lora_slots=settings.max_lora_slots,
        max_lora_rank=settings.max_lora_rank,
        max_host_adapters=settings.max_host_adapters,
        host_adapter_bytes=settings.host_adapter_bytes,
        prefix_cache=settings.prefix_cache,
        max_waiting=settings.max_waiting,
        cuda_graphs=settings.cuda_graphs,
    )
