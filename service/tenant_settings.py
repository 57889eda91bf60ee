"""What a tenant has chosen for itself. Knows no HTTP."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import sqlalchemy as sa

from service.database import Database, lock_tenant
from service.tables import feedback, tenant_settings


@dataclass(frozen=True)
class TenantChoices:
    """`capture`: texts that are sent as feedback may be stored."""

    capture: bool = False


class TenantSettings:
    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, tenant_id: str) -> TenantChoices:
        query = sa.select(tenant_settings.c.capture).where(tenant_settings.c.tenant_id == tenant_id)
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
        return TenantChoices() if row is None else TenantChoices(capture=row.capture)

    def set(self, tenant_id: str, choices: TenantChoices) -> TenantChoices:
        """Turning capture off also erases the texts that were captured."""
        mine = tenant_settings.c.tenant_id == tenant_id
        with self._database.begin() as connection:
            lock_tenant(connection, tenant_id)
            if connection.execute(tenant_settings.update().where(mine).values(asdict(choices))).rowcount == 0:
                connection.execute(tenant_settings.insert().values(tenant_id=tenant_id, **asdict(choices)))
            if not choices.capture:
                captured = sa.and_(feedback.c.tenant_id == tenant_id, feedback.c.corrected.is_not(None))
                connection.execute(feedback.update().where(captured).values(corrected=None))
        return choices
