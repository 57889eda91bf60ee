"""What each tenant does and how long it waits: counters, of as many tenants as there are labels. Knows no histogram.

A quotient of two rates is a tenant's mean: request seconds over requests, first-token seconds over first tokens.
"""

from __future__ import annotations

from prometheus_client import Counter

from service.engine.sequence import SequenceReport
from service.metrics.series import Series
from service.tenant_labels import TenantLabels

TOKEN_TYPES = ("prompt", "completion", "cached")


class TenantMetrics(Series):
    """All series of a tenant end with it, or when a busier one takes its label."""

    def __init__(self, max_tenant_labels: int) -> None:
        super().__init__()
        self._tenant_requests = self._counter("tenant_requests", "API requests of a tenant.", "tenant")
        self._tenant_errors = self._counter("tenant_errors", "Its requests that failed, not by its fault.", "tenant")
        self._tenant_request_seconds = self._counter(
            "tenant_request_seconds", "Time its requests took, refused ones included.", "tenant"
        )
        self._tenant_tokens = self._counter("tenant_tokens", "Tokens of its requests.", "tenant", "type")
        self._tenant_first_tokens = self._counter("tenant_first_tokens", "Its answers that began.", "tenant")
        self._tenant_first_token_seconds = self._counter(
            "tenant_first_token_seconds", "Time until the first token of all these.", "tenant"
        )
        self._tenant_feedback = self._counter("tenant_feedback", "Feedback that a tenant's users gave.", "tenant")
        self._tenant_label_overflow = self._counter(
            "tenant_label_overflow", "Samples counted under tenant=_other because all labels are taken."
        )
        self._tenant_labels = TenantLabels(
            max_tenant_labels, on_removed=self._remove_label, on_overflow=self._tenant_label_overflow.inc
        )

    def forget_tenant(self, tenant_id: str) -> None:
        """The tenant was deleted: its series end here."""
        self._tenant_labels.forget(tenant_id)

    def _count_request_of(self, tenant_id: str, outcome: str, seconds: float) -> None:
        with self._tenant_labels.label(tenant_id) as label:
            self._tenant_requests.labels(label).inc()
            self._tenant_request_seconds.labels(label).inc(seconds)
            self._tenant_errors.labels(label).inc(outcome == "error")

    def _count_sequence_of(self, report: SequenceReport, first_token_seconds: float | None) -> None:
        num_tokens = (report.num_prompt_tokens, report.num_output_tokens, report.num_cached_tokens or 0)
        with self._tenant_labels.label(report.tenant) as label:
            for kind, num in zip(TOKEN_TYPES, num_tokens, strict=True):
                self._tenant_tokens.labels(label, kind).inc(num)
            if first_token_seconds is not None:
                self._tenant_first_tokens.labels(label).inc()
                self._tenant_first_token_seconds.labels(label).inc(first_token_seconds)

    def _count_feedback_of(self, tenant_id: str) -> None:
        with self._tenant_labels.label(tenant_id, counts=False) as label:
            self._tenant_feedback.labels(label).inc()

    def _remove_label(self, label: str) -> None:
        of_tenant: tuple[Counter, ...] = (
            self._tenant_requests,
            self._tenant_errors,
            self._tenant_request_seconds,
            self._tenant_first_tokens,
            self._tenant_first_token_seconds,
            self._tenant_feedback,
        )
        for counter in of_tenant:
            counter.remove(label)
        for kind in TOKEN_TYPES:
            self._tenant_tokens.remove(label, kind)
