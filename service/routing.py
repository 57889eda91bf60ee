"""Which model answers a request, as a part of what: one query, whatever is asked for. Knows no HTTP and no tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.experiment import Arm, ExperimentKind
from service.tables import adapter_versions, alias_moves, aliases, experiments
from service.traffic_split import place_of


@dataclass(frozen=True)
class ResolvedModel:
    """What a request's `model` means. `digest` is None for the base itself."""

    id: str
    digest: str | None

    @property
    def is_base(self) -> bool:
        return self.digest is None


@dataclass(frozen=True)
class Trial:
    """The answer counts in this experiment, on this side. `unit` stands for the end user there."""

    experiment_id: str
    arm: Arm
    unit: str


@dataclass(frozen=True)
class ShadowTarget:
    """Who may answer a copy of the request, for nobody to see, and how many percent of them."""

    experiment_id: str
    model: ResolvedModel
    percent: float


@dataclass(frozen=True)
class Route:
    """`alias` is what was asked for, if that was one; `trial` only while it has a canary."""

    model: ResolvedModel
    alias: str | None = None
    trial: Trial | None = None
    shadow: ShadowTarget | None = None
    fallen_from: str | None = None
    """The model that the alias pointed at until it was found damaged."""


@dataclass(frozen=True)
class Servable:
    """As much of a version as a request needs."""

    id: str
    digest: str
    base_model: str
    base_fingerprint: str

    @property
    def model(self) -> ResolvedModel:
        return ResolvedModel(self.id, self.digest)


@dataclass(frozen=True)
class Candidate:
    """What a running experiment tries out."""

    experiment_id: str
    percent: float
    version: Servable


@dataclass(frozen=True)
class Found:
    """What a name means: a version, or an alias's stable version with what it tries out beside it."""

    stable: Servable
    alias: str | None = None
    canary: Candidate | None = None
    shadow: Candidate | None = None
    fallen_from: str | None = None


def find(connection: Connection, tenant_id: str, name: str) -> Found | None:
    """The ids of versions hold a ':' and the names of aliases none; what looks like one is looked up as such first."""
    lookups: tuple[Callable[[Connection, dict[str, str]], Found | None], ...] = (_version, _alias)
    asked = {"tenant_id": tenant_id, "name": name}
    for lookup in lookups if ":" in name else reversed(lookups):
        if (found := lookup(connection, asked)) is not None:
            return found
    return None


def route_of(found: Found, who: Callable[[], str], serves: Callable[[Servable], bool]) -> Route:
    """The side of a canary that `who` is on, if there is one. What `serves` denies is not tried out."""
    model, trial, canary, shadow = found.stable.model, None, found.canary, found.shadow
    if canary is not None and serves(canary.version):
        place = place_of(canary.experiment_id, who())
        chosen = place.within(canary.percent)
        trial = Trial(canary.experiment_id, Arm.CANARY if chosen else Arm.STABLE, place.unit)
        model = canary.version.model if chosen else model
    target = None
    if shadow is not None and serves(shadow.version) and (trial is None or trial.arm is Arm.STABLE):
        target = ShadowTarget(shadow.experiment_id, shadow.version.model, shadow.percent)
    return Route(model, found.alias, trial, target, found.fallen_from)


_SHOWN = ("id", "digest", "base_model", "base_fingerprint")


def _columns(table: Any, prefix: str) -> list[sa.ColumnElement[Any]]:
    return [table.c[name].label(f"{prefix}_{name}") for name in _SHOWN]


def _by_id() -> sa.Select[Any]:
    v = adapter_versions
    asked = sa.and_(v.c.tenant_id == sa.bindparam("tenant_id"), v.c.id == sa.bindparam("name"))
    return sa.select(*_columns(v, "stable")).where(asked)


def _by_alias() -> sa.Select[Any]:
    """The pointer's version; for each kind of experiment that runs on the alias, the candidate's. One row or none."""
    stable = adapter_versions.alias("stable")
    joined = aliases.join(alias_moves, aliases.c.move == alias_moves.c.seq).join(
        stable, sa.and_(stable.c.id == alias_moves.c.model, stable.c.tenant_id == aliases.c.tenant_id)
    )
    shown = [*_columns(stable, "stable"), _fallen_from().label("fallen_from")]
    for kind in ExperimentKind:
        trial, version = experiments.alias(f"{kind}_trial"), adapter_versions.alias(kind.value)
        running = sa.and_(
            trial.c.tenant_id == aliases.c.tenant_id,
            trial.c.alias == aliases.c.name,
            trial.c.kind == sa.literal_column(f"'{kind}'"),
            trial.c.outcome.is_(None),
        )
        same = sa.and_(version.c.id == trial.c.model, version.c.tenant_id == trial.c.tenant_id)
        joined = joined.outerjoin(trial, running).outerjoin(version, same)
        shown += _columns(version, kind)
        shown += [trial.c.id.label(f"{kind}_trial"), trial.c.percent.label(f"{kind}_percent")]
    asked = sa.and_(aliases.c.tenant_id == sa.bindparam("tenant_id"), aliases.c.name == sa.bindparam("name"))
    return sa.select(*shown).select_from(joined).where(asked)


def _fallen_from() -> sa.ColumnElement[Any]:
    """What the alias pointed at before the move that is active, if that was a fallback."""
    before = alias_moves.alias("before")
    model = (
        sa.select(before.c.model)
        .where(
            before.c.tenant_id == aliases.c.tenant_id,
            before.c.alias == aliases.c.name,
            before.c.seq < alias_moves.c.seq,
        )
        .order_by(before.c.seq.desc())
        .limit(1)
        .correlate(aliases, alias_moves)
        .scalar_subquery()
    )
    return sa.case((alias_moves.c.kind == "fallback", model))


_BY_ID, _BY_ALIAS = _by_id(), _by_alias()
"""Built once: putting a statement together costs more than running it."""


def _version(connection: Connection, asked: dict[str, str]) -> Found | None:
    row = connection.execute(_BY_ID, asked).mappings().one_or_none()
    return None if row is None else Found(_servable(row, "stable"))


def _alias(connection: Connection, asked: dict[str, str]) -> Found | None:
    row = connection.execute(_BY_ALIAS, asked).mappings().one_or_none()
    if row is None:
        return None
    canary, shadow = (_candidate(row, kind) for kind in (ExperimentKind.CANARY, ExperimentKind.SHADOW))
    return Found(_servable(row, "stable"), asked["name"], canary, shadow, row["fallen_from"])


def _candidate(row: sa.RowMapping, kind: ExperimentKind) -> Candidate | None:
    if row[f"{kind}_id"] is None:
        return None
    return Candidate(row[f"{kind}_trial"], row[f"{kind}_percent"], _servable(row, kind))


def _servable(row: sa.RowMapping, prefix: str) -> Servable:
    return Servable(*(row[f"{prefix}_{name}"] for name in _SHOWN))
