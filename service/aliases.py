"""A tenant's stable names for its models: pointers with history. Knows no HTTP.

Setting, publishing and rolling back are the same move: one appended row, and the pointer set to it in the same
transaction. `previous` of a move is where a rollback of it goes, so rolling back twice goes back two.
A canary or a shadow compares with what the alias points at, so any move ends them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.steps import Reached, unwatched
from service.database import Database, lock_tenant
from service.errors import ConflictError, InvalidRequestError, NotFoundError
from service.experiment import Outcome
from service.experiment_rows import end_experiments
from service.tables import adapter_versions, alias_moves, aliases, epoch_now
from service.versions import find_version, model_not_found

ALIAS_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
NUM_MOVES_SHOWN = 100


class MoveKind(StrEnum):
    """Why an alias moved: a client set it, a job published to it, a version was promoted, it was rolled back, or what
    it pointed at was found damaged (`service.fallback`)."""

    SET = "set"
    PUBLISHED = "published"
    PROMOTED = "promoted"
    ROLLBACK = "rollback"
    FALLBACK = "fallback"


@dataclass(frozen=True)
class AliasMove:
    model: str
    kind: MoveKind
    created_at: float


@dataclass(frozen=True)
class Alias:
    """`history` is newest first (the last 100 moves); its first entry is the active pointer."""

    name: str
    model: str
    digest: str
    updated_at: float
    history: tuple[AliasMove, ...]
    base_fingerprint: str = ""
    """Of the base that the model belongs to."""


class Aliases:
    def __init__(self, database: Database, base_model: str, reached: Reached = unwatched) -> None:
        self._database = database
        self._reached = reached
        self._base_model = base_model

    def list(self, tenant_id: str) -> list[Alias]:
        """By name."""
        names = sa.select(aliases.c.name).where(aliases.c.tenant_id == tenant_id).order_by(aliases.c.name)
        with self._database.read() as connection:
            return [alias_in(connection, tenant_id, name) for name in connection.execute(names).scalars()]

    def get(self, tenant_id: str, name: str) -> Alias:
        with self._database.read() as connection:
            return alias_in(connection, tenant_id, name)

    def set(self, tenant_id: str, name: str, model: str) -> Alias:
        """Point `name` at one of the tenant's own versions or checkpoints; setting it again is no move."""
        check_alias_name(name, self._base_model)
        with self._database.begin() as connection:
            lock_tenant(connection, tenant_id)
            if find_version(connection, tenant_id, model) is None:
                raise model_not_found(model)
            if active_model(connection, tenant_id, name) != model:
                move_alias(connection, tenant_id, name, model, MoveKind.SET)
            found = alias_in(connection, tenant_id, name)
            self._reached("alias.moved")
        self._reached("alias.committed")
        return found

    def moves_to(self, tenant_id: str, model: str) -> tuple[tuple[str, AliasMove], ...]:
        """Every move of any alias to this model, newest first, with the alias's name."""
        query = sa.select(alias_moves).where(alias_moves.c.tenant_id == tenant_id, alias_moves.c.model == model)
        with self._database.read() as connection:
            rows = connection.execute(query.order_by(alias_moves.c.seq.desc()).limit(NUM_MOVES_SHOWN))
            return tuple((row.alias, AliasMove(row.model, MoveKind(row.kind), row.created_at)) for row in rows)

    def delete(self, tenant_id: str, name: str) -> None:
        """The pointer and its history; the models stay, a running canary or shadow ends."""
        with self._database.begin() as connection:
            lock_tenant(connection, tenant_id)
            alias_in(connection, tenant_id, name)
            end_experiments(connection, tenant_id, name, Outcome.ALIAS_DELETED, "The alias was deleted.")
            mine = sa.and_(aliases.c.tenant_id == tenant_id, aliases.c.name == name)
            connection.execute(aliases.delete().where(mine))
            moves = sa.and_(alias_moves.c.tenant_id == tenant_id, alias_moves.c.alias == name)
            connection.execute(alias_moves.delete().where(moves))

    def roll_back(self, tenant_id: str, name: str) -> Alias:
        """Back to what it pointed at before (models deleted since are skipped); a second call goes further."""
        with self._database.begin() as connection:
            lock_tenant(connection, tenant_id)
            alias_in(connection, tenant_id, name)
            target = _rollback_target(connection, tenant_id, name)
            if target is None:
                raise ConflictError(
                    f"Alias '{name}' has no earlier model to go back to.", param="alias", code="nothing_to_roll_back"
                )
            move_back(connection, tenant_id, name, target, MoveKind.ROLLBACK)
            return alias_in(connection, tenant_id, name)


def check_alias_name(name: str, base_model: str) -> None:
    """Raises InvalidRequestError for a name that no alias may have: the base's own would never be reached."""
    if name == base_model:
        raise InvalidRequestError(f"'{name}' is the base model and cannot be an alias.", param="alias")
    if not re.fullmatch(ALIAS_PATTERN, name):
        raise InvalidRequestError(
            f"'{name}' is no alias: use 1 to 64 letters, digits, '.', '_' or '-', a letter or digit first.",
            param="alias",
        )


def move_alias(connection: Connection, tenant_id: str, name: str, model: str, kind: MoveKind) -> None:
    """Point `name` at `model`, creating it if need be, in the caller's transaction (which holds `lock_tenant`)."""
    active = _active_move(connection, tenant_id, name)
    _append(connection, tenant_id, name, model, kind, None if active is None else active.seq)


def active_model(connection: Connection, tenant_id: str, name: str) -> str | None:
    move = _active_move(connection, tenant_id, name)
    return None if move is None else move.model


def names_pointing_at(connection: Connection, tenant_id: str, model: str) -> list[str]:
    query = _joined(sa.select(aliases.c.name)).where(aliases.c.tenant_id == tenant_id, alias_moves.c.model == model)
    return list(connection.execute(query.order_by(aliases.c.name)).scalars())


def _append(
    connection: Connection, tenant_id: str, name: str, model: str, kind: MoveKind, previous: int | None
) -> None:
    end_experiments(connection, tenant_id, name, Outcome.SUPERSEDED, f"The alias moved to '{model}' ({kind}).")
    move = {"tenant_id": tenant_id, "alias": name, "model": model, "kind": kind, "previous": previous}
    insert = alias_moves.insert().values(**move, created_at=epoch_now()).returning(alias_moves.c.seq)
    seq = connection.execute(insert).scalar_one()
    pointer = aliases.update().where(aliases.c.tenant_id == tenant_id, aliases.c.name == name)
    if connection.execute(pointer.values(move=seq)).rowcount == 0:
        connection.execute(aliases.insert().values(tenant_id=tenant_id, name=name, move=seq))


def _active_move(connection: Connection, tenant_id: str, name: str) -> sa.Row[Any] | None:
    query = _joined(sa.select(alias_moves)).where(aliases.c.tenant_id == tenant_id, aliases.c.name == name)
    return connection.execute(query).one_or_none()


def _rollback_target(connection: Connection, tenant_id: str, name: str) -> sa.Row[Any] | None:
    """The nearest earlier move to another model that still exists."""
    return next(moves_before(connection, tenant_id, name), None)


def moves_before(connection: Connection, tenant_id: str, name: str) -> Iterator[sa.Row[Any]]:
    """The earlier moves to other models that still exist, nearest first: where a rollback may go."""
    active = _active_move(connection, tenant_id, name)
    previous = None if active is None else active.previous
    while active is not None and previous is not None:
        move = connection.execute(sa.select(alias_moves).where(alias_moves.c.seq == previous)).one()
        if move.model != active.model and find_version(connection, tenant_id, move.model) is not None:
            yield move
        previous = move.previous


def move_back(connection: Connection, tenant_id: str, name: str, target: sa.Row[Any], kind: MoveKind) -> None:
    """Point `name` where the earlier move `target` pointed; a rollback of this goes on from there."""
    _append(connection, tenant_id, name, target.model, kind, target.previous)


def alias_in(connection: Connection, tenant_id: str, name: str) -> Alias:
    """Raises NotFoundError (`alias_not_found`)."""
    active = _active_move(connection, tenant_id, name)
    if active is None:
        raise NotFoundError(f"There is no alias '{name}'.", param="alias", code="alias_not_found")
    moves = sa.select(alias_moves).where(alias_moves.c.tenant_id == tenant_id, alias_moves.c.alias == name)
    newest = connection.execute(moves.order_by(alias_moves.c.seq.desc()).limit(NUM_MOVES_SHOWN))
    history = tuple(AliasMove(move.model, MoveKind(move.kind), move.created_at) for move in newest)
    v = adapter_versions.c
    row = connection.execute(sa.select(v.digest, v.base_fingerprint).where(v.id == active.model)).one()
    return Alias(name, active.model, row.digest, active.created_at, history, row.base_fingerprint)


def _joined(query: sa.Select[Any]) -> sa.Select[Any]:
    return query.select_from(aliases.join(alias_moves, aliases.c.move == alias_moves.c.seq))
