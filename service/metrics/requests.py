"""Requests and what their sequences did: how many, how long, where the time went. Knows no tenant and no adapter.

Histograms carry the operation only, and exemplars the trace id: from a slow bucket to the request that fell into it.
"""

from __future__ import annotations

from collections.abc import Iterable

from service.engine.sequence import SequenceReport
from service.metrics.origin import INTERNAL_OPERATION, Origin
from service.metrics.series import Series

TTFT_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25),
    *(0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160),
)
TPOT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5)
DURATION_BUCKETS = (
    *(0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5),
    *(10, 15, 20, 30, 40, 50, 60, 120, 240, 480),
)
PHASE_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
LOOP_LAG_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5)


OUTCOMES = ("success", "rejected", "aborted", "error")
"""Of an API request: answered, refused (4xx), left by the client, failed (5xx or an error inside a stream)."""


class RequestMetrics(Series):
    """A request has one duration; each of its sequences has a first token, further ones, and phases."""

    def __init__(self) -> None:
        super().__init__()
        self._requests = self._counter("requests", "API requests answered.", "operation", "outcome")
        self._tokens = self._counter("tokens", "Tokens processed.", "type")
        self._prefix_cache_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up there.")
        self._prefix_cache_hits = self._counter("prefix_cache_hits", "Prompt tokens found there, not computed.")
        self._time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "Arrival at the service to first token.", TTFT_BUCKETS, "operation"
        )
        self._time_per_output_token = self._histogram(
            "time_per_output_token_seconds", "Between two tokens of a sequence.", TPOT_BUCKETS, "operation"
        )
        self._request_duration = self._histogram(
            "request_duration_seconds", "Arrival to last byte.", DURATION_BUCKETS, "operation"
        )
        self._queue_wait = self._histogram(
            "queue_wait_seconds", "Arrival at the engine to first scheduling.", TTFT_BUCKETS, "operation"
        )
        self._request_phase = self._histogram(
            "request_phase_seconds",
            "What a sequence's time in the engine went into: queue, adapter_load, prefill, decode.",
            PHASE_BUCKETS,
            "operation",
            "phase",
        )
        self._event_loop_lag = self._histogram(
            "event_loop_lag_seconds", "How late the API's event loop runs what is due.", LOOP_LAG_BUCKETS
        )

    def expect_operations(self, operations: Iterable[str]) -> None:
        """Their counters begin at 0: a counter that begins with its first error hides that one from every rate."""
        for operation in operations:
            for outcome in OUTCOMES:
                self._requests.labels(operation, outcome)

    def loop_lagged(self, seconds: float) -> None:
        """The event loop ran something this much later than it was due."""
        self._event_loop_lag.observe(seconds)

    def tokens_trained(self, num_tokens: int) -> None:
        self._tokens.labels("training").inc(num_tokens)

    def _count_request(self, origin: Origin, outcome: str, seconds: float) -> None:
        self._requests.labels(origin.operation, outcome).inc()
        if outcome != "rejected":
            self._request_duration.labels(origin.operation).observe(seconds, origin.exemplar)

    def _count_sequence(self, report: SequenceReport, origin: Origin | None) -> None:
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
        if (first_token_seconds := seconds_to_first_token(report, origin)) is not None:
            self._time_to_first_token.labels(operation).observe(first_token_seconds, exemplar)
        time_per_output_token = self._time_per_output_token.labels(operation)
        for seconds in report.inter_token_seconds:
            time_per_output_token.observe(seconds, exemplar)
        for phase in report.phases:
            self._request_phase.labels(operation, phase.name.value).observe(phase.seconds, exemplar)


def seconds_to_first_token(report: SequenceReport, origin: Origin | None) -> float | None:
    """As the client waited for it: the engine's own count, and what the request took on its way to the engine."""
    if report.ttft_seconds is None or report.arrival is None or origin is None or origin.arrival is None:
        return report.ttft_seconds
    return report.ttft_seconds + report.arrival - origin.arrival
