"""The database goes and comes back: requests are refused clearly, jobs keep what they have learned and go on."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import replace

import pytest
import sqlalchemy as sa

from service.database import connect
from service.heartbeat import StopReason, StopRequested
from service.job import JobStatus
from service.job_queue import JobQueue
from service.schema import DatabaseSetupError
from service.tuning import Outcome, TuningRun
from tests.service.tuning_fixtures import QUICK, Workshop

pytestmark = pytest.mark.slow


class Away:
    """In place of a Database: refuses for a while, from a certain transaction on."""

    def __init__(self, database: object, *, first: int, times: int) -> None:
        self._database = database
        self._away = range(first, first + times)
        self.num_transactions = 0

    @contextmanager
    def begin(self):  # type: ignore[no-untyped-def]
        self.num_transactions += 1
        if self.num_transactions in self._away:
            raise sa.exc.OperationalError("UPDATE jobs", {}, ConnectionError("the server went away"))
        with self._database.begin() as connection:  # type: ignore[attr-defined]
            yield connection

    @contextmanager
    def read(self):  # type: ignore[no-untyped-def]
        with self._database.read() as connection:  # type: ignore[attr-defined]
            yield connection


@pytest.mark.parametrize("first", [4, 14, 24, 34])
def test_a_database_that_goes_and_comes_costs_a_job_nothing(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    """Broke: a connection lost at the wrong moment failed the job with an internal error."""
    monkeypatch.setattr("service.tuning.RETRY_SECONDS", 0.01)
    twin = workshop.submit(hyperparameters=QUICK)
    claim = workshop.control.claim()
    assert TuningRun(workshop.services, claim, lambda: None).execute() is Outcome.SUCCEEDED
    job = workshop.control.create_job(workshop.control.acme, **twin.spec.__dict__)
    away = Away(workshop.control.database, first=first, times=3)
    services = replace(workshop.services, queue=JobQueue(away))  # type: ignore[arg-type]
    again = services.queue.claim("worker")
    assert again is not None
    assert TuningRun(services, again, lambda: None).execute() is Outcome.INTERRUPTED
    assert away.num_transactions >= first + 3
    assert workshop.job(job).state is JobStatus.QUEUED
    again = workshop.control.claim()
    assert TuningRun(workshop.services, again, lambda: None).execute() is Outcome.SUCCEEDED
    assert workshop.digest(job) == workshop.digest(twin)
    assert workshop.job(job).trained_tokens == workshop.job(twin).trained_tokens


@pytest.mark.parametrize("reason", [StopReason.LOST, StopReason.SHUTDOWN])
def test_a_database_that_stays_away_holds_no_worker_longer_than_its_lease(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, reason: StopReason
) -> None:
    monkeypatch.setattr("service.tuning.RETRY_SECONDS", 0.01)
    workshop.submit(hyperparameters=QUICK)
    away = Away(workshop.control.database, first=14, times=10_000)
    services = replace(workshop.services, queue=JobQueue(away))  # type: ignore[arg-type]
    again = services.queue.claim("worker")
    assert again is not None
    ends = time.monotonic() + 1.0

    def check() -> None:
        if away.num_transactions > 20 and time.monotonic() > ends:
            raise StopRequested(reason)

    assert TuningRun(services, again, check).execute() is Outcome.LOST
    assert time.monotonic() - ends < 30


def test_a_start_without_a_database_says_so() -> None:
    with pytest.raises(DatabaseSetupError, match="The database cannot be used"):
        connect("postgresql://nobody@127.0.0.1:1/nowhere")
