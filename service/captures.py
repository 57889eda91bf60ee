"""Prompts and answers that a tenant lets the service keep: what is kept, for how long, and forgetting it. No HTTP.

Nothing is kept without consent (`capture` of the tenant's settings), and consent is looked up again in the transaction
that writes: what was on its way when a tenant withdrew it is left out. Kept are single whole answers to text prompts.
They go after the tenant's `capture_days`, beyond `max_bytes` of a tenant (those that nobody commented on first), when
asked, and with the tenant. `service.erasure` knows what else holds pieces of them.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.database import Database, Page, page_of
from service.tables import captures, epoch_now, feedback, tenant_settings

MAX_EXCHANGE_BYTES = 256 * 1024
"""Of one prompt and answer; longer ones are not kept."""

TRIM_SHARE = 0.05
"""How far a tenant may get over its bytes before the oldest are looked for."""

DAY = 86400.0

_HALF_A_PAIR = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Exchange:
    """A prompt, as `{"messages": […]}` or `{"prompt": "…"}`, and its answer. `user_digest` is "" for nobody named."""

    completion_id: str
    tenant_id: str
    user_digest: str
    model: str
    prompt: Mapping[str, Any]
    answer: str
    created_at: float

    @property
    def num_bytes(self) -> int:
        return sum(len(text.encode("utf-8", "replace")) for text in self._texts)

    @property
    def is_storable(self) -> bool:
        """Half a surrogate pair is no text, and Postgres takes no NUL: one such would spoil a whole batch."""
        return not any("\0" in text or _HALF_A_PAIR.search(text) for text in self._texts)

    @property
    def _texts(self) -> list[str]:
        messages = self.prompt.get("messages", ())
        return [*(message["content"] for message in messages), self.prompt.get("prompt", ""), self.answer]


@dataclass(frozen=True)
class Capture:
    """What a tenant sees of it; it goes at `expires_at`."""

    id: str
    model: str
    prompt: Mapping[str, Any]
    answer: str
    bytes: int
    created_at: float
    expires_at: float


def user_digest(tenant_id: str, user: str | None) -> str:
    """What is kept of an end user's name."""
    return hashlib.sha256(f"{tenant_id}\0{user}".encode()).hexdigest() if user is not None else ""


class Captures:
    def __init__(self, database: Database) -> None:
        self._database = database

    def list(self, tenant_id: str, *, user: str | None, after: str | None, limit: int) -> Page[Capture]:
        """Newest first; of one end user, or of everybody."""
        mine = captures.c.tenant_id == tenant_id
        if user is not None:
            mine = sa.and_(mine, captures.c.user_digest == user_digest(tenant_id, user))
        chosen = sa.select(tenant_settings.c.capture_days).where(tenant_settings.c.tenant_id == tenant_id)
        with self._database.read() as connection:
            days = connection.execute(chosen).scalar() or 0
            rows, has_more = page_of(
                connection, sa.select(captures).where(mine), captures, after=after, limit=limit, descending=True
            )
        return Page(tuple(_capture(row, days) for row in rows), has_more)


class CaptureRoom:
    """Keeps every tenant's captures below `max_bytes`, looking at them only when enough has come in since."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._added: Counter[str] = Counter()
        self._looked: set[str] = set()

    def write(self, connection: Connection, exchanges: Sequence[Exchange]) -> None:
        """Of tenants that are there and locked by the caller; what nobody consents to is left out."""
        consenting = _consenting(connection, {exchange.tenant_id for exchange in exchanges})
        kept = [exchange for exchange in exchanges if exchange.tenant_id in consenting and exchange.is_storable]
        if not kept:
            return
        connection.execute(captures.insert(), [_row(exchange) for exchange in kept])
        added: Counter[str] = Counter()
        for exchange in kept:
            added[exchange.tenant_id] += exchange.num_bytes
        for tenant_id in self._due(added):
            connection.execute(captures.delete().where(captures.c.seq.in_(_beyond(tenant_id, self._max_bytes))))

    def _due(self, added: Counter[str]) -> list[str]:
        with self._lock:
            self._added += added
            due = [t for t in added if t not in self._looked or self._added[t] > TRIM_SHARE * self._max_bytes]
            for tenant_id in due:
                self._looked.add(tenant_id)
                self._added[tenant_id] = 0
        return due


def too_old(tenant_id: str | None = None) -> sa.ColumnElement[bool]:
    """Captures past their tenant's days."""
    return captures.c.created_at < epoch_now() - days_of(captures.c.tenant_id if tenant_id is None else tenant_id) * DAY


def days_of(tenant_id: str | sa.ColumnElement[str]) -> sa.ColumnElement[int]:
    days = sa.select(tenant_settings.c.capture_days).where(tenant_settings.c.tenant_id == tenant_id)
    return sa.func.coalesce(days.scalar_subquery(), 0)


def _consenting(connection: Connection, tenant_ids: set[str]) -> set[str]:
    """Locked until the transaction ends: whoever withdraws consent waits, and then erases what was just written."""
    query = sa.select(tenant_settings.c.tenant_id).where(
        tenant_settings.c.tenant_id.in_(tenant_ids), tenant_settings.c.capture
    )
    return set(connection.execute(query.order_by(tenant_settings.c.tenant_id).with_for_update(read=True)).scalars())


def _beyond(tenant_id: str, max_bytes: int) -> sa.Select[Any]:
    """Which to drop: with the commented ones first and the newest first among equals, those after `max_bytes`."""
    commented = sa.exists().where(feedback.c.tenant_id == tenant_id, feedback.c.completion_id == captures.c.id)
    order = (sa.case((commented, 1), else_=0).desc(), captures.c.seq.desc())
    running = sa.func.sum(captures.c.bytes).over(order_by=order, rows=(None, 0)).label("running")
    ranked = sa.select(captures.c.seq, running).where(captures.c.tenant_id == tenant_id).subquery()
    return sa.select(ranked.c.seq).where(ranked.c.running > max_bytes)


def _row(exchange: Exchange) -> dict[str, object]:
    return {
        "id": exchange.completion_id,
        "tenant_id": exchange.tenant_id,
        "user_digest": exchange.user_digest,
        "model": exchange.model,
        "prompt": dict(exchange.prompt),
        "answer": exchange.answer,
        "bytes": exchange.num_bytes,
        "created_at": exchange.created_at,
    }


def _capture(row: sa.Row[Any], days: int) -> Capture:
    return Capture(row.id, row.model, row.prompt, row.answer, row.bytes, row.created_at, row.created_at + days * DAY)
