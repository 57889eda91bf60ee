"""All the service counts, as one registry: the nouns beside this file, the gauges of a scrape, the text of it.

One registry per `Metrics`, none global. Histograms carry no tenant: that would be tenants x buckets series.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from prometheus_client.exposition import choose_encoder

from service.engine.sequence import SequenceReport
from service.metrics.adapters import AdapterMetrics
from service.metrics.drift import DriftMetrics
from service.metrics.gauges import (
    Scrape,
    engine_gauges,
    job_gauges,
    lease_gauges,
    process_gauges,
    quality_gauges,
    router_gauges,
    stale_gauges,
)
from service.metrics.jobs import JobMetrics
from service.metrics.origin import Origin
from service.metrics.requests import RequestMetrics, seconds_to_first_token
from service.metrics.rollouts import RolloutMetrics
from service.metrics.tenants import TenantMetrics

if TYPE_CHECKING:
    from service.engine.observation import EngineStats
    from service.job_backlog import JobBacklog


class Metrics(TenantMetrics, RequestMetrics, AdapterMetrics, JobMetrics, RolloutMetrics):
    """What the service counts. Implements the engine's EngineObserver and the job queue's JobObserver."""

    def __init__(self, *, max_tenant_labels: int = 200, router_aliases: bool = False) -> None:
        super().__init__(max_tenant_labels)
        self.drift = DriftMetrics(self.registry, self._tenant_labels.shown)
        self._gauge("start_time_seconds", "When this process started, unix time.").set(time.time())
        self._router_aliases = router_aliases
        self._origins: dict[str, Origin] = {}

    # The API reports requests; what the sequences of a request did comes from the engine.

    def sequence_submitted(self, request_id: str, origin: Origin) -> None:
        """Remember who asked for an engine request, until `sequence_finished` or `sequence_refused`."""
        self._origins[request_id] = origin

    def sequence_refused(self, request_id: str) -> None:
        self._origins.pop(request_id, None)

    def request_finished(self, origin: Origin, tenant_id: str | None, outcome: str, seconds: float) -> None:
        """Count one API request; `outcome` is success, rejected, aborted or error. Refusals have no duration."""
        self._count_request(origin, outcome, seconds)
        if tenant_id is not None:
            self._count_request_of(tenant_id, outcome, seconds)

    def sequence_finished(self, report: SequenceReport) -> None:
        """service.engine's EngineObserver, called from the engine's threads. A tenant's are those it asked for."""
        origin = self._origins.pop(report.request_id, None)
        self._count_sequence(report, origin)
        if origin is None:
            return
        self._count_sequence_of(report, seconds_to_first_token(report, origin))
        if origin.listener is not None:
            origin.listener.sequence_finished(report)

    def feedback_given(self, tenant_id: str, rating: float | None) -> None:
        self._count_feedback(rating)
        self._count_feedback_of(tenant_id)

    # Gauges are read when somebody scrapes.

    def watch_engine(self, stats: Callable[[], EngineStats]) -> None:
        self.registry.register(Scrape(lambda: engine_gauges(stats())))
        if self._router_aliases:
            self.registry.register(Scrape(lambda: router_gauges(stats())))

    def watch_leases(self, max_lease_age_seconds: Callable[[], float]) -> None:
        self.registry.register(Scrape(lambda: lease_gauges(max_lease_age_seconds())))

    def watch_processes(self, resident_bytes: Callable[[], Mapping[str, int]]) -> None:
        self.registry.register(Scrape(lambda: process_gauges(resident_bytes())))

    def watch_stale(self, num_stale: Callable[[], int]) -> None:
        self.registry.register(Scrape(lambda: stale_gauges(num_stale())))

    def watch_jobs(self, backlog: Callable[[], JobBacklog]) -> None:
        self.registry.register(Scrape(lambda: job_gauges(backlog())))

    def watch_process(self, is_ready: Callable[[], bool], memory_limit_bytes: int | None) -> None:
        """`is_ready` is what /readyz answers; without a limit there is no series of it."""
        if memory_limit_bytes is not None:
            self._gauge("memory_limit_bytes", "What the container may use, all processes.").set(memory_limit_bytes)
        self._gauge("ready", "Whether /readyz says so.").set_function(lambda: float(is_ready()))

    def watch_quality(self, accuracies: Callable[[], Mapping[str, float]]) -> None:
        self.registry.register(Scrape(lambda: quality_gauges(accuracies(), self._tenant_labels)))

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """The text of a scrape and its content type; OpenMetrics, with exemplars, when `accept` says so."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type
