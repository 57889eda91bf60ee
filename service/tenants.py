"""Tenants and their API keys. Knows no HTTP.

A key is `rs-{key id}-{secret}` with 256 random bits of secret. The database holds the key id in clear, to find the
row, and the sha256 of the whole key, compared in constant time. (A slow hash would protect guessable passwords;
256 random bits cannot be guessed.)
"""

from __future__ import annotations

from dataclasses import dataclass

from service.database import Database


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
        raise NotImplementedError

    def create(self, name: str) -> tuple[Tenant, str]:
        """The tenant and its API key, which is shown this once."""
        raise NotImplementedError

    def list(self) -> list[Tenant]:
        raise NotImplementedError

    def get(self, tenant_id: str) -> Tenant:
        raise NotImplementedError

    def delete(self, tenant_id: str) -> RemovedTenant:
        """Its keys, files, jobs, models and aliases go with it, in one transaction."""
        raise NotImplementedError

    def rotate_key(self, tenant_id: str) -> str:
        """A new key; every older one stops working."""
        raise NotImplementedError

    def authenticate(self, api_key: str) -> Tenant | None:
        raise NotImplementedError
