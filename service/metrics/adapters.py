"""Adapters on their way between the tiers. Knows no request; implements the engine's SlotObserver."""

from __future__ import annotations

from service.metrics.series import Series

LOAD_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class AdapterMetrics(Series):
    """Called from a loading thread or the engine's."""

    def __init__(self) -> None:
        super().__init__()
        self._adapter_load = self._histogram(
            "adapter_load_seconds", "Time to load an adapter into a tier.", LOAD_BUCKETS, "tier"
        )
        self._adapter_evictions = self._counter("adapter_evictions", "Adapters evicted.", "reason")
        self._adapter_verify_failures = self._counter(
            "adapter_verify_failures",
            "Adapters refused, or found damaged; the reason is the failed check.",
            "reason",
        )
        self._alias_fallbacks = self._counter(
            "alias_fallbacks",
            "Aliases led away from a damaged or lost adapter, or left there for want of another.",
            "outcome",
        )
        self._adapters_checked = self._counter("adapters_checked", "Stored adapters read and verified at rest.")
        self._last_check = self._gauge(
            "store_last_check_timestamp_seconds", "When all stored adapters had last been verified, unix time."
        )

    def adapter_loaded(self, tier: str, seconds: float) -> None:
        self._adapter_load.labels(tier).observe(seconds)

    def adapter_evicted(self, reason: str) -> None:
        self._adapter_evictions.labels(reason).inc()

    def alias_fell_back(self, outcome: str) -> None:
        self._alias_fallbacks.labels(outcome).inc()

    def adapter_checked(self) -> None:
        self._adapters_checked.inc()

    def store_checked(self, at: float) -> None:
        """Everything in it, once."""
        self._last_check.set(at)

    def adapter_verify_failed(self, reason: str) -> None:
        self._adapter_verify_failures.labels(reason).inc()
