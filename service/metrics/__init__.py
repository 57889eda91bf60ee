"""Every Prometheus name, in one place; nothing else of the service imports prometheus_client."""

from service.metrics.metrics import Metrics
from service.metrics.origin import Origin

__all__ = ["Metrics", "Origin"]
