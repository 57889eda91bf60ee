"""Who changed tenants, keys and limits: appended in the transaction of the change itself. Knows no secret."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.database import Database, Page, new_id, page_of
from service.tables import audit_log, epoch_now

ADMINISTRATOR = "administrator"


@dataclass(frozen=True)
class AuditEntry:
    """`actor` is the administrator, or the key (`key:{id}`) of a tenant that changed its own."""

    id: str
    at: float
    actor: str
    action: str
    tenant_id: str | None
    details: Mapping[str, Any]


def record(connection: Connection, actor: str, action: str, tenant_id: str, **details: Any) -> None:
    row = {"id": new_id("audit"), "at": epoch_now(), "actor": actor, "action": action, "tenant_id": tenant_id}
    connection.execute(audit_log.insert().values(**row, details=details))


class Audit:
    def __init__(self, database: Database) -> None:
        self._database = database

    def list(self, *, tenant_id: str | None = None, after: str | None = None, limit: int = 20) -> Page[AuditEntry]:
        """Newest first; of one tenant, also of a deleted one, or of all."""
        query = sa.select(audit_log)
        if tenant_id is not None:
            query = query.where(audit_log.c.tenant_id == tenant_id)
        with self._database.read() as connection:
            rows, has_more = page_of(connection, query, audit_log, after=after, limit=limit, descending=True)
        entries = (AuditEntry(row.id, row.at, row.actor, row.action, row.tenant_id, row.details) for row in rows)
        return Page(tuple(entries), has_more)
