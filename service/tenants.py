"""Tenants and their API keys. Knows no HTTP.

A key is `rs-{key id}-{secret}` with 256 random bits of secret. The database holds the key id in clear, to find the
row, and the sha256 of the whole key, compared in constant time. (A slow hash would protect guessable passwords;
256 random bits cannot be guessed.)
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.database import Database, database_now, lock_tenant, new_id
from service.errors import InvalidRequestError, NotFoundError
from service.tables import adapter_versions, api_keys, epoch_now, files, tenants

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Tenant:
    id: str
    name: str
    created_at: float


@dataclass(frozen=True)
class RemovedTenant:
    """What the tenant leaves behind outside the database, for the caller to remove."""

    tenant: Tenant
    storage_keys: tuple[str, ...]
    digests: tuple[str, ...]


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
            return tenant, _issue_key(connection, tenant.id)

    def list(self) -> list[Tenant]:
        """By name."""
        with self._database.read() as connection:
            return [_tenant(row) for row in connection.execute(sa.select(tenants).order_by(tenants.c.name))]

    def get(self, tenant_id: str) -> Tenant:
        with self._database.read() as connection:
            return _get(connection, tenant_id)

    def delete(self, tenant_id: str) -> RemovedTenant:
        """Its keys, files, jobs, models and aliases go with it, in one transaction."""
        with self._database.begin() as connection:
            lock_tenant(connection, tenant_id)
            tenant = _get(connection, tenant_id)
            keys = connection.execute(sa.select(files.c.storage_key).where(files.c.tenant_id == tenant_id))
            storage_keys = tuple(keys.scalars())
            digests = tuple(connection.execute(_digests_of_nobody_else(tenant_id)).scalars())
            connection.execute(tenants.delete().where(tenants.c.id == tenant_id))
        return RemovedTenant(tenant, storage_keys, digests)

    def rotate_key(self, tenant_id: str) -> str:
        """A new key; every older one stops working."""
        with self._database.begin() as connection:
            lock_tenant(connection, tenant_id)
            connection.execute(api_keys.delete().where(api_keys.c.tenant_id == tenant_id))
            return _issue_key(connection, tenant_id)

    def authenticate(self, api_key: str) -> Tenant | None:
        """Whose key this is; None for a key that is not ours."""
        found = key_id(api_key)
        if found is None:
            return None
        query = sa.select(tenants, api_keys.c.digest).join(api_keys).where(api_keys.c.id == found)
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
        if row is None or not hmac.compare_digest(row.digest, _digest(api_key)):
            return None
        return _tenant(row)


def _issue_key(connection: Connection, tenant_id: str) -> str:
    key_id = secrets.token_hex(6)
    api_key = f"rs-{key_id}-{secrets.token_urlsafe(32)}"
    row = {"id": key_id, "tenant_id": tenant_id, "digest": _digest(api_key), "created_at": epoch_now()}
    connection.execute(api_keys.insert().values(row))
    return api_key


def key_id(api_key: str) -> str | None:
    """The part of a key that is no secret; None for what is no key."""
    parts = api_key.split("-", 2)
    return parts[1] if len(parts) == 3 and parts[0] == "rs" and parts[1].isascii() else None


def _digest(api_key: str) -> str:
    return hashlib.sha256(api_key.encode()).hexdigest()


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
