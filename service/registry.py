"""What a model id means to a tenant: the base, an adapter version, a checkpoint or an alias. Knows no HTTP, no tensors.

A tenant that asks for somebody else's model learns that there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.errors import StaleAdapterError, StoreError
from adapters.steps import Reached, unwatched
from adapters.store import AdapterStore
from service import drift_rows
from service.aliases import Alias, Aliases, MoveKind, active_model, check_alias_name, move_alias, names_pointing_at
from service.database import Database, lock_tenant
from service.errors import ConflictError, InvalidRequestError
from service.experiment_rows import aliases_trying
from service.quotas import check_adapter
from service.references import hold_new_references, needed
from service.routing import Found, ResolvedModel, Route, Servable, find, route_of
from service.tables import adapter_versions, jobs
from service.versions import AdapterVersion, find_version, insert_version, model_not_found, version_of


@dataclass(frozen=True)
class BaseIdentity:
    """The base that is loaded: the id clients use, and what its weights are."""

    name: str
    fingerprint: str
    created_at: float = 0.0


class Registry:
    def __init__(self, database: Database, base: BaseIdentity, reached: Reached = unwatched) -> None:
        self._database = database
        self.base = base
        self.aliases = Aliases(database, base.name, reached)

    def resolve(self, tenant_id: str, model: str) -> ResolvedModel:
        """What base id, version id, checkpoint id or alias `model` is, for use in a request; of an alias what it
        points at, whatever it tries out.

        Raises NotFoundError (`model_not_found`), or StaleAdapterError when the adapter was trained on other
        weights than the loaded ones, or the same held otherwise.
        """
        if model == self.base.name:
            return ResolvedModel(model, None)
        return self._find(tenant_id, model).stable.model

    def route(self, tenant_id: str, model: str, who: Callable[[], str]) -> Route:
        """As `resolve`, and the end user's side of the alias's canary. `who` is asked only if there is one."""
        if model == self.base.name:
            return Route(ResolvedModel(model, None))
        return route_of(self._find(tenant_id, model), who, self.serves)

    def serves(self, version: Servable | AdapterVersion | Alias) -> bool:
        """Whether it, or what it points at, was trained on the weights that are loaded, held as they are."""
        return version.base_fingerprint == self.base.fingerprint

    def num_stale(self) -> int:
        """Of all tenants' published models: how many belong to another base than the loaded one."""
        stale = sa.and_(adapter_versions.c.step.is_(None), adapter_versions.c.base_fingerprint != self.base.fingerprint)
        with self._database.read() as connection:
            return int(connection.execute(sa.select(sa.func.count()).where(stale)).scalar_one())

    def versions(self, tenant_id: str) -> list[AdapterVersion]:
        """Published models, newest first; checkpoints are not listed."""
        query = sa.select(adapter_versions).where(
            adapter_versions.c.tenant_id == tenant_id, adapter_versions.c.step.is_(None)
        )
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(adapter_versions.c.seq.desc()))
            return [version_of(row) for row in rows]

    def version(self, tenant_id: str, model: str) -> AdapterVersion:
        """Of a version id, a checkpoint id or an alias (what it points at). Raises NotFoundError."""
        with self._database.read() as connection:
            found = find_version(connection, tenant_id, model)
            if found is None:
                target = active_model(connection, tenant_id, model)
                found = None if target is None else find_version(connection, tenant_id, target)
        if found is None:
            raise model_not_found(model)
        return found

    def publish(self, version: AdapterVersion, alias: str | None = None) -> AdapterVersion:
        """Register an adapter that no job made, and move `alias` to it, in one transaction. Again, it is no change.

        Raises QuotaExceededError.
        """
        if alias is not None:
            check_alias_name(alias, self.base.name)
        with self._database.begin() as connection:
            lock_tenant(connection, version.tenant_id)
            known = find_version(connection, version.tenant_id, version.id)
            if known is None:
                check_adapter(connection, version.tenant_id)
                insert_version(connection, version)
            elif known.digest != version.digest:
                raise ConflictError(
                    f"Another adapter is called '{version.id}' already: use another suffix.",
                    param="suffix",
                    code="model_exists",
                )
            elif not self.serves(known):  # it was vouched for again, for this base
                renewed = {"base_model": version.base_model, "base_fingerprint": version.base_fingerprint}
                mine = adapter_versions.c.id == known.id
                connection.execute(adapter_versions.update().where(mine).values(**renewed))
            if alias is not None and active_model(connection, version.tenant_id, alias) != version.id:
                move_alias(connection, version.tenant_id, alias, version.id, MoveKind.SET)
            published = find_version(connection, version.tenant_id, version.id)
            assert published is not None
            return published

    def delete_model(self, tenant_id: str, model: str) -> str | None:
        """The digest that nobody refers to any more, for the caller to retire; None when somebody still does.

        Refused while an alias points at the model or tries it out, or an unfinished job starts from it.
        """
        if model == self.base.name:
            raise InvalidRequestError("The base model cannot be deleted.", param="model")
        with self._database.begin() as connection:
            lock_tenant(connection, tenant_id)
            version = find_version(connection, tenant_id, model)
            if version is None:
                raise model_not_found(model)
            _refuse_if_used(connection, version)
            connection.execute(adapter_versions.delete().where(adapter_versions.c.id == version.id))
            drift_rows.delete_unless_published(connection, tenant_id, version.digest)
            others = sa.select(adapter_versions.c.id).where(adapter_versions.c.digest == version.digest)
            return None if connection.execute(others).first() else version.digest

    def discard(self, store: AdapterStore, digest: str) -> bool:
        """Remove an adapter's files, unless somebody has published the very same since its last row was deleted."""
        with self._database.begin() as connection:
            hold_new_references(connection)
            if needed(connection, digest):
                return False
            with suppress(StoreError):  # it is swept away later
                store.delete(digest)
            return True

    def _find(self, tenant_id: str, model: str) -> Found:
        with self._database.read() as connection:
            found = find(connection, tenant_id, model)
        if found is None:
            raise model_not_found(model)
        self.check_base(found.stable)
        return found

    def check_base(self, version: Servable | AdapterVersion) -> None:
        """Raises StaleAdapterError."""
        if not self.serves(version):
            raise StaleAdapterError(
                f"Model '{version.id}' is stale: it was trained on '{version.base_model}' with other weights or "
                f"another quantization than the loaded base '{self.base.name}'. Fine-tune or import it again, or let "
                "the operator go back to the former base",
                param="model",
            )


def _refuse_if_used(connection: Connection, version: AdapterVersion) -> None:
    names = names_pointing_at(connection, version.tenant_id, version.id)
    if names:
        raise ConflictError(
            f"The alias {', '.join(names)} points at model '{version.id}': move or delete the alias first.",
            param="model",
            code="model_in_use",
        )
    names = aliases_trying(connection, version.tenant_id, version.id)
    if names:
        raise ConflictError(
            f"The alias {', '.join(names)} tries out model '{version.id}' as its canary or shadow: end that first.",
            param="model",
            code="model_in_use",
        )
    starts_from_it = sa.select(jobs.c.id).where(
        jobs.c.parent_digest == version.digest, jobs.c.state.in_(("queued", "running"))
    )
    job = connection.execute(starts_from_it).scalars().first()
    if job is not None:
        raise ConflictError(
            f"The fine-tuning job '{job}' starts from model '{version.id}': cancel it or wait for its end.",
            param="model",
            code="model_in_use",
        )
