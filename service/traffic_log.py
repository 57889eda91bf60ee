"""What was answered, on its way to the database: written in batches, by a thread of its own. Knows no HTTP, and text
only of tenants that consented.

Nothing here makes a request wait: `completed` and `observed` only append. A crash loses what came in within the last
`flush_seconds`; when the database cannot be written, batches wait here up to `max_pending` completions, then new
ones are dropped and counted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import sqlalchemy as sa
import structlog
from sqlalchemy.engine import Connection

from service.captures import CaptureRoom, Exchange
from service.database import Database
from service.erasure import forget_old
from service.experiment import Arm, Measure
from service.experiment_rows import MeasureKey, add_measures
from service.intervals import Moments
from service.routing import Trial
from service.tables import completions, epoch_now, feedback, tenants

log = structlog.get_logger("service.traffic_log")

PURGE_SECONDS = 600.0
PURGE_ROWS = 5000
"""Rows deleted in one transaction: others want to write, too."""

MAX_PENDING_CAPTURE_BYTES = 32 * 1024 * 1024

DAY = 86400.0


@dataclass(frozen=True)
class CompletionRecord:
    """Which model gave an answer. `created_at` is unix seconds by this machine's clock."""

    id: str
    tenant_id: str
    model: str
    digest: str | None
    alias: str | None
    trial: Trial | None
    created_at: float


@dataclass(frozen=True)
class WholeAnswer:
    """What may be kept of an answer that has ended: enough to compare it (`service.answer_digest`); and the exchange
    itself, if the tenant consents."""

    completion_id: str
    tenant_id: str
    digest: str
    exchange: Exchange | None = None


@dataclass(frozen=True)
class Retention:
    """How long things are kept. With no `completions_days`, no completion is recorded at all. A tenant's captures take
    at most `capture_bytes`; for how many days, each tenant decides."""

    completions_days: float = 30.0
    max_completions: int = 1_000_000
    feedback_days: float = 365.0
    capture_bytes: int = 64 * 1024 * 1024


@dataclass
class _Batch:
    records: list[CompletionRecord] = field(default_factory=list)
    answers: dict[str, WholeAnswer] = field(default_factory=dict)
    capture_bytes: int = 0
    measures: dict[MeasureKey, Moments] = field(default_factory=dict)
    tenants: set[str] = field(default_factory=set)
    experiments: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.records or self.answers or self.experiments)

    def add(self, tenant_id: str, experiment_id: str, measures: Mapping[MeasureKey, Moments]) -> None:
        self.tenants.add(tenant_id)
        self.experiments.add(experiment_id)
        for key, moments in measures.items():
            self.measures[key] = self.measures.get(key, Moments()) + moments

    def precede(self, later: _Batch) -> None:
        """Take in what came later."""
        self.records += later.records
        self.answers |= later.answers
        self.capture_bytes += later.capture_bytes
        self.tenants |= later.tenants
        self.experiments |= later.experiments
        for key, moments in later.measures.items():
            self.measures[key] = self.measures.get(key, Moments()) + moments


class TrafficLog:
    def __init__(
        self,
        database: Database,
        retention: Retention,
        *,
        judge: Callable[[str], None],
        on_dropped: Callable[[], None],
        flush_seconds: float = 0.5,
        max_pending: int = 50_000,
    ) -> None:
        """`judge` is called with an experiment's id after new numbers of it were written."""
        self._database = database
        self._retention = retention
        self._judge = judge
        self._on_dropped = on_dropped
        self._room = CaptureRoom(retention.capture_bytes)
        self._flush_seconds = flush_seconds
        self._max_pending = max_pending
        self._lock = threading.Lock()  # of the batch, held for an append
        self._writing = threading.Lock()  # one flush at a time: when `flush` returns, everything before is written
        self._batch = _Batch()
        self._pending = threading.Event()
        self._stopping = threading.Event()
        self._purged_at = float("-inf")
        self._thread = threading.Thread(target=self._loop, name="traffic-log", daemon=True)

    @property
    def records_completions(self) -> bool:
        return self._retention.completions_days > 0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Write what is left."""
        self._stopping.set()
        self._pending.set()
        if self._thread.is_alive():
            self._thread.join()
        self.flush()

    # -- for the event loop -----------------------------------------------------------------------------------

    def completed(self, record: CompletionRecord) -> None:
        if not self.records_completions:
            return
        with self._lock:
            if len(self._batch.records) < self._max_pending:
                self._batch.records.append(record)
                self._batch.tenants.add(record.tenant_id)
                self._pending.set()
                return
        self._on_dropped()

    def answered(self, answer: WholeAnswer) -> None:
        """A completion on record has ended. Its exchange is left out when too much waits already."""
        if not self.records_completions:
            return
        with self._lock:
            batch = self._batch
            if len(batch.answers) >= self._max_pending:
                return
            if (exchange := answer.exchange) is not None:
                if batch.capture_bytes > MAX_PENDING_CAPTURE_BYTES:
                    answer = replace(answer, exchange=None)
                else:
                    batch.capture_bytes += exchange.num_bytes
            batch.answers[answer.completion_id] = answer
            batch.tenants.add(answer.tenant_id)
            self._pending.set()

    def observed(self, tenant_id: str, experiment_id: str, values: Mapping[tuple[Arm, Measure], float]) -> None:
        """What one answer adds to an experiment's measures."""
        added = {(experiment_id, *key): Moments(1, value, value * value) for key, value in values.items()}
        with self._lock:
            self._batch.add(tenant_id, experiment_id, added)
        self._pending.set()

    # -- for other threads ------------------------------------------------------------------------------------

    def judge_soon(self, tenant_id: str, experiment_id: str) -> None:
        """Its numbers have changed by another way."""
        with self._lock:
            self._batch.add(tenant_id, experiment_id, {})
        self._pending.set()

    def flush(self) -> None:
        """Write what has come in, and judge the experiments that it concerns. Not on an event loop."""
        with self._writing:
            with self._lock:
                batch, self._batch = self._batch, _Batch()
                self._pending.clear()
            if not batch:
                return
            try:
                with self._database.begin() as connection:
                    _write(connection, batch, self._room)
            except sa.exc.OperationalError as error:  # locked or not there: it may come back
                log.warning("traffic_log_waits", num_records=len(batch.records), reason=type(error.orig).__name__)
                with self._lock:
                    batch.precede(self._batch)
                    self._batch = batch
                    self._pending.set()
                return
        for experiment_id in sorted(batch.experiments):
            self._judge(experiment_id)

    def purge(self) -> None:
        """Delete what is past its time."""
        kept = self._retention
        newest = sa.select(sa.func.max(completions.c.seq)).scalar_subquery()
        too_old = completions.c.created_at < epoch_now() - kept.completions_days * DAY
        self._delete(completions, sa.or_(too_old, completions.c.seq <= newest - kept.max_completions))
        self._delete(feedback, feedback.c.created_at < epoch_now() - kept.feedback_days * DAY)
        with self._database.begin() as connection:
            forget_old(connection)

    def _delete(self, table: sa.Table, condition: sa.ColumnElement[bool]) -> None:
        some = sa.select(table.c.seq).where(condition).limit(PURGE_ROWS)
        num_deleted = PURGE_ROWS
        while num_deleted == PURGE_ROWS and not self._stopping.is_set():
            with self._database.begin() as connection:
                num_deleted = connection.execute(table.delete().where(table.c.seq.in_(some))).rowcount

    def _loop(self) -> None:
        while not self._stopping.is_set():
            self._pending.wait(PURGE_SECONDS)
            self._stopping.wait(self._flush_seconds)  # let a batch come together
            try:
                self.flush()
                if time.monotonic() - self._purged_at > PURGE_SECONDS:
                    self.purge()
                    self._purged_at = time.monotonic()
            except Exception:  # the next batch may fare better
                log.exception("traffic_log_failed")


def _write(connection: Connection, batch: _Batch, room: CaptureRoom) -> None:
    """Tenants first, in one order, as whoever deletes one does; what belongs to a deleted one is left out."""
    named = sa.select(tenants.c.id).where(tenants.c.id.in_(batch.tenants)).order_by(tenants.c.id)
    alive = set(connection.execute(named.with_for_update(read=True, key_share=True)).scalars())
    rows = [_row(record, batch.answers.get(record.id)) for record in batch.records if record.tenant_id in alive]
    if rows:
        connection.execute(completions.insert(), rows)
    answers = [answer for answer in batch.answers.values() if answer.tenant_id in alive]
    written = {record.id for record in batch.records}
    later = [answer for answer in answers if answer.completion_id not in written]
    if later:
        connection.execute(_LATER, [{"answered": one.completion_id, "hashed": one.digest} for one in later])
    room.write(connection, [answer.exchange for answer in answers if answer.exchange is not None])
    add_measures(connection, batch.measures)


_LATER = (
    completions.update()
    .where(completions.c.id == sa.bindparam("answered"))
    .values(answer_digest=sa.bindparam("hashed"))
)


def _row(record: CompletionRecord, answer: WholeAnswer | None) -> dict[str, object]:
    trial = record.trial
    return {
        "id": record.id,
        "tenant_id": record.tenant_id,
        "model": record.model,
        "digest": record.digest,
        "alias": record.alias,
        "experiment_id": trial.experiment_id if trial else None,
        "arm": trial.arm if trial else None,
        "unit": trial.unit if trial else None,
        "answer_digest": answer.digest if answer else None,
        "created_at": record.created_at,
    }
