"""All dashboards, as Grafana reads them, by uid."""

from __future__ import annotations

from tools.monitoring.service_dashboard import SERVICE_DASHBOARD
from tools.monitoring.tenants_dashboard import TENANTS_DASHBOARD
from tools.monitoring.training_dashboard import TRAINING_DASHBOARD

DASHBOARDS = {
    dashboard.uid: dashboard.document() for dashboard in (SERVICE_DASHBOARD, TENANTS_DASHBOARD, TRAINING_DASHBOARD)
}
