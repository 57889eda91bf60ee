"""What the administrator lets a tenant have: rates, files, jobs, adapters. Knows no HTTP; rates are kept elsewhere
(`service.rate_limits`).

A check runs in the transaction that adds the thing, whose caller holds `lock_tenant`: two requests at once cannot both
take the last place.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.errors import QuotaExceededError
from service.job_rows import UNFINISHED
from service.tables import adapter_versions, epoch_now, files, jobs, tenant_limits


@dataclass(frozen=True)
class TenantLimits:
    """None: as much as the tenant likes. `max_jobs` are those that wait or run, `max_bytes` all files together."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_files: int | None = None
    max_bytes: int | None = None
    max_jobs: int | None = None
    max_adapters: int | None = None

    def as_dict(self) -> dict[str, int | None]:
        return asdict(self)


LIMITS = tuple(TenantLimits.__dataclass_fields__)
LIMIT_COLUMNS = tuple(tenant_limits.c[name] for name in LIMITS)


def limits_in(row: sa.RowMapping) -> TenantLimits:
    """Of a row with `LIMIT_COLUMNS`; all null where the tenant has none."""
    return TenantLimits(**{name: row[name] for name in LIMITS})


def limits_of(connection: Connection, tenant_id: str) -> TenantLimits:
    query = sa.select(*LIMIT_COLUMNS).where(tenant_limits.c.tenant_id == tenant_id)
    row = connection.execute(query).mappings().one_or_none()
    return TenantLimits() if row is None else limits_in(row)


def set_limits(connection: Connection, tenant_id: str, limits: TenantLimits) -> None:
    mine = tenant_limits.c.tenant_id == tenant_id
    connection.execute(tenant_limits.delete().where(mine))
    connection.execute(tenant_limits.insert().values(tenant_id=tenant_id, **limits.as_dict()))


def check_files(connection: Connection, tenant_id: str, num_bytes: int) -> None:
    """Raises QuotaExceededError when one more file, of so many bytes, would be too much. An expired file that waits
    for its removal does not count; one that a job wrote does, though no job is refused its results."""
    limits = limits_of(connection, tenant_id)
    if limits.max_files is None and limits.max_bytes is None:
        return
    visible = sa.or_(files.c.expires_at.is_(None), files.c.expires_at > epoch_now())
    sums = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(files.c.bytes), 0))
    num_files, held = connection.execute(sums.where(files.c.tenant_id == tenant_id, visible)).one()
    _check("max_files", limits.max_files, num_files, 1, "files", "delete one first")
    _check("max_bytes", limits.max_bytes, int(held), num_bytes, "bytes of files", "delete a file first")


def check_job(connection: Connection, tenant_id: str) -> None:
    """Raises QuotaExceededError when one more job, and the adapter that it makes, would be too much."""
    limits = limits_of(connection, tenant_id)
    if limits.max_jobs is None and limits.max_adapters is None:
        return
    running = _num_jobs(connection, tenant_id)
    _check("max_jobs", limits.max_jobs, running, 1, "jobs at once", "wait for one to end, or cancel it")
    _check_adapters(connection, tenant_id, limits, running)


def check_adapter(connection: Connection, tenant_id: str) -> None:
    """Raises QuotaExceededError when one more adapter would be too much, those counted that jobs are making."""
    limits = limits_of(connection, tenant_id)
    if limits.max_adapters is not None:
        _check_adapters(connection, tenant_id, limits, _num_jobs(connection, tenant_id))


def _check_adapters(connection: Connection, tenant_id: str, limits: TenantLimits, num_jobs: int) -> None:
    mine = (adapter_versions.c.tenant_id == tenant_id, adapter_versions.c.step.is_(None))
    published = connection.execute(sa.select(sa.func.count()).select_from(adapter_versions).where(*mine)).scalar_one()
    what = "adapters, those counted that unfinished jobs will publish"
    _check("max_adapters", limits.max_adapters, published + num_jobs, 1, what, "delete a model first")


def _num_jobs(connection: Connection, tenant_id: str) -> int:
    unfinished = sa.select(sa.func.count()).select_from(jobs).where(jobs.c.tenant_id == tenant_id)
    return int(connection.execute(unfinished.where(jobs.c.state.in_(UNFINISHED))).scalar_one())


def _check(name: str, limit: int | None, held: int, added: int, what: str, way_out: str) -> None:
    if limit is not None and held + added > limit:
        raise QuotaExceededError(
            f"Your quota '{name}' is {limit} {what}; you have {held} and asked for {added} more: {way_out}, or ask "
            "the administrator for a larger quota.",
            param=name,
        )
