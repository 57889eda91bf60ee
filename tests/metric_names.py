"""Which series the service exports."""

from __future__ import annotations

from prometheus_client.metrics_core import Metric

from service.drift_board import Worst
from service.job_backlog import JobBacklog
from service.metrics import Metrics
from tests.fakes import FakeEngine


def known() -> dict[str, str]:
    """Name and type of everything that `Metrics` can export, samples or not."""
    metrics = Metrics()
    metrics.watch_engine(FakeEngine().stats)
    metrics.watch_leases(lambda: 0.0)
    metrics.watch_stale(lambda: 0)
    metrics.watch_jobs(lambda: JobBacklog({"queued": 0}, {"queued": 0.0}))
    metrics.watch_process(lambda: True, 1)
    metrics.watch_processes(lambda: {"api": 1})
    metrics.watch_quality(lambda: {})
    metrics.drift.watch(lambda _: {"tenant": Worst({}, {}, 0)})
    return {_name(family): family.type for family in metrics.registry.collect()}


def series(names: dict[str, str]) -> set[str]:
    """What a query may name: a histogram is three series."""
    found = {name for name, kind in names.items() if kind != "histogram"}
    histograms = [name for name, kind in names.items() if kind == "histogram"]
    return found | {f"{name}_{part}" for name in histograms for part in ("bucket", "count", "sum")}


def _name(family: Metric) -> str:
    return f"{family.name}_total" if family.type == "counter" else family.name
