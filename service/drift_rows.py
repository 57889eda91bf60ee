"""Streams of drift as rows: read, written, deleted. Knows no monitor: their states are bytes here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.database import Database, Page, page_of
from service.drift_states import SIGNALS, DriftState, SignalState
from service.drift_view import Acknowledgement, StreamView
from service.tables import adapter_versions, drift_events, drift_states, drift_streams


@dataclass(frozen=True)
class Blobs:
    """What only the worker reads. `prompts` and `answers` are the monitors' own."""

    salt: bytes
    sampling: bytes | None = None
    prompts: bytes | None = None
    answers: bytes | None = None


class DriftRecords:
    """For who asks: as it was written last, a few seconds ago at most; state changes are there at once."""

    def __init__(self, database: Database, basis: str) -> None:
        self._database = database
        self._basis = basis

    def get(self, tenant_id: str, digest: str, model: str) -> StreamView:
        """One that was never asked has nothing to show yet."""
        with self._database.read() as connection:
            found = find(connection, tenant_id, digest)
        nothing = StreamView(None, tenant_id, digest, model, self._basis, None)
        return nothing if found is None else found[0].on(self._basis)

    def seen_since(self, at: float) -> list[StreamView]:
        """Of all tenants."""
        with self._database.read() as connection:
            rows = connection.execute(sa.select(drift_streams).where(drift_streams.c.seen_at >= at)).all()
            return [view.on(self._basis) for view in _views(connection, rows)]

    def list(self, tenant_id: str, *, after: str | None, limit: int) -> Page[StreamView]:
        """Those whose traffic began last come first."""
        query = sa.select(drift_streams).where(drift_streams.c.tenant_id == tenant_id)
        with self._database.read() as connection:
            rows, has_more = page_of(connection, query, drift_streams, after=after, limit=limit, descending=True)
            return Page(tuple(view.on(self._basis) for view in _views(connection, rows)), has_more)


def find(connection: Connection, tenant_id: str, digest: str) -> tuple[StreamView, Blobs] | None:
    """As it was written, whatever base is loaded now."""
    row = connection.execute(sa.select(drift_streams).where(_is(tenant_id, digest))).one_or_none()
    if row is None:
        return None
    return _views(connection, [row])[0], Blobs(row.salt, row.sampling, row.input_state, row.output_state)


def digests_of(connection: Connection, tenant_id: str) -> set[str]:
    query = sa.select(drift_streams.c.digest).where(drift_streams.c.tenant_id == tenant_id)
    return set(connection.execute(query).scalars())


def insert(connection: Connection, view: StreamView, blobs: Blobs) -> None:
    connection.execute(
        drift_streams.insert().values(
            id=view.id,
            tenant_id=view.tenant_id,
            digest=view.digest,
            created_at=view.created_at,
            salt=blobs.salt,
            **_changing(view, blobs),
        )
    )


def update(connection: Connection, view: StreamView, blobs: Blobs) -> bool:
    """False when the row is gone: the adapter or its tenant was deleted."""
    changed = drift_streams.update().where(drift_streams.c.id == view.id).values(_changing(view, blobs))
    if connection.execute(changed).rowcount == 0:
        return False
    seq = connection.execute(sa.select(drift_streams.c.seq).where(drift_streams.c.id == view.id)).scalar_one()
    connection.execute(drift_states.delete().where(drift_states.c.stream == seq))
    connection.execute(drift_states.insert(), [_state_row(seq, view, name) for name in view.signals])
    return True


def delete_unless_published(connection: Connection, tenant_id: str, digest: str) -> None:
    """In the transaction that deletes a version of the adapter: with the tenant's last one its drift goes, too."""
    mine = adapter_versions.c.tenant_id == tenant_id
    others = sa.select(adapter_versions.c.id).where(mine, adapter_versions.c.digest == digest)
    if connection.execute(others.limit(1)).first() is None:
        connection.execute(drift_streams.delete().where(_is(tenant_id, digest)))
        events = sa.and_(drift_events.c.tenant_id == tenant_id, drift_events.c.digest == digest)
        connection.execute(drift_events.delete().where(events))


def _is(tenant_id: str, digest: str) -> sa.ColumnElement[bool]:
    return sa.and_(drift_streams.c.tenant_id == tenant_id, drift_streams.c.digest == digest)


def _changing(view: StreamView, blobs: Blobs) -> dict[str, Any]:
    return {
        "model": view.model,
        "basis": view.basis,
        "reference_basis": view.reference_basis,
        "sampling": blobs.sampling,
        "input_state": blobs.prompts,
        "output_state": blobs.answers,
        "samples": view.samples,
        "seen_at": view.seen_at,
    }


def _state_row(seq: int, view: StreamView, name: str) -> dict[str, Any]:
    signal, given = view.signals[name], view.acknowledged.get(name)
    return {
        **signal.__dict__,
        "stream": seq,
        "acknowledged_at": given.at if given else None,
        "acknowledged_by": given.by if given else None,
        "acknowledged_note": given.note if given else None,
    }


def _views(connection: Connection, rows: Sequence[sa.Row[Any]]) -> list[StreamView]:
    signals: dict[int, dict[str, SignalState]] = {
        row.seq: {name: SignalState(name) for name in SIGNALS} for row in rows
    }
    given: dict[int, dict[str, Acknowledgement]] = {row.seq: {} for row in rows}
    states = sa.select(drift_states).where(drift_states.c.stream.in_(list(signals)))
    for state in connection.execute(states):
        if state.signal in signals[state.stream]:
            signals[state.stream][state.signal] = _signal(state)
        if state.acknowledged_at is not None:
            given[state.stream][state.signal] = Acknowledgement(
                state.acknowledged_at, state.acknowledged_by, state.acknowledged_note
            )
    return [
        StreamView(
            *(row.id, row.tenant_id, row.digest, row.model, row.basis, row.reference_basis),
            *(row.samples, row.created_at, row.seen_at, signals[row.seq], given[row.seq]),
        )
        for row in rows
    ]


def _signal(row: sa.Row[Any]) -> SignalState:
    state = DriftState(row.state)
    return SignalState(row.signal, state, row.statistic, row.threshold, row.samples, row.since, row.num_calm)
