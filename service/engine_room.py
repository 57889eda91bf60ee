"""Base, engine and training, wired: what runs beside the API, in its process or in one of its own. Knows no HTTP."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Protocol

from adapters.lora_weights import LoraWeights
from adapters.peft_format import read_adapter
from adapters.store import AdapterStore
from service.archive import Archive
from service.config import Settings
from service.engine.base_model import BaseModel, load_base_model
from service.engine.engine import Engine
from service.engine.engine_config import EngineConfig
from service.engine.observation import EngineObserver
from service.engine.quantization import Quantization
from service.job_queue import JobQueue
from service.jobs import JobObserver
from service.merge_worker import MergeWorker
from service.merges import merges_in
from service.resume_points import ResumePoints
from service.training_gate import PaceObserver, TrainingGate
from service.training_pace import PaceLimits, TrainingPace
from service.tuning import TuningObserver, TuningServices
from service.tuning_pool import TuningPool
from service.tuning_worker import wait_for_stream, work_clock

if TYPE_CHECKING:
    from service.tracing.traces import Traces


class Observer(EngineObserver, TuningObserver, JobObserver, PaceObserver, Protocol):
    """Hears of everything that happens here."""


@contextmanager
def running_engine(
    settings: Settings,
    archive: Archive,
    observer: Observer,
    on_delivered: Callable[[], None] = lambda: None,
    traces: Traces | None = None,
) -> Iterator[Engine]:
    """An engine on the loaded base, with training beside it where the settings ask for it.

    When the engine shuts down, training and merging begin to stop at once, beside the answers that may finish.

    Takes as long as the base takes to load. Raises EngineError or AdapterError with a message for the operator.
    """
    base = load_base_model(
        settings.base,
        quantization=Quantization(settings.quantization),
        device=settings.device,
        name=settings.base_name,
        max_model_len=settings.max_model_len,
    )
    with ExitStack() as stack:
        source = _adapter_source(archive.store, base, settings)
        engine = Engine(base, source, _engine_config(settings), observer, on_delivered=on_delivered)
        engine.start()
        stack.callback(engine.shutdown, 0.0)
        if settings.training:
            pool = _tuning_pool(settings, archive, base, engine, observer, traces)
            pool.start()
            stack.callback(pool.stop)
            engine.before_draining(pool.ask_to_stop)
        merges = merges_in(settings, archive.database)
        if merges is not None:
            merging = MergeWorker(merges, archive.store, base, max_rank=settings.max_lora_rank)
            merging.start()
            stack.callback(merging.stop)
            engine.before_draining(merging.ask_to_stop)
        yield engine


def _tuning_pool(
    settings: Settings,
    archive: Archive,
    base: BaseModel,
    engine: Engine,
    observer: Observer,
    traces: Traces | None,
) -> TuningPool:
    services = TuningServices(
        queue=JobQueue(
            archive.database, lease_seconds=settings.lease_seconds, observer=observer, reached=archive.reached
        ),
        files=archive.files,
        store=archive.store,
        resume_points=ResumePoints(archive.url),
        base=base,
        engine=engine,
        observer=observer,
        max_lora_rank=settings.max_lora_rank,
        save_every_seconds=settings.resume_point_seconds,
        drift_run_length=settings.drift_run_length if settings.drift else None,
        traces=traces,
        reached=archive.reached,
    )
    gates = training_gates(settings, engine, observer)
    name = f"{socket.gethostname()}-{os.getpid()}"
    return TuningPool(services, settings.training_jobs, name=name, gates=gates)


def training_gates(settings: Settings, engine: Engine, observer: PaceObserver) -> Callable[[], TrainingGate] | None:
    """Makes a gate for each thread that trains, all of one pace. None where priorities alone arbitrate: then training
    is not even asked."""
    target = None if settings.itl_target_ms is None else settings.itl_target_ms / 1e3
    limits = PaceLimits(target, settings.training_share)
    if limits.hold_nothing:
        return None
    pace, lock = TrainingPace(limits), threading.Lock()
    return lambda: TrainingGate(
        pace,
        lock=lock,
        is_serving=lambda: engine.is_busy,
        step_seconds=engine.step_times.take,
        observer=observer,
        drain=partial(wait_for_stream, engine.base.device),
        work_clock=work_clock(engine.base.device),
    )


def _adapter_source(store: AdapterStore, base: BaseModel, settings: Settings) -> Callable[[str], LoraWeights]:
    def load(digest: str) -> LoraWeights:
        return read_adapter(store.read(digest), base.signature, max_rank=settings.max_lora_rank)

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
