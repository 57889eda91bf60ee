"""What happened to a signal: it changed its state, or somebody acknowledged it. Kept as rows, told to listeners.

Knows no HTTP and no statistic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.database import Database, Page, new_id, page_of
from service.drift_states import DriftState
from service.tables import drift_events

MAX_EVENTS_OF_A_TENANT = 10_000
"""The oldest are dropped first."""


@dataclass(frozen=True)
class DriftEvent:
    """`by` (the id of an API key) and `note` are of an acknowledgement. `at` in unix seconds."""

    tenant_id: str
    model: str
    digest: str
    signal: str
    state: DriftState
    previous: DriftState
    statistic: float | None
    threshold: float | None
    samples: int
    at: float
    by: str | None = None
    note: str | None = None
    id: str = field(default_factory=lambda: new_id("driftevent"))

    @property
    def is_acknowledgement(self) -> bool:
        return self.by is not None

    def body(self) -> dict[str, Any]:
        """As the API and the webhook write it."""
        return {
            "id": self.id,
            "object": "drift.event",
            "type": "acknowledgement" if self.is_acknowledgement else "state",
            "created_at": int(self.at),
            "model": self.model,
            "digest": self.digest,
            "signal": self.signal,
            "state": self.state.value,
            "previous": self.previous.value,
            "statistic": self.statistic,
            "threshold": self.threshold,
            "samples": self.samples,
            "by": self.by,
            "note": self.note,
        }


Listener = Callable[[DriftEvent], None]


class DriftEvents:
    """Reads them; they are written by `append` in the transaction of what they tell."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def list(self, tenant_id: str, *, digest: str | None, after: str | None, limit: int) -> Page[DriftEvent]:
        """Newest first; of one adapter, or of all."""
        query = sa.select(drift_events).where(drift_events.c.tenant_id == tenant_id)
        if digest is not None:
            query = query.where(drift_events.c.digest == digest)
        with self._database.read() as connection:
            rows, has_more = page_of(connection, query, drift_events, after=after, limit=limit, descending=True)
        return Page(tuple(_event(row) for row in rows), has_more)


def append(connection: Connection, events: Sequence[DriftEvent]) -> None:
    if not events:
        return
    connection.execute(drift_events.insert(), [{name: getattr(event, name) for name in _COLUMNS} for event in events])
    for tenant_id in sorted({event.tenant_id for event in events}):
        mine = drift_events.c.tenant_id == tenant_id
        kept = sa.select(drift_events.c.seq).where(mine).order_by(drift_events.c.seq.desc())
        oldest = connection.execute(kept.offset(MAX_EVENTS_OF_A_TENANT - 1).limit(1)).scalar()
        if oldest is not None:
            connection.execute(drift_events.delete().where(mine, drift_events.c.seq < oldest))


_COLUMNS = tuple(DriftEvent.__dataclass_fields__)


def _event(row: sa.Row[Any]) -> DriftEvent:
    values = {name: getattr(row, name) for name in _COLUMNS}
    return DriftEvent(**{**values, "state": DriftState(row.state), "previous": DriftState(row.previous)})
