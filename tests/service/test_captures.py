"""What is kept by consent, and how it is forgotten: on SQLite and Postgres."""

from __future__ import annotations

import threading

import pytest
import sqlalchemy as sa

from service.captures import CaptureRoom, Captures
from service.erasure import forget_old
from service.job import JobStatus
from service.tables import captures, feedback, job_events, jobs, retraining_proposals
from service.tenant_settings import TenantChoices
from tests.service.control_fixtures import control, database, database_url, postgres_server, postgres_url
from tests.service.retraining_fixtures import Practice, practice

__all__ = ["control", "database", "database_url", "postgres_server", "postgres_url", "practice"]


def kept(practice: Practice, user: str | None = None) -> list[str]:
    """Newest first."""
    page = Captures(practice.control.database).list(practice.tenant, user=user, after=None, limit=100)
    return [capture.id for capture in page.items]


def test_what_arrives_without_consent_is_left_out_when_it_is_written(practice: Practice) -> None:
    practice.answer()
    assert kept(practice) == []
    practice.consent()
    completion = practice.answer()
    assert kept(practice) == [completion]
    practice.settings.change(practice.tenant, capture=False)
    practice.answer()
    assert kept(practice) == []


def test_choices_stay_until_they_are_changed(practice: Practice) -> None:
    assert practice.settings.get(practice.tenant) == TenantChoices()
    practice.consent(capture_days=7)
    assert practice.settings.change(practice.tenant) == TenantChoices(capture=True, capture_days=7)
    assert practice.settings.captures(practice.tenant)
    practice.settings.change(practice.tenant, capture=False)
    assert not practice.settings.captures(practice.tenant), "what was remembered of it is forgotten, too"


def test_consent_withdrawn_while_a_batch_is_written_leaves_nothing(practice: Practice) -> None:
    """On Postgres both run at once: whoever comes second sees what the first one did."""
    practice.consent()
    stop = threading.Event()

    def answer() -> None:
        while not stop.is_set():
            practice.answer()

    thread = threading.Thread(target=answer)
    thread.start()
    for _ in range(10):
        practice.consent()
        practice.settings.change(practice.tenant, capture=False)
        assert kept(practice) == []
    stop.set()
    thread.join()
    assert kept(practice) == []


def test_an_end_user_is_forgotten_and_nobody_else(practice: Practice) -> None:
    practice.consent()
    ada, bob, nobody = practice.answer(user="ada"), practice.answer(user="bob"), practice.answer()
    practice.judge(ada, corrected="of ada's answer")
    practice.judge(bob, corrected="by ada, of bob's answer", user="ada")
    practice.judge(nobody, corrected="stays")
    assert kept(practice, "ada") == [ada]
    forgotten = practice.settings.forget(practice.tenant, "ada")
    assert (forgotten.captures, forgotten.corrections) == (1, 2)
    assert kept(practice) == [nobody, bob]
    with practice.control.database.read() as connection:
        assert set(connection.execute(sa.select(feedback.c.corrected)).scalars()) == {None, "stays"}


def test_what_is_past_its_tenants_days_goes(practice: Practice) -> None:
    practice.consent(capture_days=10)
    old, new = practice.answer(days_ago=11), practice.answer(days_ago=9)
    for completion in (old, new):
        practice.judge(completion, corrected="a quince")
    with practice.control.database.begin() as connection:
        is_old = feedback.c.completion_id == old
        connection.execute(feedback.update().where(is_old).values(updated_at=1.0))
        forget_old(connection)
    assert kept(practice) == [new]
    with practice.control.database.read() as connection:
        assert connection.execute(sa.select(feedback.c.corrected).order_by(feedback.c.seq)).scalars().all() == [
            None,
            "a quince",
        ]
    practice.settings.change(practice.tenant, capture_days=5)
    assert kept(practice) == [], "fewer days hold at once"


def test_a_tenants_captures_are_bounded_and_commented_ones_go_last(practice: Practice) -> None:
    practice.consent()
    practice.traffic._room = CaptureRoom(max_bytes=100)
    commented = practice.answer("x" * 30)
    practice.judge(commented, rating=1.0)
    practice.answer("y" * 30)
    newest = practice.answer("z" * 50)
    assert kept(practice) == [newest, commented]


def test_what_no_database_takes_is_left_out_and_spoils_nothing_else(practice: Practice) -> None:
    practice.consent()
    for text in ("half \ud83d", "nothing \0 there"):
        practice.answer(text)
        practice.answer(prompt=text)
    completion = practice.answer()
    assert kept(practice) == [completion]


def test_captures_go_with_their_tenant(practice: Practice) -> None:
    practice.consent()
    practice.answer()
    practice.control.tenants.delete(practice.tenant)
    with practice.control.database.read() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(captures)).scalar() == 0


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["all", "user", "days"])
def test_what_was_made_of_captures_is_forgotten_with_them(practice: Practice, cut: str) -> None:
    """Files, excerpts in reports and events, the job that learns from them."""
    practice.consent()
    practice.publish()
    practice.correct(12, alias="best", user="ada")
    practice.drift(practice.control.registry.version(practice.tenant, "best").id)
    practice.worker.work()
    started = practice.retraining.approve(practice.tenant, practice.proposal.id)
    assert started.job_id is not None and started.training_file is not None
    claim = practice.control.claim()
    report = {"findings": [{"code": "short", "excerpts": ["word 3?"]}], "statistics": {"examples": 12}}
    practice.control.queue.save_data_report(claim, report)
    practice.control.queue.event(claim, "Accuracy", data={"worst_examples": [{"input": "word 3?"}], "n": 3})
    if cut == "days":
        practice.control.finish(claim)
        with practice.control.database.begin() as connection:
            connection.execute(retraining_proposals.update().values(texts_until=1.0))
            forget_old(connection)
    else:
        practice.settings.forget(practice.tenant, "ada" if cut == "user" else None)
    practice.control.files.remove_expired()
    assert started.training_file not in {file.id for file in practice.control.files.list(practice.tenant).items}
    with practice.control.database.read() as connection:
        row = connection.execute(sa.select(jobs).where(jobs.c.id == started.job_id)).one()
        assert row.data_report == {"findings": [{"code": "short", "excerpts": []}], "statistics": {"examples": 12}}
        assert row.state == (JobStatus.SUCCEEDED if cut == "days" else JobStatus.CANCELLED)
        told = str(connection.execute(sa.select(job_events.c.data).where(job_events.c.job_id == started.job_id)).all())
        assert "word 3?" not in told and "'n': 3" in told
    assert practice.messages(started)[-1].startswith("Captured" if cut != "days" else "The time for which")
