"""The host's clock is set, forwards or back, while jobs run: leases go by what has passed, not by what it says."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import sqlalchemy as sa

import service.job_queue
from service.database import Database, connect
from service.job import Directive, JobStatus
from service.job_queue import JobQueue
from tests.service.control_fixtures import Control, make_control

DAY = 86400.0
LEASE = 30.0


@dataclass
class Clock:
    """SQLite's clock, which is the host's; and the time that really passes."""

    set_by: float = 0.0
    passed: float = 0.0

    def julianday(self, text: str) -> float:
        assert text == "now"
        return (time.time() + self.set_by + self.passed) / DAY + 2440587.5

    def monotonic(self) -> float:
        return time.perf_counter() + self.passed


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()

    class Time:
        monotonic = staticmethod(made.monotonic)

    monkeypatch.setattr(service.job_queue, "time", Time)
    return made


@pytest.fixture
def clocked(clock: Clock, tmp_path: Path) -> Iterator[Control]:
    url = f"sqlite:///{tmp_path / 'rootstock.db'}"
    database = connect(url)
    sa.event.listen(database._engine, "checkout", lambda raw, *_: raw.create_function("julianday", 1, clock.julianday))
    control = make_control(database, url, tmp_path / "storage")
    yield replace(control, queue=_queue(database, control))
    database.close()


def _queue(database: Database, control: Control) -> JobQueue:
    return JobQueue(database, lease_seconds=LEASE, observer=control.counter)


@pytest.mark.parametrize("jump", [DAY, -DAY, 3600.0, -3600.0])
def test_a_clock_that_is_set_takes_no_job_from_a_living_worker(clocked: Control, clock: Clock, jump: float) -> None:
    job = clocked.create_job()
    other = _queue(clocked.database, clocked)
    claim = clocked.claim()
    assert other.claim("other") is None
    clock.set_by = jump
    assert other.claim("other") is None
    assert clocked.queue.heartbeat(claim) is Directive.CONTINUE
    clock.passed += LEASE / 2
    assert other.claim("other") is None
    clocked.finish(claim)
    assert clocked.jobs.get(clocked.acme.id, job.id).state is JobStatus.SUCCEEDED
    assert clocked.counter.num_fenced == 0


@pytest.mark.parametrize("jump", [DAY, -DAY, -3600.0, 0.0])
def test_a_dead_workers_job_is_taken_up_after_one_lease_whatever_the_clock_says(
    clocked: Control, clock: Clock, jump: float
) -> None:
    clocked.create_job()
    clocked.claim("dead")
    heir = _queue(clocked.database, clocked)
    assert heir.claim("heir") is None
    clock.set_by = jump
    heir.claim("heir")
    clock.passed += LEASE + 1
    claim = heir.claim("heir")
    assert claim is not None and claim.attempt == 2


def test_a_clock_set_back_while_nobody_ran_keeps_no_job_for_a_day(clocked: Control, clock: Clock) -> None:
    """Broke: a lease dated by the former clock held for as long as the clock was set back."""
    clocked.create_job()
    clocked.claim("dead")
    clock.set_by = -DAY
    started_later = _queue(clocked.database, clocked)
    assert started_later.claim("heir") is None
    clock.passed += LEASE + 1
    claim = started_later.claim("heir")
    assert claim is not None and claim.attempt == 2
