"""Each tenant's gate policy: one row, or the default. Knows no HTTP and no job."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from adapters.gate import GatePolicy
from service.database import Database, lock_tenant
from service.tables import epoch_now, gate_policies


class GatePolicies:
    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, tenant_id: str) -> GatePolicy:
        query = sa.select(gate_policies.c.policy).where(gate_policies.c.tenant_id == tenant_id)
        with self._database.read() as connection:
            found: dict[str, Any] | None = connection.execute(query).scalar()
        return GatePolicy() if found is None else GatePolicy.from_dict(found)

    def set(self, tenant_id: str, policy: GatePolicy) -> None:
        """For the jobs made from now on: a job keeps the policy that it was made under."""
        with self._database.begin() as connection:
            lock_tenant(connection, tenant_id)
            connection.execute(gate_policies.delete().where(gate_policies.c.tenant_id == tenant_id))
            row = {"tenant_id": tenant_id, "policy": policy.as_dict(), "updated_at": epoch_now()}
            connection.execute(gate_policies.insert().values(row))
