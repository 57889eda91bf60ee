"""What every route may use, wired once by `service.app`. Builds nothing itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request
from pydantic import SecretStr

if TYPE_CHECKING:
    from adapters.store import AdapterStore
    from service.api.tool_format import ToolFormat
    from service.audit import Audit
    from service.config import Settings
    from service.data_reports import DataReports
    from service.drift import DriftWatch
    from service.engine.base_description import BaseDescription
    from service.engine.grammar_compiler import GrammarCompiler
    from service.engine.serving_engine import ServingEngine
    from service.estimates import Estimates
    from service.fallback import Fallback
    from service.files import Files
    from service.jobs import Jobs
    from service.merges import Merges
    from service.metrics import Metrics
    from service.rate_limits import RateLimits
    from service.registry import Registry
    from service.retraining import Retraining
    from service.rollout import Rollout
    from service.tenant_removal import TenantRemoval
    from service.tenants import Tenants
    from service.usage_book import UsageBook
    from service.usage_report import UsageReport


@dataclass(frozen=True)
class Services:
    """The collaborators of the routes. The tests put fakes in these places."""

    settings: Settings
    admin_key: SecretStr
    base: BaseDescription
    engine: ServingEngine
    grammars: GrammarCompiler
    tool_format: ToolFormat
    metrics: Metrics
    tenants: Tenants
    files: Files
    data_reports: DataReports
    estimates: Estimates
    jobs: Jobs
    registry: Registry
    store: AdapterStore
    rollout: Rollout
    retraining: Retraining
    usage: UsageBook
    usage_report: UsageReport
    rate_limits: RateLimits
    audit: Audit
    removal: TenantRemoval
    merges: Merges | None = None
    drift: DriftWatch | None = None
    fallback: Fallback | None = None
    """None: a damaged adapter is an error, and nothing more happens."""


async def _of_request(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(_of_request)]
"""`def route(services: ServicesDep)`: the collaborators of the app that answers."""
