"""The rows of the books: adding to an hour, booking what a job has trained, a deleted tenant's numbers. Decides nothing
about when."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from service.database import database_now
from service.tables import jobs, usage_hours

HOUR = 3600
DELETED_MODEL = "(deleted)"
"""In place of the models of a tenant that was deleted."""


@dataclass(frozen=True)
class Tokens:
    """What was used. `cached_tokens` are among the prompt's."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    training_tokens: int = 0

    def __add__(self, other: Tokens) -> Tokens:
        mine, theirs = asdict(self), asdict(other)
        return Tokens(**{name: mine[name] + theirs[name] for name in mine})


COUNTS = tuple(Tokens.__dataclass_fields__)


@dataclass(frozen=True, order=True)
class Account:
    """Where it is booked; in this order, so that two writers never wait for each other in a circle."""

    tenant_id: str
    hour: int
    key_id: str
    model: str


def hour_of(unix_seconds: float) -> int:
    return int(unix_seconds) // HOUR * HOUR


def add_to_books(connection: Connection, used: dict[Account, Tokens]) -> None:
    if not used:
        return
    statement = _ADD_SQLITE if connection.dialect.name == "sqlite" else _ADD_POSTGRES
    rows = [{**asdict(account), **asdict(used[account])} for account in sorted(used)]
    connection.execute(statement, rows)


def book_training(connection: Connection, job_id: str, trained_tokens: int | None = None) -> None:
    """Book what the job has trained beyond what is booked already; None: as far as its row tells.

    In the transaction that writes the job's row, which the caller has locked: a job that is taken up again from an
    earlier step is booked again only when it has passed what was booked.
    """
    columns = (jobs.c.tenant_id, jobs.c.key_id, jobs.c.spec, jobs.c.trained_tokens, jobs.c.booked_tokens)
    row = connection.execute(sa.select(*columns).where(jobs.c.id == job_id)).one()
    trained = (row.trained_tokens or 0) if trained_tokens is None else trained_tokens
    if trained <= row.booked_tokens:
        return
    hour = hour_of(database_now(connection))
    account = Account(row.tenant_id, hour, row.key_id or "", row.spec["base_model"])
    add_to_books(connection, {account: Tokens(training_tokens=trained - row.booked_tokens)})
    connection.execute(jobs.update().where(jobs.c.id == job_id).values(booked_tokens=trained))


def without_names(connection: Connection, tenant_id: str) -> None:
    """Of a tenant that is being deleted only numbers stay, by the hour. Call it behind the deletion, whose locks keep
    everybody else from booking for it."""
    mine = usage_hours.c.tenant_id == tenant_id
    sums = (sa.func.sum(usage_hours.c[name]).label(name) for name in COUNTS)
    found = connection.execute(sa.select(usage_hours.c.hour, *sums).where(mine).group_by(usage_hours.c.hour)).all()
    connection.execute(usage_hours.delete().where(mine))
    add_to_books(
        connection,
        {
            Account(tenant_id, row.hour, "", DELETED_MODEL): Tokens(*(int(getattr(row, name)) for name in COUNTS))
            for row in found
        },
    )


def total(used: Iterable[Tokens]) -> Tokens:
    return sum(used, Tokens())


def _adding(insert: Any) -> Any:
    sums = {name: usage_hours.c[name] + insert.excluded[name] for name in COUNTS}
    return insert.on_conflict_do_update(index_elements=list(usage_hours.primary_key.columns), set_=sums)


_ADD_SQLITE = _adding(sqlite.insert(usage_hours))
_ADD_POSTGRES = _adding(postgresql.insert(usage_hours))
