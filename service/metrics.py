"""Every Prometheus name, in one place; nothing else of the service imports prometheus_client.

One registry per `Metrics`, none global. Histograms carry no tenant: that would be tenants x buckets series.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from service.drift_metrics import DriftMetrics
from service.engine.sequence import SequenceReport
from service.job import JobStatus
from service.tenant_labels import TenantLabels

if TYPE_CHECKING:
    from service.engine.observation import EngineStats
    from service.job_backlog import JobBacklog

TTFT_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25),
    *(0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160),
)
TPOT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
DURATION_BUCKETS = (
    *(0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5),
    *(10, 15, 20, 30, 40, 50, 60, 120, 240, 480),
)
LOAD_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
LOOP_LAG_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)
JOB_BUCKETS = (1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 14400, 43200, 86400)

log = structlog.get_logger("service.metrics")

INTERNAL_OPERATION = "internal"
"""What nobody asked for over HTTP: self-checks, evaluations."""


OUTCOMES = ("success", "rejected", "aborted", "error")
"""Of an API request: answered, refused (4xx), left by the client, failed (5xx or an error inside a stream)."""


@dataclass(frozen=True)
class Origin:
    """Where a sequence came from: the API operation, and the trace id its exemplars carry."""

    operation: str
    trace_id: str

    @property
    def exemplar(self) -> dict[str, str]:
        return {"trace_id": self.trace_id}


class Metrics:
    """What the service counts. Implements the engine's EngineObserver and the job queue's JobObserver."""

    def __init__(self, *, max_tenant_labels: int = 200, router_aliases: bool = False) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # no `_created` series beside every other
        self.registry = CollectorRegistry()
        self._router_aliases = router_aliases
        self._origins: dict[str, Origin] = {}
        self._define_request_metrics()
        self._define_adapter_metrics()
        self._define_job_metrics()
        self._define_rollout_metrics()
        self._gauge("start_time_seconds", "When this process started, unix time.").set(time.time())
        self._tenant_labels = TenantLabels(
            max_tenant_labels, on_removed=self._remove_label, on_overflow=self._tenant_label_overflow.inc
        )
        self.drift = DriftMetrics(self.registry, self._tenant_labels.shown)

    # The API reports requests; what the sequences of a request did comes from the engine, below.

    def sequence_submitted(self, request_id: str, origin: Origin) -> None:
        """Remember who asked for an engine request, until `sequence_finished` or `sequence_refused`."""
        self._origins[request_id] = origin

    def sequence_refused(self, request_id: str) -> None:
        self._origins.pop(request_id, None)

    def expect_operations(self, operations: Iterable[str]) -> None:
        """Their counters begin at 0: a counter that begins with its first error hides that one from every rate."""
        for operation in operations:
            for outcome in OUTCOMES:
                self._requests.labels(operation, outcome)

    def request_finished(self, origin: Origin, tenant_id: str | None, outcome: str, seconds: float) -> None:
        """Count one API request; `outcome` is one of OUTCOMES. Refusals have no duration."""
        self._requests.labels(origin.operation, outcome).inc()
        if outcome != "rejected":
            self._request_duration.labels(origin.operation).observe(seconds, origin.exemplar)
        if tenant_id is None:
            return
        with self._tenant_labels.label(tenant_id) as label:
            self._tenant_requests.labels(label).inc()

    def loop_lagged(self, seconds: float) -> None:
        """The event loop ran something this much later than it was due."""
        self._event_loop_lag.observe(seconds)

    def forget_tenant(self, tenant_id: str) -> None:
        """The tenant was deleted: its series end here."""
        self._tenant_labels.forget(tenant_id)

    # service.engine: EngineObserver, called from the engine's threads.

    def sequence_finished(self, report: SequenceReport) -> None:
        origin = self._origins.pop(report.request_id, None)
        operation = origin.operation if origin else INTERNAL_OPERATION
        exemplar = origin.exemplar if origin else None
        self._tokens.labels("prompt").inc(report.num_prompt_tokens)
        self._tokens.labels("completion").inc(report.num_output_tokens)
        if report.num_cached_tokens is not None:
            self._tokens.labels("cached").inc(report.num_cached_tokens)
            self._prefix_cache_queries.inc(report.num_prompt_tokens)
            self._prefix_cache_hits.inc(report.num_cached_tokens)
        if report.queue_seconds is not None:
            self._queue_wait.labels(operation).observe(report.queue_seconds, exemplar)
        if report.ttft_seconds is not None:
            self._time_to_first_token.labels(operation).observe(report.ttft_seconds, exemplar)
        time_per_output_token = self._time_per_output_token.labels(operation)
        for seconds in report.inter_token_seconds:
            time_per_output_token.observe(seconds, exemplar)

    def adapter_loaded(self, tier: str, seconds: float) -> None:
        self._adapter_load.labels(tier).observe(seconds)

    def adapter_evicted(self, reason: str) -> None:
        self._adapter_evictions.labels(reason).inc()

    def adapter_verify_failed(self, reason: str) -> None:
        self._adapter_verify_failures.labels(reason).inc()

    # service.job_queue: JobObserver; and what the tuning worker reports.

    def job_entered(self, state: JobStatus) -> None:
        self._jobs.labels(state.value).inc()

    def write_fenced(self) -> None:
        self._job_fenced_writes.inc()

    def job_run_finished(self, outcome: str, seconds: float) -> None:
        """One worker's run of a job ended: succeeded, failed, cancelled, paused, …"""
        self._training_job.labels(outcome).observe(seconds)

    def tokens_trained(self, num_tokens: int) -> None:
        self._tokens.labels("training").inc(num_tokens)

    def training_paced(self, ratio: float, p99_seconds: float | None, held_seconds: float) -> None:
        """How much training may run beside answers, as the latency target steers it."""
        self._training_pace.set(ratio)
        self._training_held.inc(held_seconds)
        if p99_seconds is not None:
            self._decode_step_p99.set(p99_seconds)

    # service.rollout: what puts versions into service.

    def canary_answered(self, arm: str, outcome: str) -> None:
        """A request for an alias that has a canary; the arm is stable or canary."""
        self._canary_requests.labels(arm, outcome).inc()

    def canary_ended(self, outcome: str, reason: str) -> None:
        """By itself: rolled_back because of `error` or `down` (feedback), or promoted."""
        self._canary_ends.labels(outcome, reason).inc()

    def shadow_ended(self, outcome: str) -> None:
        self._shadow_requests.labels(outcome).inc()

    def feedback_given(self, tenant_id: str, rating: float | None) -> None:
        kind = "none" if rating is None else "up" if rating > 0 else "down" if rating < 0 else "neutral"
        self._feedback.labels(kind).inc()
        with self._tenant_labels.label(tenant_id, counts=False) as label:
            self._tenant_feedback.labels(label).inc()

    def retraining_moved(self, trigger: str, outcome: str) -> None:
        """A proposal was made, started, dismissed or failed, or lacks examples (insufficient)."""
        self._retraining_proposals.labels(trigger, outcome).inc()

    def completion_record_dropped(self) -> None:
        self._completion_records_dropped.inc()

    # Gauges are read when somebody scrapes.

    def watch_engine(self, stats: Callable[[], EngineStats]) -> None:
        self.registry.register(_Scrape(lambda: _engine_gauges(stats())))
        if self._router_aliases:
            self.registry.register(_Scrape(lambda: _router_gauges(stats())))

    def watch_leases(self, max_lease_age_seconds: Callable[[], float]) -> None:
        self.registry.register(_Scrape(lambda: _lease_gauges(max_lease_age_seconds())))

    def watch_quality(self, accuracies: Callable[[], Mapping[str, float]]) -> None:
        """Of tenants with a label of their own; a tenant that is not among them has no series, and never a 0."""
        self.registry.register(_Scrape(lambda: _quality_gauges(accuracies(), self._tenant_labels)))

    def watch_jobs(self, backlog: Callable[[], JobBacklog]) -> None:
        self.registry.register(_Scrape(lambda: _job_gauges(backlog())))

    def watch_process(self, is_ready: Callable[[], bool], memory_limit_bytes: int | None) -> None:
        """`is_ready` is what /readyz answers; without a limit there is no series of it."""
        if memory_limit_bytes is not None:
            self._gauge("memory_limit_bytes", "What the container may use, all processes.").set(memory_limit_bytes)
        self._gauge("ready", "Whether /readyz says so.").set_function(lambda: float(is_ready()))

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """The text of a scrape and its content type; OpenMetrics, with exemplars, when `accept` says so."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def _define_request_metrics(self) -> None:
        self._requests = self._counter("requests", "API requests answered.", "operation", "outcome")
        self._tokens = self._counter("tokens", "Tokens processed.", "type")
        self._prefix_cache_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up there.")
        self._prefix_cache_hits = self._counter("prefix_cache_hits", "Prompt tokens found there, not computed.")
        self._time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "Arrival to first token.", TTFT_BUCKETS, "operation"
        )
        self._time_per_output_token = self._histogram(
            "time_per_output_token_seconds", "Between two tokens of a sequence.", TPOT_BUCKETS, "operation"
        )
        self._request_duration = self._histogram(
            "request_duration_seconds", "Arrival to last byte.", DURATION_BUCKETS, "operation"
        )
        self._queue_wait = self._histogram(
            "queue_wait_seconds", "Arrival to first scheduling.", TTFT_BUCKETS, "operation"
        )
        self._event_loop_lag = self._histogram(
            "event_loop_lag_seconds", "How late the API's event loop runs what is due.", LOOP_LAG_BUCKETS
        )
        self._tenant_requests = self._counter("tenant_requests", "API requests of a tenant.", "tenant")
        self._tenant_label_overflow = self._counter(
            "tenant_label_overflow", "Samples counted under tenant=_other because all labels are taken."
        )

    def _define_adapter_metrics(self) -> None:
        self._adapter_load = self._histogram(
            "adapter_load_seconds", "Time to load an adapter into a tier.", LOAD_BUCKETS, "tier"
        )
        self._adapter_evictions = self._counter("adapter_evictions", "Adapters evicted.", "reason")
        self._adapter_verify_failures = self._counter(
            "adapter_verify_failures",
            "Adapters refused when loaded; the reason is the failed check.",
            "reason",
        )

    def _define_job_metrics(self) -> None:
        self._training_job = self._histogram(
            "training_job_seconds", "Run time of a fine-tuning job.", JOB_BUCKETS, "outcome"
        )
        self._jobs = self._counter("jobs", "Fine-tuning jobs that entered a state.", "state")
        self._job_fenced_writes = self._counter("job_fenced_writes", "Writes refused: the claim was lost.")
        self._training_pace = self._gauge(
            "training_pace_ratio", "Share of the time in which answers are written that training may run."
        )
        self._training_pace.set(1.0)
        self._training_held = self._counter(
            "training_held_seconds", "Time for which training was held back to keep answers fast."
        )
        self._decode_step_p99 = self._gauge(
            "decode_step_p99_seconds", "Between two tokens, of the latest steps without prompts beside training."
        )

    def _define_rollout_metrics(self) -> None:
        self._canary_requests = self._counter(
            "canary_requests", "Requests for an alias with a canary, by the side that answered.", "arm", "outcome"
        )
        self._canary_ends = self._counter("canary_ends", "Canaries that ended by themselves.", "outcome", "reason")
        self._shadow_requests = self._counter("shadow_requests", "Copies of requests for shadows.", "outcome")
        self._feedback = self._counter("feedback", "Feedback taken.", "rating")
        self._tenant_feedback = self._counter("tenant_feedback", "Feedback that a tenant's users gave.", "tenant")
        self._retraining_proposals = self._counter(
            "retraining_proposals", "What became of proposals to retrain.", "trigger", "outcome"
        )
        self._completion_records_dropped = self._counter(
            "completion_records_dropped", "Answers that feedback cannot refer to: the database was too slow."
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, namespace="rootstock", registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, namespace="rootstock", registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, text, labels, namespace="rootstock", registry=self.registry, buckets=buckets)

    def _remove_label(self, label: str) -> None:
        self._tenant_requests.remove(label)
        self._tenant_feedback.remove(label)


class _Scrape:
    """A prometheus_client collector made of one function. One that fails must not cost the whole scrape."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        try:
            return list(self._collect())
        except Exception as error:
            log.warning("scrape_incomplete", reason=type(error).__name__)
            return []


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def _engine_gauges(stats: EngineStats) -> Iterator[Metric]:
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


def _lease_gauges(age_seconds: float) -> Iterator[Metric]:
    yield _gauge("rootstock_lease_age_seconds_max", "Since the stalest running job's heartbeat.", age_seconds)


def _quality_gauges(accuracies: Mapping[str, float], labels: TenantLabels) -> Iterator[Metric]:
    gauge = GaugeMetricFamily(
        "rootstock_tenant_accuracy", "Share of judged answers that were right, of the last 30 days.", labels=["tenant"]
    )
    for tenant_id, accuracy in accuracies.items():
        if labels.names(tenant_id):
            gauge.add_metric([tenant_id], accuracy)
    yield gauge


def _job_gauges(backlog: JobBacklog) -> Iterator[Metric]:
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


def _router_gauges(stats: EngineStats) -> Iterator[Metric]:
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
