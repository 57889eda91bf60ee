"""The tenant's side of jobs: create, repeat, list, cancel, pause, resume; on SQLite and Postgres."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from service.database import connect
from service.errors import ConflictError, InvalidRequestError, NotFoundError
from service.files import FilePurpose
from service.job import Hyperparameters, Job, JobSpec, JobStatus
from service.jobs import Idempotency, Jobs
from service.tables import jobs
from tests.service.control_fixtures import Control

BODY, OTHER_BODY = "a" * 64, "b" * 64


def _spec(file_id: str, **values: object) -> JobSpec:
    return JobSpec(**{"model": "tiny", "base_model": "tiny", "training_file": file_id, "seed": 1, **values})  # type: ignore[arg-type]


def _age(control: Control, job: Job, seconds: float) -> None:
    with control.database.begin() as connection:
        connection.execute(jobs.update().where(jobs.c.id == job.id).values(created_at=jobs.c.created_at - seconds))


def _messages(control: Control, job: Job) -> list[str]:
    return [event.message for event in control.jobs.events(control.acme.id, job.id, limit=100).items]


def test_a_job_comes_back_as_it_was_asked_for(control: Control) -> None:
    hyperparameters = Hyperparameters(n_epochs=3, lora_r=8, target_modules=("q_proj", "v_proj"), learning_rate=2e-3)
    training, validation = control.upload(), control.upload()
    spec = _spec(
        training,
        validation_file=validation,
        parent_digest="p" * 64,
        suffix="intents",
        seed=2**31 - 1,
        hyperparameters=hyperparameters,
        metadata={"team": "é"},
        alias="best",
    )
    job = control.jobs.create(control.acme.id, spec, Idempotency(BODY))
    assert job.spec == spec and job.tenant_name == "acme"
    assert control.jobs.get(control.acme.id, job.id) == job
    assert (job.status, job.state, job.attempt) == (JobStatus.VALIDATING_FILES, JobStatus.QUEUED, 0)
    assert job.model_id == f"ft:tiny:acme:intents:{job.id.removeprefix('ftjob-')[:8]}"
    assert _messages(control, job) == [f"Created fine-tuning job: {job.id}"]
    assert control.counter.entered == [JobStatus.QUEUED]


def test_an_acknowledged_job_survives_a_restart(control: Control) -> None:
    job = control.create_job()
    again = connect(control.url)
    assert Jobs(again).get(control.acme.id, job.id) == job
    again.close()


def test_a_missing_foreign_or_wrong_file_is_refused_naming_the_field(control: Control) -> None:
    good = control.upload()
    foreign = control.upload(control.zenith)
    wrong = control.upload(purpose=FilePurpose.USER_DATA)
    for bad in ("file-none", foreign, wrong):
        for spec in (_spec(bad), _spec(good, validation_file=bad)):
            with pytest.raises(InvalidRequestError, match=bad) as caught:
                control.jobs.create(control.acme.id, spec, Idempotency(BODY))
            assert caught.value.param == ("training_file" if spec.training_file == bad else "validation_file")
    assert control.jobs.list(control.acme.id).items == ()


def test_an_alias_that_no_alias_may_be_is_refused_before_training(control: Control) -> None:
    for name in ("a b", "a:b", "", "x" * 65, "a,b", "tiny"):
        with pytest.raises(InvalidRequestError) as caught:
            control.create_job(alias=name)
        assert caught.value.param == "alias"


def test_a_client_that_says_it_retries_gets_the_job_it_made(control: Control) -> None:
    spec = _spec(control.upload())
    first = control.jobs.create(control.acme.id, spec, Idempotency(BODY, retry=False))
    _age(control, first, 600)
    again = control.jobs.create(control.acme.id, spec, Idempotency(BODY, retry=True))
    assert again.id == first.id
    assert control.jobs.create(control.acme.id, spec, Idempotency(OTHER_BODY, retry=True)).id != first.id
    assert control.counter.entered == [JobStatus.QUEUED] * 2


def test_a_client_that_says_it_is_its_first_try_gets_a_new_job(control: Control) -> None:
    spec = _spec(control.upload())
    made = {control.jobs.create(control.acme.id, spec, Idempotency(BODY, retry=False)).id for _ in range(3)}
    assert len(made) == 3


def test_a_client_that_says_nothing_gets_the_same_job_for_a_few_seconds(control: Control) -> None:
    spec = _spec(control.upload())
    first = control.jobs.create(control.acme.id, spec, Idempotency(BODY))
    assert control.jobs.create(control.acme.id, spec, Idempotency(BODY)).id == first.id
    _age(control, first, 11)
    assert control.jobs.create(control.acme.id, spec, Idempotency(BODY)).id != first.id


def test_a_finished_job_is_never_taken_for_a_repetition(control: Control) -> None:
    spec = _spec(control.upload())
    first = control.jobs.create(control.acme.id, spec, Idempotency(BODY))
    control.jobs.cancel(control.acme.id, first.id)
    assert control.jobs.create(control.acme.id, spec, Idempotency(BODY, retry=True)).id != first.id


def test_an_idempotency_key_gives_the_same_job_for_a_day_even_when_it_has_finished(control: Control) -> None:
    spec = _spec(control.upload())
    first = control.jobs.create(control.acme.id, spec, Idempotency(BODY, key="k", retry=False))
    control.jobs.cancel(control.acme.id, first.id)
    assert control.jobs.create(control.acme.id, spec, Idempotency(BODY, key="k", retry=False)).id == first.id
    with pytest.raises(InvalidRequestError) as caught:
        control.jobs.create(control.acme.id, spec, Idempotency(OTHER_BODY, key="k"))
    assert caught.value.code == "idempotency_key_reused"
    assert control.jobs.create(control.acme.id, spec, Idempotency(BODY, key="other", retry=False)).id != first.id
    _age(control, first, 25 * 3600)
    assert control.jobs.create(control.acme.id, spec, Idempotency(BODY, key="k", retry=False)).id != first.id


def test_the_same_body_and_key_of_another_tenant_is_another_job(control: Control) -> None:
    mine = control.jobs.create(control.acme.id, _spec(control.upload()), Idempotency(BODY, key="k"))
    theirs = _spec(control.upload(control.zenith))
    assert control.jobs.create(control.zenith.id, theirs, Idempotency(BODY, key="k")).id != mine.id


def test_retries_that_race_make_one_job(control: Control) -> None:
    spec = _spec(control.upload())
    with ThreadPoolExecutor(6) as pool:
        made = pool.map(lambda _: control.jobs.create(control.acme.id, spec, Idempotency(BODY, retry=True)), range(12))
        assert len({job.id for job in made}) == 1


def test_another_tenants_job_is_not_there(control: Control) -> None:
    job = control.create_job()
    for action in (
        control.jobs.get, control.jobs.cancel, control.jobs.pause, control.jobs.resume,
        control.jobs.events, control.jobs.checkpoints,
    ):  # fmt: skip
        with pytest.raises(NotFoundError):
            action(control.zenith.id, job.id)
    assert control.jobs.list(control.zenith.id).items == ()
    assert control.jobs.get(control.acme.id, job.id).state is JobStatus.QUEUED


def test_jobs_are_listed_newest_first_in_pages(control: Control) -> None:
    made = [control.create_job().id for _ in range(5)]
    first = control.jobs.list(control.acme.id, limit=2)
    second = control.jobs.list(control.acme.id, limit=2, after=first.items[-1].id)
    third = control.jobs.list(control.acme.id, limit=2, after=second.items[-1].id)
    assert [job.id for page in (first, second, third) for job in page.items] == made[::-1]
    assert [page.has_more for page in (first, second, third)] == [True, True, False]


def test_jobs_are_found_by_all_of_the_metadata_asked_for(control: Control) -> None:
    both = control.create_job(metadata={"team": "x", 'run\'s "1"': "%"}).id
    one = control.create_job(metadata={"team": "x"}).id
    none = control.create_job().id

    def ids(metadata: dict[str, str] | None) -> list[str]:
        return [job.id for job in control.jobs.list(control.acme.id, metadata=metadata).items]

    assert ids(None) == [none, one, both]
    assert ids({"team": "x"}) == [one, both]
    assert ids({"team": "x", 'run\'s "1"': "%"}) == [both]
    assert ids({"team": "%"}) == []
    assert ids({}) == [none]


def test_a_queued_job_is_cancelled_for_good(control: Control) -> None:
    job = control.create_job()
    cancelled = control.jobs.cancel(control.acme.id, job.id)
    assert cancelled.status is JobStatus.CANCELLED and cancelled.finished_at is not None
    assert control.queue.claim("worker") is None
    assert control.jobs.cancel(control.acme.id, job.id) == cancelled  # a retry of the same request
    assert _messages(control, job)[0] == "Fine-tuning job cancelled"
    assert control.counter.entered == [JobStatus.QUEUED, JobStatus.CANCELLED]


def test_a_finished_job_cannot_be_cancelled_paused_or_resumed(control: Control) -> None:
    job = control.create_job()
    control.finish(control.claim())
    for action in (control.jobs.cancel, control.jobs.pause, control.jobs.resume):
        with pytest.raises(ConflictError, match="succeeded") as caught:
            action(control.acme.id, job.id)
        assert caught.value.code == "invalid_job_state"


def test_a_paused_job_reads_queued_and_nobody_claims_it_until_it_is_resumed(control: Control) -> None:
    job = control.create_job()
    paused = control.jobs.pause(control.acme.id, job.id)
    assert paused.paused and paused.status is JobStatus.QUEUED
    assert control.jobs.pause(control.acme.id, job.id) == paused
    assert control.queue.claim("worker") is None
    resumed = control.jobs.resume(control.acme.id, job.id)
    assert not resumed.paused
    assert control.jobs.resume(control.acme.id, job.id) == resumed
    assert control.claim().job.id == job.id
    assert _messages(control, job) == [
        "Fine-tuning job resumed", "Fine-tuning job paused", f"Created fine-tuning job: {job.id}"
    ]  # fmt: skip


def test_events_are_newest_first_and_paged(control: Control) -> None:
    job = control.create_job()
    claim = control.claim()
    for number in range(5):
        control.queue.event(claim, f"event {number}", data={"step": number})
    first = control.jobs.events(control.acme.id, job.id, limit=4)
    assert [event.message for event in first.items] == ["event 4", "event 3", "event 2", "event 1"]
    assert first.has_more and first.items[0].data == {"step": 4}
    rest = control.jobs.events(control.acme.id, job.id, after=first.items[-1].id)
    assert [event.message for event in rest.items] == ["event 0", f"Created fine-tuning job: {job.id}"]
    assert not rest.has_more


def test_a_job_of_before_may_not_mark_the_page_of_another_tenants_list(control: Control) -> None:
    job = control.create_job()
    with pytest.raises(InvalidRequestError) as caught:
        control.jobs.list(control.zenith.id, after=job.id)
    assert caught.value.param == "after"
