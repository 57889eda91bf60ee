"""What putting versions into service takes: canaries, shadows, feedback, and the log that feeds them. Wired once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from service.canaries import Canaries
from service.captures import Captures
from service.config import Settings
from service.database import Database
from service.feedback import Feedback, Listener
from service.metrics import Metrics
from service.quality import Quality
from service.registry import Registry
from service.shadows import Answering, Shadows
from service.tenant_settings import TenantSettings
from service.traffic_log import Retention, TrafficLog


@dataclass(frozen=True)
class Rollout:
    """`request_timeout_seconds` is the service's own limit."""

    canaries: Canaries
    shadows: Shadows
    feedback: Feedback
    quality: Quality
    captures: Captures
    traffic: TrafficLog
    settings: TenantSettings
    metrics: Metrics
    request_timeout_seconds: float | None


@contextmanager
def open_rollout(
    database: Database,
    registry: Registry,
    engine: Answering,
    metrics: Metrics,
    settings: Settings,
    listener: Listener | None = None,
) -> Iterator[Rollout]:
    """Running, until the block ends; then everything is written. `listener` hears of feedback that matters to
    retraining."""
    canaries = Canaries(database, registry, metrics)
    retention = Retention(
        completions_days=settings.completion_retention_days,
        max_completions=settings.max_completion_records,
        feedback_days=settings.feedback_retention_days,
        capture_bytes=settings.capture_bytes,
    )
    traffic = TrafficLog(database, retention, judge=canaries.judge, on_dropped=metrics.completion_record_dropped)
    quality = Quality(database)
    metrics.watch_quality(quality.accuracies)
    traffic.start()
    try:
        yield Rollout(
            canaries=canaries,
            shadows=Shadows(engine, traffic, metrics.shadow_ended),
            feedback=Feedback(database, traffic, metrics.feedback_given, listener),
            quality=quality,
            captures=Captures(database),
            traffic=traffic,
            settings=TenantSettings(database),
            metrics=metrics,
            request_timeout_seconds=settings.request_timeout_seconds,
        )
    finally:
        traffic.stop()
