"""How long jobs have shown nothing, on SQLite and Postgres."""

from __future__ import annotations

import pytest

from service.job_backlog import job_backlog
from service.tables import epoch_now, job_events, jobs
from tests.service.control_fixtures import Control


def shift(control: Control, job_id: str, seconds: float) -> None:
    """As if everything the job has shown were older by so much."""
    with control.database.begin() as connection:
        row = connection.execute(jobs.select().where(jobs.c.id == job_id)).one()
        connection.execute(jobs.update().where(jobs.c.id == job_id).values(created_at=row.created_at - seconds))
        events = job_events.update().where(job_events.c.job_id == job_id)
        connection.execute(events.values(created_at=epoch_now() - seconds))


def test_without_jobs_nothing_waits_and_nothing_has_an_age(control: Control) -> None:
    backlog = job_backlog(control.database)
    assert backlog.num_jobs == {"queued": 0, "paused": 0, "running": 0} and backlog.max_silence_seconds == {}


def test_the_stalest_job_of_each_state_is_measured_by_its_latest_event(control: Control) -> None:
    running = control.create_job()
    control.claim()
    for seconds in (500, 9000):
        shift(control, control.create_job().id, seconds)
    paused = control.create_job()
    control.jobs.pause(control.acme.id, paused.id)
    shift(control, running.id, 70)
    backlog = job_backlog(control.database)
    assert backlog.num_jobs == {"queued": 2, "paused": 1, "running": 1}
    assert backlog.max_silence_seconds["queued"] == pytest.approx(9000, abs=30)
    assert backlog.max_silence_seconds["running"] == pytest.approx(70, abs=30)
    assert backlog.max_silence_seconds["paused"] == pytest.approx(0, abs=30)


def test_a_heartbeat_is_no_progress_and_an_event_is(control: Control) -> None:
    job = control.create_job()
    claim = control.claim()
    shift(control, job.id, 4000)
    control.queue.heartbeat(claim)
    assert job_backlog(control.database).max_silence_seconds["running"] == pytest.approx(4000, abs=30)
    control.queue.event(claim, "Step 7/9")
    assert job_backlog(control.database).max_silence_seconds["running"] == pytest.approx(0, abs=30)


def test_a_job_that_has_ended_counts_no_more(control: Control) -> None:
    control.publish()
    assert sum(job_backlog(control.database).num_jobs.values()) == 0
