"""Gauges that are read when somebody scrapes: the engine, the leases, the processes, and what routers want to know."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import structlog
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from service.tenant_labels import TenantLabels

if TYPE_CHECKING:
    from service.engine.observation import EngineStats
    from service.job_backlog import JobBacklog

log = structlog.get_logger("service.metrics")


class Scrape:
    """A prometheus_client collector made of one function. One that fails must not cost the whole scrape."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        try:
            return list(self._collect())
        except Exception as error:
            log.warning("scrape_incomplete", reason=type(error).__name__)
            return []


def engine_gauges(stats: EngineStats) -> Iterator[Metric]:
    yield _gauge("rootstock_requests_running", "Sequences being decoded.", stats.num_running)
    yield _gauge("rootstock_requests_waiting", "Sequences waiting for their turn.", stats.num_waiting)
    yield _gauge("rootstock_kv_cache_usage_ratio", "Share of the KV cache in use, kept prefixes not.", stats.kv_usage)
    yield CounterMetricFamily(
        "rootstock_engine_restarts", "Times the engine crashed and came back.", value=stats.num_restarts
    )
    resident = GaugeMetricFamily("rootstock_adapters_resident", "Adapters loaded, running or not.", labels=["tier"])
    for tier, digests in stats.resident.items():
        resident.add_metric([tier], len(digests))
    yield resident
    slots = GaugeMetricFamily("rootstock_adapter_slots", "Adapters a tier can hold.", labels=["tier"])
    for tier, capacity in stats.slots.items():
        slots.add_metric([tier], capacity)
    yield slots
    yield _gauge("rootstock_adapters_pinned", "Adapters in a slot that a running sequence uses.", stats.num_pinned)


def lease_gauges(age_seconds: float) -> Iterator[Metric]:
    yield _gauge("rootstock_lease_age_seconds_max", "Since the stalest running job's heartbeat.", age_seconds)


def stale_gauges(num_stale: int) -> Iterator[Metric]:
    yield _gauge("rootstock_adapters_stale", "Published models that belong to another base than the loaded.", num_stale)


def job_gauges(backlog: JobBacklog) -> Iterator[Metric]:
    unfinished = GaugeMetricFamily("rootstock_jobs_unfinished", "Jobs queued, paused or running.", labels=["state"])
    for state, num_jobs in backlog.num_jobs.items():
        unfinished.add_metric([state], num_jobs)
    yield unfinished
    silence = GaugeMetricFamily(
        "rootstock_job_silence_seconds_max", "Since the latest event of the stalest job.", labels=["state"]
    )
    for state, seconds in backlog.max_silence_seconds.items():
        silence.add_metric([state], seconds)
    yield silence


def process_gauges(resident_bytes: Mapping[str, int]) -> Iterator[Metric]:
    """By process, `api` and `engine`; where the engine has none of its own, `api` holds both."""
    family = GaugeMetricFamily("rootstock_process_resident_bytes", "Memory of a process.", labels=["process"])
    for process, num_bytes in resident_bytes.items():
        family.add_metric([process], num_bytes)
    yield family


def quality_gauges(accuracies: Mapping[str, float], labels: TenantLabels) -> Iterator[Metric]:
    """Of tenants with a label of their own; a tenant that is not among `accuracies` has no series, and never a 0."""
    gauge = GaugeMetricFamily(
        "rootstock_tenant_accuracy", "Share of judged answers that were right, of the last 30 days.", labels=["tenant"]
    )
    for tenant_id, accuracy in accuracies.items():
        if labels.names(tenant_id):
            gauge.add_metric([tenant_id], accuracy)
    yield gauge


def router_gauges(stats: EngineStats) -> Iterator[Metric]:
    """The names inference routers scrape (Gateway API inference extension, model server protocol).

    "Running" adapters are those that are loaded; an adapter appears in one list only. The series of an older
    set of adapters is not exported again: the label set is made anew by each scrape.
    """
    yield _gauge("vllm:num_requests_running", "Sequences being decoded.", stats.num_running)
    yield _gauge("vllm:num_requests_waiting", "Sequences waiting for their turn.", stats.num_waiting)
    yield _gauge("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", stats.kv_usage)
    loaded = sorted(stats.resident.get("device", ()))
    waiting = sorted(set(stats.waiting_adapters) - set(loaded))
    labels = {
        "max_lora": str(stats.slots.get("device", 0)),
        "running_lora_adapters": ",".join(loaded),
        "waiting_lora_adapters": ",".join(waiting),
    }
    info = GaugeMetricFamily("vllm:lora_requests_info", "Adapters loaded and waited for.", labels=list(labels))
    info.add_metric(list(labels.values()), time.time())
    yield info


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)
