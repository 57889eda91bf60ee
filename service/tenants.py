"""Tenants, their keys and their limits; who a key belongs to. Knows no HTTP; what a key is, `service.keys` knows."""

from __future__ import annotations

import builtins
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.audit import ADMINISTRATOR, record
from service.database import Database, database_now, lock_tenant, new_id
from service.errors import InvalidRequestError, NotFoundError
from service.keys import Key, Role, alive, end_keys, end_others, get_key, issue, key_id, keys_of, matches
from service.quotas import LIMIT_COLUMNS, TenantLimits, limits_in, limits_of, set_limits
from service.tables import adapter_versions, api_keys, epoch_now, jobs, merges, removals, tenant_limits, tenants
from service.usage_rows import without_names

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Tenant:
    id: str
    name: str
    created_at: float


@dataclass(frozen=True)
class Access:
    """What a valid key opens, as of the moment it was looked up: nothing of this is kept between requests."""

    tenant: Tenant
    key_id: str
    role: Role
    limits: TenantLimits


@dataclass(frozen=True)
class LeftBehind:
    """What a deleted tenant leaves outside the database: all its jobs and merges, the adapters that were its alone."""

    tenant_id: str
    jobs: tuple[str, ...]
    digests: tuple[str, ...]
    merges: tuple[str, ...]

    @classmethod
    def of(cls, tenant_id: str, row: Mapping[str, list[str]]) -> Self:
        return cls(tenant_id, *(tuple(row[name]) for name in ("jobs", "digests", "merges")))

    def as_row(self) -> dict[str, list[str]]:
        return {"jobs": list(self.jobs), "digests": list(self.digests), "merges": list(self.merges)}


@dataclass(frozen=True)
class RemovedTenant:
    tenant: Tenant
    left: LeftBehind


class Tenants:
    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, name: str) -> tuple[Tenant, str]:
        """The tenant and its API key, which is shown this once."""
        if not NAME_PATTERN.fullmatch(name):
            raise InvalidRequestError(
                f"'{name}' is no tenant name: use 1 to 64 letters, digits, '.', '_' or '-', a letter or digit first.",
                param="name",
            )
        with self._database.begin() as connection:
            tenant = Tenant(new_id("tenant"), name, database_now(connection))
            try:
                connection.execute(tenants.insert().values(tenant.__dict__))
            except sa.exc.IntegrityError:
                raise InvalidRequestError(
                    f"A tenant named '{name}' exists already.", param="name", code="tenant_exists"
                ) from None
            key, text = issue(connection, tenant.id)
            record(connection, ADMINISTRATOR, "tenant.create", tenant.id, name=name, key_id=key.id)
            return tenant, text

    def list(self) -> list[Tenant]:
        """By name."""
        with self._database.read() as connection:
            return [_tenant(row) for row in connection.execute(sa.select(tenants).order_by(tenants.c.name))]

    def get(self, tenant_id: str) -> Tenant:
        with self._database.read() as connection:
            return _get(connection, tenant_id)

    def delete(self, tenant_id: str) -> RemovedTenant:
        """Every row of its own goes with it, in one transaction; what else there is of it `service.tenant_removal`
        removes, for which it is written down."""
        with self._database.begin() as connection:
            lock_tenant(connection, tenant_id)
            tenant = _get(connection, tenant_id)
            left = LeftBehind(
                tenant_id,
                jobs=_ids(connection, sa.select(jobs.c.id).where(jobs.c.tenant_id == tenant_id)),
                digests=_ids(connection, _digests_of_nobody_else(tenant_id)),
                merges=_ids(connection, sa.select(merges.c.id).where(merges.c.tenant_id == tenant_id)),
            )
            connection.execute(tenants.delete().where(tenants.c.id == tenant_id))
            to_do = {"tenant_id": tenant_id, "left_behind": left.as_row(), "removed_at": epoch_now()}
            connection.execute(removals.insert().values(to_do))
            without_names(connection, tenant_id)
            record(connection, ADMINISTRATOR, "tenant.delete", tenant_id)
        return RemovedTenant(tenant, left)

    # -- limits -----------------------------------------------------------------------------------------------

    def limits(self, tenant_id: str) -> TenantLimits:
        with self._database.read() as connection:
            return limits_of(connection, tenant_id)

    def change_limits(self, tenant_id: str, changes: Mapping[str, int | None]) -> TenantLimits:
        """They hold from the next request on, at every replica. What is not named stays."""
        with self._database.begin() as connection:
            lock_tenant(connection, tenant_id)
            before = limits_of(connection, tenant_id)
            limits = replace(before, **changes)
            set_limits(connection, tenant_id, limits)
            if limits != before:
                record(connection, ADMINISTRATOR, "tenant.limits", tenant_id, **limits.as_dict())
            return limits

    # -- keys -------------------------------------------------------------------------------------------------

    def keys(self, tenant_id: str) -> builtins.list[Key]:
        with self._database.read() as connection:
            _get(connection, tenant_id)
            return keys_of(connection, tenant_id)

    def create_key(
        self,
        tenant_id: str,
        *,
        role: Role = Role.ADMIN,
        name: str | None = None,
        expires_in_seconds: float | None = None,
        actor: str = ADMINISTRATOR,
    ) -> tuple[Key, str]:
        """A further key; the older ones go on working."""
        with self._database.begin() as connection:
            lock_tenant(connection, tenant_id)
            key, text = issue(connection, tenant_id, role=role, name=name, expires_in_seconds=expires_in_seconds)
            told = {"key_id": key.id, "role": key.role, "expires_at": key.expires_at}
            record(connection, actor, "key.create", tenant_id, **told)
            return key, text

    def rotate_key(self, tenant_id: str, *, overlap_seconds: float = 0.0) -> str:
        """A new key of the tenant's; every older one stops working, at once or after the overlap."""
        with self._database.begin() as connection:
            lock_tenant(connection, tenant_id)
            if overlap_seconds == 0.0:
                end_keys(connection, api_keys.c.tenant_id == tenant_id, 0.0)
            key, text = issue(connection, tenant_id)
            end_others(connection, key, overlap_seconds)
            record(
                connection, ADMINISTRATOR, "key.rotate_all", tenant_id, key_id=key.id, overlap_seconds=overlap_seconds
            )
            return text

    def replace_key(
        self, tenant_id: str, replaced: str, *, overlap_seconds: float = 0.0, actor: str = ADMINISTRATOR
    ) -> tuple[Key, str]:
        """A new key like `replaced`, which stops working, at once or after the overlap."""
        with self._database.begin() as connection:
            lock_tenant(connection, tenant_id)
            old = get_key(connection, tenant_id, replaced)
            lifetime = None if old.expires_at is None else old.expires_at - old.created_at
            end_keys(connection, api_keys.c.id == old.id, overlap_seconds)
            key, text = issue(connection, tenant_id, role=old.role, name=old.name, expires_in_seconds=lifetime)
            told = {"key_id": key.id, "replaced": old.id, "overlap_seconds": overlap_seconds}
            record(connection, actor, "key.rotate", tenant_id, **told)
            return key, text

    def revoke_key(self, tenant_id: str, key_id: str, *, actor: str = ADMINISTRATOR) -> None:
        with self._database.begin() as connection:
            lock_tenant(connection, tenant_id)
            key = get_key(connection, tenant_id, key_id)
            connection.execute(api_keys.delete().where(api_keys.c.id == key.id))
            record(connection, actor, "key.revoke", tenant_id, key_id=key.id)

    def access(self, api_key: str) -> Access | None:
        """What this key opens; None for a key that is not ours, or not any more."""
        found = key_id(api_key)
        if found is None:
            return None
        query = sa.select(tenants, api_keys.c.digest, api_keys.c.role, *LIMIT_COLUMNS).select_from(
            tenants.join(api_keys).outerjoin(tenant_limits, _LIMITS_OF_TENANT)
        )
        with self._database.read() as connection:
            row = connection.execute(query.where(api_keys.c.id == found, alive())).one_or_none()
        if row is None or not matches(api_key, row.digest):
            return None
        return Access(_tenant(row), found, Role(row.role), limits_in(row._mapping))

    def authenticate(self, api_key: str) -> Tenant | None:
        """Whose key this is; None for a key that is not ours."""
        access = self.access(api_key)
        return None if access is None else access.tenant


_LIMITS_OF_TENANT = tenant_limits.c.tenant_id == tenants.c.id


def _ids(connection: Connection, query: sa.Select[Any]) -> tuple[str, ...]:
    return tuple(connection.execute(query).scalars())


def _digests_of_nobody_else(tenant_id: str) -> sa.Select[Any]:
    others = sa.select(adapter_versions.c.digest).where(adapter_versions.c.tenant_id != tenant_id)
    mine = sa.select(adapter_versions.c.digest).distinct().where(adapter_versions.c.tenant_id == tenant_id)
    return mine.where(adapter_versions.c.digest.not_in(others))


def _get(connection: Connection, tenant_id: str) -> Tenant:
    row = connection.execute(sa.select(tenants).where(tenants.c.id == tenant_id)).one_or_none()
    if row is None:
        raise NotFoundError(f"No tenant '{tenant_id}'.", code="tenant_not_found")
    return _tenant(row)


def _tenant(row: sa.Row[Any]) -> Tenant:
    return Tenant(row.id, row.name, row.created_at)
