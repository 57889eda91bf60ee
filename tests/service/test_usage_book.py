"""The books, on SQLite and Postgres: every charge once, whatever happens to the database or the tenant."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from service.database import Database
from service.errors import UnavailableError
from service.job_queue import FencedWriteError
from service.tables import usage_entries, usage_hours
from service.usage_book import Charge, UsageBook, open_books
from service.usage_report import DAY, UsageDimension, UsageQuery, UsageReport
from service.usage_rows import DELETED_MODEL, HOUR, Tokens
from tests.service.control_fixtures import Control

AT = 1_800_000_000.0  # within an hour, not at its beginning
ONE = Tokens(requests=1, prompt_tokens=7, completion_tokens=5, cached_tokens=2)


def charge(control: Control, id_: str, *, at: float = AT, model: str = "tiny", key: str = "k1") -> Charge:
    return Charge(id_, control.acme.id, key, model, at, ONE)


def booked(control: Control) -> Tokens:
    """Everything of everybody."""
    query = UsageQuery(0, 2**33 // DAY * DAY, DAY)
    results = [result for bucket in UsageReport(control.database).all_buckets(query) for result in bucket.results]
    return sum((result.tokens for result in results), Tokens())


class Flaky(Database):
    """Raises as a lost connection does: before anything is done (`away`), or behind the commit (`num_ambiguous`)."""

    def __init__(self, real: Database) -> None:
        super().__init__(real._engine)
        self.away = False
        self.num_ambiguous = 0

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        lost = sa.exc.OperationalError("", {}, Exception("the connection was lost"))
        if self.away:
            raise lost
        with super().begin() as connection:
            yield connection
        if self.num_ambiguous:
            self.num_ambiguous -= 1
            raise lost


def test_what_many_threads_book_is_summed_by_hour_key_and_model(control: Control) -> None:
    with open_books(control.database) as book:

        def work(worker: int) -> None:
            for number in range(25):
                at, model = AT + HOUR * (number % 2), f"m{number % 3}"
                book.book(charge(control, f"{worker}-{number}", at=at, model=model, key=f"k{worker % 2}")).result(20)

        threads = [threading.Thread(target=work, args=(worker,)) for worker in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert booked(control) == Tokens(200, 1400, 1000, 400)
    with control.database.read() as connection:
        rows = connection.execute(sa.select(usage_hours)).all()
    assert {row.hour for row in rows} == {int(AT) // HOUR * HOUR, int(AT) // HOUR * HOUR + HOUR}
    assert len(rows) == 2 * 2 * 3 and sum(row.requests for row in rows) == 200


def test_one_completion_is_booked_once_however_often_it_is_sent(control: Control) -> None:
    with open_books(control.database) as book:
        for _ in range(3):
            book.book(charge(control, "same")).result(20)
        for future in [book.book(charge(control, "other")) for _ in range(3)]:
            future.result(20)
    assert booked(control).requests == 2


def test_a_commit_of_unknown_fate_is_not_booked_twice(control: Control) -> None:
    flaky = Flaky(control.database)
    flaky.num_ambiguous = 2
    with open_books(flaky) as book:
        for future in [book.book(charge(control, f"c{number}")) for number in range(20)]:
            future.result(20)
    assert flaky.num_ambiguous == 0 and booked(control).requests == 20


def test_with_the_database_away_nobody_waits_for_long_and_nothing_is_lost(control: Control) -> None:
    flaky = Flaky(control.database)
    flaky.away = True
    book = UsageBook(flaky, patience_seconds=0.05)
    book.start()
    late = book.book(charge(control, "late"))
    with pytest.raises(UnavailableError):
        late.result(20)
    assert booked(control) == Tokens()
    flaky.away = False
    book.book(charge(control, "next")).result(20)
    book.stop()
    assert booked(control).requests == 2


def test_what_was_asked_before_the_stop_is_in_the_books_after_it(control: Control) -> None:
    book = UsageBook(control.database)
    futures = [book.book(charge(control, f"c{number}")) for number in range(1200)]  # more than one batch
    book.stop()
    assert all(future.done() for future in futures) and booked(control).requests == 1200


def test_a_charge_that_cannot_be_written_does_not_hold_up_the_others(control: Control) -> None:
    bad = Charge("bad", control.acme.id, "k", "tiny", AT, Tokens(requests=2**80))
    book = UsageBook(control.database)
    good = [book.book(charge(control, "before")), book.book(charge(control, "after"))]
    wrong = book.book(bad)
    book.start()
    assert [future.result(20) for future in good] == [None, None]
    assert wrong.exception(20) is not None
    book.stop()
    assert booked(control).requests == 2


def test_of_a_deleted_tenant_only_numbers_stay_and_late_answers_join_them(control: Control) -> None:
    with open_books(control.database) as book:
        for number, model in enumerate(("tiny", "ft:tiny:acme:a", "ft:tiny:acme:b")):
            book.book(charge(control, f"c{number}", model=model, key=f"k{number}")).result(20)
        control.tenants.delete(control.acme.id)
        book.book(charge(control, "late", model="ft:tiny:acme:a")).result(20)
    with control.database.read() as connection:
        rows = connection.execute(sa.select(usage_hours)).all()
    assert [(row.key_id, row.model, row.requests) for row in rows] == [("", DELETED_MODEL, 4)]


def test_ids_are_forgotten_after_their_time_and_the_sums_are_not(control: Control) -> None:
    book = UsageBook(control.database)
    book.book(charge(control, "old"))
    book.stop()
    with control.database.begin() as connection:
        connection.execute(usage_entries.update().values(booked_at=time.time() - 2 * DAY))
    fresh = UsageBook(control.database)
    fresh._purge()
    with control.database.read() as connection:
        assert connection.execute(sa.select(usage_entries)).all() == []
    assert booked(control).requests == 1


# -- training ---------------------------------------------------------------------------------------------------


def trained(control: Control) -> int:
    return booked(control).training_tokens


def test_training_is_booked_with_each_resume_point_and_at_the_end(control: Control) -> None:
    control.create_job()
    claim = control.claim()
    control.queue.save_resume_point(claim, "step-1", 100)
    control.queue.save_resume_point(claim, "step-2", 250)
    assert trained(control) == 250
    control.queue.succeed(
        claim, digest="d" * 64, base_fingerprint="fingerprint-of-tiny", metrics={}, trained_tokens=300
    )
    assert trained(control) == 300
    (bucket,) = UsageReport(control.database).all_buckets(
        UsageQuery(0, 2**33 // DAY * DAY, DAY, tuple(UsageDimension), control.acme.id)
    )
    (result,) = bucket.results
    assert (result.tenant_name, result.model, result.tokens) == ("acme", "tiny", Tokens(training_tokens=300))


def test_steps_that_a_lost_worker_had_done_are_not_booked_twice(control: Control) -> None:
    job = control.create_job()
    first = control.claim()
    control.queue.save_resume_point(first, "step-1", 100)
    control.queue.progress(first, trained_tokens=180)
    control.expire_lease(job.id)
    second = control.claim("another")
    with pytest.raises(FencedWriteError):
        control.queue.save_resume_point(first, "zombie", 190)
    assert trained(control) == 100
    control.queue.save_resume_point(second, "step-1 again", 100)  # done once more, from the resume point
    assert trained(control) == 100
    control.queue.save_resume_point(second, "step-3", 260)
    control.finish(second)  # says 10: an earlier step than what is booked
    assert trained(control) == 260


@pytest.mark.parametrize("end", ["cancel", "fail"])
def test_a_job_without_success_costs_what_it_had_trained(control: Control, end: str) -> None:
    job = control.create_job()
    claim = control.claim()
    control.queue.save_resume_point(claim, "step-1", 100)
    control.queue.progress(claim, trained_tokens=130)
    for _ in range(2):  # asked again, it is no further change
        if end == "cancel":
            control.jobs.cancel(control.acme.id, job.id)
    if end == "fail":
        control.queue.fail(claim, code="x", message="y")
    assert trained(control) == 130
