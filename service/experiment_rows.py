"""Experiments and their measures as rows, in the caller's transaction. Knows no alias's pointer and no decision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.database import new_id
from service.experiment import MEASURES, Arm, CanaryPolicy, Experiment, ExperimentKind, Measure, Measured, Outcome
from service.intervals import Moments
from service.tables import epoch_now, experiment_measures, experiments
from service.versions import AdapterVersion

MeasureKey = tuple[str, Arm, Measure]
"""Experiment id, arm and measure."""


def insert_experiment(
    connection: Connection,
    alias: str,
    kind: ExperimentKind,
    stable: AdapterVersion,
    candidate: AdapterVersion,
    percent: float,
    policy: CanaryPolicy | None,
) -> str:
    """A running experiment with all its measures at zero; its id. The caller holds `lock_tenant`."""
    experiment_id = new_id("exp")
    connection.execute(
        experiments.insert().values(
            id=experiment_id,
            tenant_id=candidate.tenant_id,
            alias=alias,
            kind=kind,
            stable_model=stable.id,
            stable_digest=stable.digest,
            model=candidate.id,
            digest=candidate.digest,
            percent=percent,
            policy={} if policy is None else asdict(policy),
            created_at=epoch_now(),
        )
    )
    names = [
        {"experiment_id": experiment_id, "arm": arm, "name": name}
        for arm, measures in MEASURES[kind].items()
        for name in measures
    ]
    connection.execute(experiment_measures.insert(), names)
    return experiment_id


def running_experiment(connection: Connection, tenant_id: str, alias: str, kind: ExperimentKind) -> Experiment | None:
    mine = sa.and_(_running(tenant_id, alias), experiments.c.kind == kind)
    row = connection.execute(sa.select(experiments).where(mine)).one_or_none()
    return None if row is None else experiment_of(row)


def find_experiment(connection: Connection, experiment_id: str) -> Experiment | None:
    row = connection.execute(sa.select(experiments).where(experiments.c.id == experiment_id)).one_or_none()
    return None if row is None else experiment_of(row)


def end_experiment(connection: Connection, experiment_id: str, outcome: Outcome, reason: str) -> bool:
    """False when it had ended already: whoever comes first decides."""
    still_running = sa.and_(experiments.c.id == experiment_id, experiments.c.outcome.is_(None))
    ended = experiments.update().where(still_running).values(outcome=outcome, reason=reason, ended_at=epoch_now())
    return connection.execute(ended).rowcount == 1


def end_experiments(connection: Connection, tenant_id: str, alias: str, outcome: Outcome, reason: str) -> None:
    """The canary and the shadow of an alias, if they run."""
    ended = {"outcome": outcome, "reason": reason, "ended_at": epoch_now()}
    connection.execute(experiments.update().where(_running(tenant_id, alias)).values(**ended))


def aliases_trying(connection: Connection, tenant_id: str, model: str) -> list[str]:
    """The aliases that have the model as their running canary or shadow."""
    mine = sa.and_(experiments.c.tenant_id == tenant_id, experiments.c.model == model, experiments.c.outcome.is_(None))
    return list(connection.execute(sa.select(experiments.c.alias).where(mine).distinct()).scalars())


def add_measures(connection: Connection, added: Mapping[MeasureKey, Moments]) -> None:
    """In one order always, so that two writers never wait in a circle. An experiment that is gone takes nothing."""
    c = experiment_measures.c
    for (experiment_id, arm, name), moments in sorted(added.items()):
        connection.execute(
            experiment_measures.update()
            .where(c.experiment_id == experiment_id, c.arm == arm, c.name == name)
            .values(
                count=c.count + moments.count,
                total=c.total + moments.total,
                squares=c.squares + moments.squares,
            )
        )


def measured(connection: Connection, experiment_id: str) -> Measured:
    rows = connection.execute(
        sa.select(experiment_measures).where(experiment_measures.c.experiment_id == experiment_id)
    )
    return {(Arm(row.arm), Measure(row.name)): Moments(*row[3:]) for row in rows}


def experiment_of(row: sa.Row[Any]) -> Experiment:
    kind = ExperimentKind(row.kind)
    return Experiment(
        id=row.id,
        tenant_id=row.tenant_id,
        alias=row.alias,
        kind=kind,
        stable_model=row.stable_model,
        stable_digest=row.stable_digest,
        model=row.model,
        digest=row.digest,
        percent=row.percent,
        policy=CanaryPolicy(**row.policy) if kind is ExperimentKind.CANARY else None,
        created_at=row.created_at,
        outcome=None if row.outcome is None else Outcome(row.outcome),
        reason=row.reason,
        ended_at=row.ended_at,
    )


def _running(tenant_id: str, alias: str) -> sa.ColumnElement[bool]:
    return sa.and_(experiments.c.tenant_id == tenant_id, experiments.c.alias == alias, experiments.c.outcome.is_(None))
