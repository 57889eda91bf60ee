"""What is counted and shown of drift, by Prometheus names. Knows no stream: it is told, or asks the board.

Beside `service.metrics`, on its registry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import structlog
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from adapters.drift.output_monitor import SIGNALS
from service.drift_board import Worst
from service.drift_prompt import PROMPT_SIGNALS

log = structlog.get_logger("service.metrics")

ByLabel = Callable[[Callable[[str], str]], Mapping[str, Worst]]
"""`DriftBoard.worst`."""

_BESIDE = {True: "nobody", False: "requests"}
"""Who was there while a probe was measured: what it took of nobody's time costs nobody anything."""


class DriftMetrics:
    """`DriftWatch`'s observer; `shown` is the label under which a tenant is shown."""

    def __init__(self, registry: CollectorRegistry, shown: Callable[[str], str]) -> None:
        self._registry = registry
        self._shown = shown
        self._probes = self._counter("probes", "First prompts of conversations, by outcome.", "outcome")
        self._probe_seconds = self._counter("probe_seconds", "Computing that probes took.", "beside")
        for beside in _BESIDE.values():
            self._probe_seconds.labels(beside)
        self._alarms = self._counter("alarms", "Signals that went into drift.", "signal")
        for signal in (*PROMPT_SIGNALS, *SIGNALS):
            self._alarms.labels(signal)  # a counter that begins with its first alarm hides that one from every rate
        self._expected = self._counter("expected_false_alarms", "Alarms that the promised run lengths allow by chance.")
        self._failures = self._counter("failures", "What broke in the watch for drift; the log says what.")
        self._webhooks = self._counter("webhooks", "Drift's events posted to the webhook.", "outcome")

    def drift_probe_ended(self, outcome: str) -> None:
        """Of a prompt: measured, failed, or not looked at: duplicate, capped, dropped."""
        self._probes.labels(outcome).inc()

    def drift_probed(self, seconds: float, is_free: bool) -> None:
        self._probe_seconds.labels(_BESIDE[is_free]).inc(seconds)

    def drift_alarmed(self, signal: str) -> None:
        self._alarms.labels(signal).inc()

    def drift_alarms_expected(self, number: float) -> None:
        self._expected.inc(number)

    def drift_failed(self) -> None:
        self._failures.inc()

    def drift_webhook_ended(self, outcome: str) -> None:
        """Of an event: delivered, failed after all attempts, or dropped because too many wait."""
        self._webhooks.labels(outcome).inc()

    def watch(self, worst: ByLabel) -> None:
        """From now on a scrape shows the worst of each tenant's adapters."""
        self._registry.register(_Board(lambda: worst(self._shown)))

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"drift_{name}", text, labels, namespace="rootstock", registry=self._registry)


class _Board:
    """A collector. What is unknown has no sample; of the states the one that holds is 1, the others are absent."""

    def __init__(self, found: Callable[[], Mapping[str, Worst]]) -> None:
        self._found = found

    def collect(self) -> Iterable[Metric]:
        try:
            return self._gauges(self._found())
        except Exception as error:  # one that fails must not cost the whole scrape
            log.warning("scrape_incomplete", reason=type(error).__name__)
            return []

    def _gauges(self, found: Mapping[str, Worst]) -> list[Metric]:
        ratio = GaugeMetricFamily(
            "rootstock_drift_statistic_ratio", "Statistic over its threshold.", labels=["tenant", "signal"]
        )
        state = GaugeMetricFamily("rootstock_drift_state", "The current one.", labels=["tenant", "signal", "state"])
        samples = GaugeMetricFamily("rootstock_drift_samples", "Answers looked at.", labels=["tenant"])
        for tenant, worst in found.items():
            samples.add_metric([tenant], worst.samples)
            for signal, value in worst.ratios.items():
                ratio.add_metric([tenant, signal], value)
            for signal, current in worst.states.items():
                state.add_metric([tenant, signal, current.value], 1)
        return [ratio, state, samples]
