"""What was answered reaches the database in batches: nothing waits, nothing is kept too long, trouble is survived."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import sqlalchemy as sa

from service.tables import completions, feedback
from service.traffic_log import CompletionRecord, Retention, TrafficLog, WholeAnswer
from tests.service.control_fixtures import Control


def record(control: Control, name: str, *, age_days: float = 0.0, tenant: str | None = None) -> CompletionRecord:
    created_at = time.time() - age_days * 86400
    return CompletionRecord(name, tenant or control.acme.id, "tiny", None, None, None, created_at)


def ids(control: Control) -> list[str]:
    with control.database.read() as connection:
        return list(connection.execute(sa.select(completions.c.id).order_by(completions.c.seq)).scalars())


def make(
    control: Control, retention: Retention | None = None, on_dropped: Callable[[], None] = pytest.fail, **sizes: int
) -> TrafficLog:
    return TrafficLog(
        control.database, retention or Retention(), judge=pytest.fail, on_dropped=on_dropped, **sizes
    )  # fmt: skip


def test_records_are_written_soon_and_the_rest_when_it_stops(control: Control) -> None:
    log = TrafficLog(control.database, Retention(), judge=pytest.fail, on_dropped=pytest.fail, flush_seconds=0.01)
    log.start()
    log.completed(record(control, "one"))
    deadline = time.monotonic() + 10
    while ids(control) != ["one"]:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    log.completed(record(control, "two"))
    log.stop()
    assert ids(control) == ["one", "two"]


def test_records_past_their_time_or_their_number_are_deleted(control: Control) -> None:
    log = make(control, Retention(completions_days=10, max_completions=3))
    for number, age in enumerate((20, 11, 9, 5, 3, 0)):
        log.completed(record(control, str(number), age_days=age))
    log.flush()
    log.purge()
    assert ids(control) == ["3", "4", "5"]


def test_the_digest_of_an_answer_comes_with_its_record_or_later(control: Control) -> None:
    log = make(control)
    for name in ("quick", "slow", "never"):
        log.completed(record(control, name))
    log.answered(WholeAnswer("quick", control.acme.id, "aaaa"))
    log.flush()
    log.answered(WholeAnswer("slow", control.acme.id, "bbbb"))
    log.answered(WholeAnswer("never-heard-of", control.acme.id, "cccc"))
    log.flush()
    with control.database.read() as connection:
        found = connection.execute(sa.select(completions.c.id, completions.c.answer_digest)).all()
    assert {tuple(row) for row in found} == {("quick", "aaaa"), ("slow", "bbbb"), ("never", None)}


def test_without_retention_nothing_is_recorded(control: Control) -> None:
    log = make(control, Retention(completions_days=0))
    log.completed(record(control, "one"))
    log.flush()
    assert ids(control) == []


def test_what_belongs_to_a_deleted_tenant_is_left_out(control: Control) -> None:
    log = make(control)
    log.completed(record(control, "theirs", tenant=control.zenith.id))
    log.completed(record(control, "mine"))
    control.tenants.delete(control.zenith.id)
    log.flush()
    assert ids(control) == ["mine"]
    control.tenants.delete(control.acme.id)
    assert ids(control) == []


def test_a_database_that_fails_loses_nothing_until_too_much_waits(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[bool] = []
    log = make(control, on_dropped=lambda: dropped.append(True), max_pending=3)
    broken = sa.exc.OperationalError("INSERT", {}, OSError("the disk is full"))

    def fail(*_: object) -> None:
        raise broken

    with monkeypatch.context() as patched:
        patched.setattr("service.traffic_log._write", fail)
        for name in ("one", "two"):
            log.completed(record(control, name))
            log.flush()
        for name in ("three", "four", "five"):
            log.completed(record(control, name))
    log.flush()
    assert ids(control) == ["one", "two", "three"] and len(dropped) == 2


def test_feedback_past_its_time_is_deleted(control: Control) -> None:
    values = {"tenant_id": control.acme.id, "completion_id": "c", "model": "tiny", "represents_unit": False}
    with control.database.begin() as connection:
        for name, age in (("old", 400), ("new", 10)):
            at = time.time() - age * 86400
            row = {**values, "id": name, "user_digest": name, "created_at": at, "updated_at": at}
            connection.execute(feedback.insert().values(row))
    make(control).purge()
    with control.database.read() as connection:
        assert list(connection.execute(sa.select(feedback.c.id)).scalars()) == ["new"]
