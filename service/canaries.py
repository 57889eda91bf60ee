"""Trying a version out on an alias: canary, promotion, shadow, and what became of them. Knows no HTTP.

Whoever ends an experiment first decides how: every end is one fenced write, in the transaction that moves the alias.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Protocol

import sqlalchemy as sa
import structlog
from sqlalchemy.engine import Connection

from service.aliases import Alias, MoveKind, active_model, alias_in, move_alias
from service.database import Database, Page, lock_tenant, page_of
from service.errors import ConflictError, InvalidRequestError, NotFoundError
from service.experiment import CanaryPolicy, Experiment, ExperimentKind, Measured, Outcome
from service.experiment_rows import (
    end_experiment,
    experiment_of,
    find_experiment,
    insert_experiment,
    measured,
    running_experiment,
)
from service.registry import Registry
from service.tables import experiments
from service.verdict import Verdict, verdict
from service.versions import AdapterVersion, find_version, model_not_found

log = structlog.get_logger("service.canaries")


class CanaryObserver(Protocol):
    """Hears of what happened by itself."""

    def canary_ended(self, outcome: str, reason: str) -> None: ...


class Canaries:
    def __init__(self, database: Database, registry: Registry, observer: CanaryObserver | None = None) -> None:
        self._database = database
        self._registry = registry
        self._observer = observer

    def set_canary(self, tenant_id: str, alias: str, model: str, percent: float, policy: CanaryPolicy) -> Experiment:
        """Send `percent` of the alias's end users to `model`. Set again with the same model, it goes on with another
        share or policy; what it has shown so far stays."""
        return self._set(tenant_id, alias, ExperimentKind.CANARY, model, percent, policy)

    def set_shadow(self, tenant_id: str, alias: str, model: str, percent: float) -> Experiment:
        """Let `model` answer a copy of `percent` of the alias's requests, for nobody to see."""
        return self._set(tenant_id, alias, ExperimentKind.SHADOW, model, percent, None)

    def running(self, tenant_id: str, alias: str, kind: ExperimentKind) -> Experiment:
        with self._database.read() as connection:
            alias_in(connection, tenant_id, alias)
            return _running(connection, tenant_id, alias, kind)

    def abort(self, tenant_id: str, alias: str, kind: ExperimentKind) -> Experiment:
        with self._database.begin() as connection:
            lock_tenant(connection, tenant_id)
            alias_in(connection, tenant_id, alias)
            found = _running(connection, tenant_id, alias, kind)
            end_experiment(connection, found.id, Outcome.ABORTED, "It was ended by hand.")
            return _reread(connection, found.id)

    def promote(self, tenant_id: str, alias: str, model: str | None) -> Alias:
        """Point the alias at its canary, or at `model`. Whatever ran on the alias ends."""
        with self._database.begin() as connection:
            lock_tenant(connection, tenant_id)
            alias_in(connection, tenant_id, alias)
            canary = running_experiment(connection, tenant_id, alias, ExperimentKind.CANARY)
            if model is None and canary is None:
                raise ConflictError(
                    f"Alias '{alias}' has no canary to promote: start one, or name the 'model'.",
                    param="model",
                    code="no_canary",
                )
            chosen = canary.model if model is None and canary is not None else model
            assert chosen is not None
            if canary is not None and chosen == canary.model:
                end_experiment(connection, canary.id, Outcome.PROMOTED, "It was promoted by hand.")
            self._version(connection, tenant_id, chosen)
            if active_model(connection, tenant_id, alias) != chosen:
                move_alias(connection, tenant_id, alias, chosen, MoveKind.PROMOTED)
            return alias_in(connection, tenant_id, alias)

    def list(self, tenant_id: str, alias: str, *, after: str | None, limit: int) -> Page[Experiment]:
        """Of one alias, newest first, ended ones too; also of an alias that was deleted since."""
        query = sa.select(experiments).where(experiments.c.tenant_id == tenant_id, experiments.c.alias == alias)
        with self._database.read() as connection:
            rows, has_more = page_of(connection, query, experiments, after=after, limit=limit, descending=True)
            if not rows:
                alias_in(connection, tenant_id, alias)
            return Page(tuple(experiment_of(row) for row in rows), has_more)

    def measured(self, experiment: Experiment) -> Measured:
        with self._database.read() as connection:
            return measured(connection, experiment.id)

    def judge(self, experiment_id: str) -> None:
        """End a canary whose numbers say so. Called after every batch of them; somebody else may be quicker."""
        with self._database.read() as connection:
            canary = find_experiment(connection, experiment_id)
            if canary is None or canary.policy is None or not canary.is_running:
                return
            found = verdict(measured(connection, experiment_id), canary.policy)
        if found is not None and self._end(canary, found):
            log.warning(
                f"canary_{found.outcome}",
                tenant=canary.tenant_id,
                alias=canary.alias,
                experiment=canary.id,
                model=canary.model,
                reason=found.reason,
            )
            if self._observer is not None:
                self._observer.canary_ended(found.outcome, found.measure or "none")

    def _end(self, canary: Experiment, found: Verdict) -> bool:
        with self._database.begin() as connection:
            try:
                lock_tenant(connection, canary.tenant_id)
            except NotFoundError:
                return False
            if not end_experiment(connection, canary.id, found.outcome, found.reason):
                return False
            if found.outcome is Outcome.PROMOTED:
                move_alias(connection, canary.tenant_id, canary.alias, canary.model, MoveKind.PROMOTED)
            return True

    def _set(
        self,
        tenant_id: str,
        alias: str,
        kind: ExperimentKind,
        model: str,
        percent: float,
        policy: CanaryPolicy | None,
    ) -> Experiment:
        with self._database.begin() as connection:
            lock_tenant(connection, tenant_id)
            stable = self._version(connection, tenant_id, alias_in(connection, tenant_id, alias).model)
            candidate = self._version(connection, tenant_id, model)
            if candidate.id == stable.id:
                raise InvalidRequestError(f"Alias '{alias}' points at '{model}' already.", param="model")
            running = running_experiment(connection, tenant_id, alias, kind)
            if running is None:
                experiment_id = insert_experiment(connection, alias, kind, stable, candidate, percent, policy)
                return _reread(connection, experiment_id)
            if running.model != candidate.id:
                raise ConflictError(
                    f"'{running.model}' is the {kind} of alias '{alias}': promote it or delete that {kind} first.",
                    param="model",
                    code=f"{kind}_running",
                )
            changed = {"percent": percent, "policy": {} if policy is None else asdict(policy)}
            connection.execute(experiments.update().where(experiments.c.id == running.id).values(**changed))
            return _reread(connection, running.id)

    def _version(self, connection: Connection, tenant_id: str, model: str) -> AdapterVersion:
        version = find_version(connection, tenant_id, model)
        if version is None:
            raise model_not_found(model)
        self._registry.check_base(version)
        return version


def _running(connection: Connection, tenant_id: str, alias: str, kind: ExperimentKind) -> Experiment:
    found = running_experiment(connection, tenant_id, alias, kind)
    if found is None:
        raise NotFoundError(
            f"Alias '{alias}' has no {kind}; ended ones are listed under /v1/aliases/{alias}/experiments.",
            param="alias",
            code=f"{kind}_not_found",
        )
    return found


def _reread(connection: Connection, experiment_id: str) -> Experiment:
    found = find_experiment(connection, experiment_id)
    assert found is not None
    return found
