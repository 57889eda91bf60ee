"""When a stored adapter is damaged or lost, each alias that pointed at it goes back to its nearest whole version.

The move is one transaction, recorded in the alias's history (`fallback`) and in the audit log. Nothing is moved to a
version whose bytes were not verified just now, nor to one of another base. Knows no HTTP and no engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import sqlalchemy as sa
import structlog

from adapters.errors import AdapterError
from adapters.store import AdapterStore
from service.aliases import MoveKind, active_model, move_back, moves_before
from service.audit import record
from service.database import Database, lock_tenant
from service.errors import NotFoundError
from service.registry import Registry
from service.tables import adapter_versions, alias_moves, aliases
from service.versions import find_version

log = structlog.get_logger("service.fallback")

ACTOR = "service"


class FallbackObserver(Protocol):
    """Hears of each alias that moved, or could not."""

    def alias_fell_back(self, outcome: str) -> None: ...


@dataclass(frozen=True)
class FallenBack:
    tenant_id: str
    alias: str
    damaged: str
    model: str


class Fallback:
    def __init__(self, database: Database, registry: Registry, store: AdapterStore, observer: FallbackObserver) -> None:
        self._database = database
        self._registry = registry
        self._store = store
        self._observer = observer

    def away_from(self, digest: str) -> list[FallenBack]:
        """Called by whoever found that this adapter cannot be read. Where it can after all, nothing moves.

        Raises StoreError when the store does not answer: then nobody knows.
        """
        try:
            self._store.verify(digest)
            return []
        except AdapterError as error:
            if error.code not in ("adapter_damaged", "adapter_not_found"):
                raise
        moved = []
        for tenant_id, alias, damaged in self._pointing_at(digest):
            model = self._whole_version(tenant_id, alias)
            if model is None:
                log.error("alias_has_no_fallback", tenant=tenant_id, alias=alias, model=damaged, digest=digest)
                self._observer.alias_fell_back("nothing_to_fall_back_to")
            elif self._move(tenant_id, alias, damaged, model):
                log.error("alias_fell_back", tenant=tenant_id, alias=alias, damaged=damaged, model=model, digest=digest)
                self._observer.alias_fell_back("moved")
                moved.append(FallenBack(tenant_id, alias, damaged, model))
        return moved

    def _pointing_at(self, digest: str) -> list[tuple[str, str, str]]:
        """(tenant, alias, model)."""
        joined = aliases.join(alias_moves, aliases.c.move == alias_moves.c.seq).join(
            adapter_versions,
            sa.and_(adapter_versions.c.id == alias_moves.c.model, adapter_versions.c.tenant_id == aliases.c.tenant_id),
        )
        shown = (aliases.c.tenant_id, aliases.c.name, alias_moves.c.model)
        query = sa.select(*shown).select_from(joined).where(adapter_versions.c.digest == digest)
        with self._database.read() as connection:
            return [(row.tenant_id, row.name, row.model) for row in connection.execute(query)]

    def _whole_version(self, tenant_id: str, alias: str) -> str | None:
        """The nearest of its earlier models that can be served, read from the store to be sure."""
        with self._database.read() as connection:
            models = [move.model for move in moves_before(connection, tenant_id, alias)]
            versions = [find_version(connection, tenant_id, model) for model in models]
        for version in versions:
            if version is None or not self._registry.serves(version):
                continue
            try:
                self._store.verify(version.digest)
            except AdapterError as error:
                log.warning("fallback_passed_over", tenant=tenant_id, model=version.id, reason=error.message)
                continue
            return version.id
        return None

    def _move(self, tenant_id: str, alias: str, damaged: str, model: str) -> bool:
        """False when the tenant, or somebody else, was quicker."""
        with self._database.begin() as connection:
            try:
                lock_tenant(connection, tenant_id)
            except NotFoundError:
                return False
            if active_model(connection, tenant_id, alias) != damaged:
                return False
            target = next((move for move in moves_before(connection, tenant_id, alias) if move.model == model), None)
            if target is None:
                return False
            move_back(connection, tenant_id, alias, target, MoveKind.FALLBACK)
            record(connection, ACTOR, "alias.fallback", tenant_id, alias=alias, damaged=damaged, model=model)
            return True
