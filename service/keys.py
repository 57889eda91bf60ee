"""API keys: what one looks like, what it may do, until when. Rows and values; knows no HTTP.

A key is `rs-{key id}-{secret}` with 256 random bits of secret. The database holds the key id in clear, to find the
row, and the sha256 of the whole key, compared in constant time. (A slow hash would protect guessable passwords;
256 random bits cannot be guessed.)
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.database import database_now
from service.errors import ConflictError, NotFoundError
from service.tables import api_keys, epoch_now

MAX_KEYS = 100
"""Of one tenant, expired ones not counted."""


class Role(StrEnum):
    """`ADMIN` may do whatever its tenant may, `INFERENCE` only ask for answers."""

    ADMIN = "admin"
    INFERENCE = "inference"


@dataclass(frozen=True)
class Key:
    """All of it but the secret. `expires_at` None: never."""

    id: str
    tenant_id: str
    role: Role
    name: str | None
    created_at: float
    expires_at: float | None


def issue(
    connection: Connection,
    tenant_id: str,
    *,
    role: Role = Role.ADMIN,
    name: str | None = None,
    expires_in_seconds: float | None = None,
) -> tuple[Key, str]:
    """A new key and its text, which is shown this once. The caller holds `lock_tenant`."""
    valid = sa.select(sa.func.count()).select_from(api_keys).where(api_keys.c.tenant_id == tenant_id, alive())
    if connection.execute(valid).scalar_one() >= MAX_KEYS:
        raise ConflictError(f"A tenant may have {MAX_KEYS} keys at most: revoke one first.", code="too_many_keys")
    text = f"rs-{secrets.token_hex(6)}-{secrets.token_urlsafe(32)}"
    id_, now = key_id(text), database_now(connection)
    assert id_ is not None
    key = Key(id_, tenant_id, role, name, now, None if expires_in_seconds is None else now + expires_in_seconds)
    connection.execute(api_keys.insert().values(**key.__dict__, digest=digest(text)))
    return key, text


def end_others(connection: Connection, kept: Key, overlap_seconds: float = 0.0) -> None:
    """The tenant's other keys stop working: at once, or after the overlap (if they would not have sooner)."""
    end_keys(connection, sa.and_(api_keys.c.tenant_id == kept.tenant_id, api_keys.c.id != kept.id), overlap_seconds)


def end_keys(connection: Connection, which: sa.ColumnElement[bool], overlap_seconds: float) -> None:
    if overlap_seconds == 0.0:
        connection.execute(api_keys.delete().where(which))
        return
    ends = database_now(connection) + overlap_seconds
    later = sa.or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > ends)
    connection.execute(api_keys.update().where(which, later).values(expires_at=ends))


def keys_of(connection: Connection, tenant_id: str) -> list[Key]:
    """Oldest first; expired ones too, so that one can see why a client fails."""
    query = sa.select(api_keys).where(api_keys.c.tenant_id == tenant_id)
    return [key_of(row) for row in connection.execute(query.order_by(api_keys.c.created_at, api_keys.c.id))]


def get_key(connection: Connection, tenant_id: str, id_: str) -> Key:
    query = sa.select(api_keys).where(api_keys.c.tenant_id == tenant_id, api_keys.c.id == id_)
    row = connection.execute(query).one_or_none()
    if row is None:
        raise NotFoundError(f"There is no key '{id_}'.", param="key_id", code="key_not_found")
    return key_of(row)


def key_of(row: sa.Row[Any]) -> Key:
    return Key(row.id, row.tenant_id, Role(row.role), row.name, row.created_at, row.expires_at)


def alive() -> sa.ColumnElement[bool]:
    return sa.or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > epoch_now())


def key_id(api_key: str) -> str | None:
    """The part of a key that is no secret; None for what is no key."""
    parts = api_key.split("-", 2)
    return parts[1] if len(parts) == 3 and parts[0] == "rs" and parts[1].isascii() else None


def matches(api_key: str, expected_digest: str) -> bool:
    return hmac.compare_digest(expected_digest, digest(api_key))


def digest(api_key: str) -> str:
    return hashlib.sha256(api_key.encode()).hexdigest()
