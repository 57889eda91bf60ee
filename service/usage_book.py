"""What answers cost, on its way into the books: written by a thread of its own, many answers in one transaction. Knows
no HTTP.

Whoever may tell a client its `usage` waits for the future of `book` first. While one batch is being committed the next
one gathers, so that the wait is about one commit, however many answers end at once. Each charge is booked once, also
when a commit's fate is unknown and it is tried again: completions in the books are remembered by their id.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

import sqlalchemy as sa
import structlog
from sqlalchemy.engine import Connection

from service.database import Database
from service.errors import UnavailableError
from service.tables import epoch_now, tenants, usage_entries
from service.usage_rows import DELETED_MODEL, Account, Tokens, add_to_books, hour_of

log = structlog.get_logger("service.usage_book")

MAX_BATCH = 500
RETRY_SECONDS = 0.2
REMEMBERED_SECONDS = 24 * 3600.0
PURGE_SECONDS = 600.0
PURGE_ROWS = 5000


@dataclass(frozen=True)
class Charge:
    """What one answer cost. `id` is the completion's, `at` unix seconds when it ended, `model` the resolved one."""

    id: str
    tenant_id: str
    key_id: str
    model: str
    at: float
    tokens: Tokens


@dataclass(frozen=True)
class _Waiting:
    charge: Charge
    booked: Future[None]
    since: float = field(default_factory=time.monotonic)


class UsageBook:
    def __init__(self, database: Database, *, patience_seconds: float = 10.0, max_pending: int = 100_000) -> None:
        """With the database away, `book` fails after `patience_seconds`; what it was asked to book stays in memory, up
        to `max_pending` charges, until it can be written."""
        self._database = database
        self._patience_seconds = patience_seconds
        self._max_pending = max_pending
        self._lock = threading.Lock()
        self._waiting: list[_Waiting] = []
        self._late: list[_Waiting] = []
        self._pending = threading.Event()
        self._stopping = threading.Event()
        self._purged_at = float("-inf")
        self._thread = threading.Thread(target=self._loop, name="usage-book", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Write what is left."""
        self._stopping.set()
        self._pending.set()
        if self._thread.is_alive():
            self._thread.join()
        self._flush()
        with self._lock:
            left = [*self._late, *self._waiting]
            self._late, self._waiting = [], []
        if left:
            log.error("usage_lost", num_charges=len(left))
            self._fail(left)

    def book(self, charge: Charge) -> Future[None]:
        """Done once the charge is durable. Never blocks; cancelling the future does not take the charge back.

        The future raises UnavailableError when the books could not be written in time.
        """
        booked: Future[None] = Future()
        booked.set_running_or_notify_cancel()  # from here on it cannot be cancelled
        with self._lock:
            full = len(self._waiting) + len(self._late) >= self._max_pending
            if not full:
                self._waiting.append(_Waiting(charge, booked))
        if full:
            log.error("usage_lost", num_charges=1)
            booked.set_exception(_not_booked())
        self._pending.set()
        return booked

    def _loop(self) -> None:
        while not self._stopping.is_set():
            self._pending.wait(PURGE_SECONDS)
            self._pending.clear()
            try:
                if not self._flush():
                    self._stopping.wait(RETRY_SECONDS)
                    self._pending.set()
                if time.monotonic() - self._purged_at > PURGE_SECONDS:
                    self._purge()
                    self._purged_at = time.monotonic()
            except Exception:  # the next round may fare better
                log.exception("usage_book_failed")

    def _flush(self) -> bool:
        """Write all that waits, batch by batch; False when the database does not let us."""
        while True:
            with self._lock:
                everything = [*self._late, *self._waiting]
                batch, rest = everything[:MAX_BATCH], everything[MAX_BATCH:]
                self._late, self._waiting = [], rest
            if not batch:
                return True
            try:
                self._write(batch)
            except (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError) as error:
                log.warning("usage_book_waits", num_charges=len(batch), reason=type(error).__name__)
                self._keep(batch)
                return False

    def _write(self, batch: Sequence[_Waiting]) -> None:
        """Of a batch that cannot be written as a whole, each one alone."""
        try:
            with self._database.begin() as connection:
                _write(connection, [one.charge for one in batch])
        except (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError):
            raise
        except Exception as error:
            if len(batch) > 1:
                for one in batch:
                    self._write([one])
                return
            log.error("usage_lost", num_charges=1, completion=batch[0].charge.id, reason=type(error).__name__)
            _end(batch[0].booked, error)
            return
        for one in batch:
            _end(one.booked, None)

    def _keep(self, batch: Sequence[_Waiting]) -> None:
        """They will be written; but nobody waits for that longer than our patience."""
        unbooked = [one for one in batch if not one.booked.done() or one.booked.exception() is not None]
        now = time.monotonic()
        self._fail([one for one in unbooked if now - one.since > self._patience_seconds])
        with self._lock:
            self._late = [*unbooked, *self._late]

    def _fail(self, late: Sequence[_Waiting]) -> None:
        for one in late:
            _end(one.booked, _not_booked())

    def _purge(self) -> None:
        old = usage_entries.c.booked_at < epoch_now() - REMEMBERED_SECONDS
        some = sa.select(usage_entries.c.id).where(old).limit(PURGE_ROWS)
        num_deleted = PURGE_ROWS
        while num_deleted == PURGE_ROWS and not self._stopping.is_set() and not self._pending.is_set():
            with self._database.begin() as connection:
                num_deleted = connection.execute(usage_entries.delete().where(usage_entries.c.id.in_(some))).rowcount


@contextmanager
def open_books(database: Database) -> Iterator[UsageBook]:
    """Running, until the block ends; then everything is written."""
    book = UsageBook(database)
    book.start()
    try:
        yield book
    finally:
        book.stop()


def _write(connection: Connection, charges: Sequence[Charge]) -> None:
    """Tenants first, in one order, as whoever deletes one does; of a deleted one only the numbers are booked."""
    owners = {charge.tenant_id for charge in charges}
    named = sa.select(tenants.c.id).where(tenants.c.id.in_(owners)).order_by(tenants.c.id)
    alive = set(connection.execute(named.with_for_update(read=True, key_share=True)).scalars())
    known = sa.select(usage_entries.c.id).where(usage_entries.c.id.in_([charge.id for charge in charges]))
    booked = set(connection.execute(known).scalars())
    used: dict[Account, Tokens] = {}
    entries = []
    for charge in charges:
        if charge.id in booked:
            continue
        booked.add(charge.id)
        entries.append({"charge": charge.id})
        account = _account(charge, charge.tenant_id in alive)
        used[account] = used.get(account, Tokens()) + charge.tokens
    if entries:
        connection.execute(_REMEMBER, entries)
    add_to_books(connection, used)


_REMEMBER = usage_entries.insert().values(id=sa.bindparam("charge"), booked_at=epoch_now())


def _account(charge: Charge, alive: bool) -> Account:
    hour = hour_of(charge.at)
    if alive:
        return Account(charge.tenant_id, hour, charge.key_id, charge.model)
    return Account(charge.tenant_id, hour, "", DELETED_MODEL)


def _end(booked: Future[None], error: Exception | None) -> None:
    if booked.done():
        return
    if error is None:
        booked.set_result(None)
    else:
        booked.set_exception(error)


def _not_booked() -> UnavailableError:
    return UnavailableError("The answer could not be entered in the books: the database does not answer. Try again.")
