"""The worker's side of jobs: claims, leases, fences, endings; on SQLite and Postgres."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from service.errors import NotFoundError
from service.files import FilePurpose
from service.job import Claim, Directive, EventLevel, EventType, JobError, JobStatus
from service.job_queue import ClaimEndedError, FencedWriteError, JobCancelledError, JobQueue
from service.tables import jobs
from tests.service.control_fixtures import BASE, Control

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]

Write = Callable[[JobQueue, Claim], object]

WRITES: dict[str, Write] = {
    "heartbeat": lambda queue, claim: queue.heartbeat(claim),
    "files_validated": lambda queue, claim: queue.files_validated(claim),
    "event": lambda queue, claim: queue.event(claim, "zombie"),
    "progress": lambda queue, claim: queue.progress(claim, trained_tokens=99),
    "checkpoint": lambda queue, claim: queue.checkpoint(
        claim, step=7, digest="f" * 64, base_fingerprint=BASE.fingerprint, metrics={}
    ),
    "save_resume_point": lambda queue, claim: queue.save_resume_point(claim, "zombie"),
    "release": lambda queue, claim: queue.release(claim),
    "fail": lambda queue, claim: queue.fail(claim, code="zombie", message="zombie"),
    "succeed": lambda queue, claim: queue.succeed(
        claim, digest="f" * 64, base_fingerprint=BASE.fingerprint, metrics={}, trained_tokens=99
    ),
}


def _state_of_everything(control: Control, job_id: str) -> tuple[object, ...]:
    with control.database.read() as connection:
        row = connection.execute(sa.select(jobs).where(jobs.c.id == job_id)).one()
    return (
        tuple(row),
        control.jobs.events(control.acme.id, job_id, limit=100),
        control.jobs.checkpoints(control.acme.id, job_id),
        control.registry.versions(control.acme.id),
        control.registry.aliases.list(control.acme.id),
    )


def test_jobs_are_claimed_oldest_first_and_once(control: Control) -> None:
    made = [control.create_job().id, control.create_job(control.zenith).id]
    assert [control.claim().job.id, control.claim().job.id] == made
    assert control.queue.claim("worker") is None


def test_a_tenant_with_fewer_jobs_running_is_claimed_for_first(control: Control) -> None:
    ours = [control.create_job().id for _ in range(4)]
    theirs = [control.create_job(control.zenith).id for _ in range(2)]
    claims = [control.claim() for _ in range(3)]
    assert [claim.job.id for claim in claims] == [ours[0], theirs[0], ours[1]]
    control.finish(claims[0])
    assert [control.claim().job.id for _ in range(3)] == [ours[2], theirs[1], ours[3]]


def test_a_job_whose_worker_is_gone_does_not_count_against_its_tenant(control: Control) -> None:
    control.create_job()
    lost = control.claim()
    control.create_job(control.zenith)
    control.expire_lease(lost.job.id)
    assert control.claim().job.id == lost.job.id


def test_a_claim_raises_the_attempt_and_shows_the_job_running(control: Control) -> None:
    job = control.create_job()
    claim = control.claim()
    assert claim.attempt == claim.job.attempt == 1 and claim.job.state is JobStatus.RUNNING
    assert control.jobs.get(control.acme.id, job.id).status is JobStatus.VALIDATING_FILES
    control.queue.files_validated(claim)
    assert control.jobs.get(control.acme.id, job.id).status is JobStatus.RUNNING
    assert control.counter.entered == [JobStatus.QUEUED, JobStatus.RUNNING]


def test_workers_that_race_never_share_a_job(control: Control) -> None:
    made = {control.create_job().id for _ in range(8)}
    with ThreadPoolExecutor(6) as pool:
        claims = [claim for claim in pool.map(lambda n: control.queue.claim(f"w{n}"), range(24)) if claim is not None]
    assert len(claims) == 8 and {claim.job.id for claim in claims} == made


def test_a_lease_that_is_renewed_is_not_taken_over(control: Control) -> None:
    control.create_job()
    claim = control.claim()
    control.expire_lease(claim.job.id)
    assert control.queue.heartbeat(claim) is Directive.CONTINUE
    assert control.queue.claim("other") is None


def test_every_write_renews_the_lease(control: Control) -> None:
    for name, write in WRITES.items():
        if name in ("release", "fail", "succeed"):
            continue
        job = control.create_job()
        claim = control.claim()
        control.expire_lease(job.id)
        write(control.queue, claim)
        assert control.queue.claim("other") is None, name
        control.jobs.cancel(control.acme.id, job.id)


def test_a_lease_that_ran_out_is_taken_over_with_the_next_attempt(control: Control) -> None:
    control.create_job()
    first = control.claim("first")
    control.queue.files_validated(first)
    control.queue.save_resume_point(first, "state-of-step-40")
    control.expire_lease(first.job.id)
    second = control.claim("second")
    assert second.job.id == first.job.id and second.attempt == 2
    assert second.job.files_validated and second.job.resume_point == "state-of-step-40"


@pytest.mark.parametrize("name", WRITES)
def test_a_zombies_write_is_fenced_changes_nothing_and_is_counted(control: Control, name: str) -> None:
    control.create_job(alias="best")
    zombie = control.claim("zombie")
    control.expire_lease(zombie.job.id)
    heir = control.claim("heir")
    before = _state_of_everything(control, heir.job.id)
    with pytest.raises(FencedWriteError) as caught:
        WRITES[name](control.queue, zombie)
    assert not isinstance(caught.value, ClaimEndedError)
    assert _state_of_everything(control, heir.job.id) == before
    assert control.counter.num_fenced == 1
    assert control.queue.heartbeat(heir) is Directive.CONTINUE


@pytest.mark.parametrize("name", [name for name in WRITES if name != "heartbeat"])
def test_a_write_after_cancellation_is_refused_without_alarm(control: Control, name: str) -> None:
    job = control.create_job(alias="best")
    claim = control.claim()
    control.jobs.cancel(control.acme.id, job.id)
    before = _state_of_everything(control, job.id)
    with pytest.raises(JobCancelledError):
        WRITES[name](control.queue, claim)
    assert _state_of_everything(control, job.id) == before
    assert control.counter.num_fenced == 0


def test_a_heartbeat_tells_of_cancellation_pause_and_resumption(control: Control) -> None:
    job = control.create_job()
    claim = control.claim()
    assert control.queue.heartbeat(claim) is Directive.CONTINUE
    assert control.jobs.pause(control.acme.id, job.id).status is JobStatus.QUEUED
    assert control.queue.heartbeat(claim) is Directive.PAUSE
    control.jobs.resume(control.acme.id, job.id)
    assert control.queue.heartbeat(claim) is Directive.CONTINUE
    control.jobs.cancel(control.acme.id, job.id)
    assert control.queue.heartbeat(claim) is Directive.CANCEL


def test_a_paused_job_that_was_released_goes_on_after_resumption_only(control: Control) -> None:
    job = control.create_job()
    claim = control.claim()
    control.queue.files_validated(claim)
    control.jobs.pause(control.acme.id, job.id)
    control.queue.save_resume_point(claim, "here")
    control.queue.release(claim)
    assert control.queue.claim("worker") is None
    control.jobs.resume(control.acme.id, job.id)
    again = control.claim()
    assert (again.job.id, again.attempt, again.job.resume_point) == (job.id, 2, "here")


def test_a_paused_job_whose_worker_died_waits_for_resumption(control: Control) -> None:
    job = control.create_job()
    control.claim()
    control.jobs.pause(control.acme.id, job.id)
    control.expire_lease(job.id)
    assert control.queue.claim("other") is None
    control.jobs.resume(control.acme.id, job.id)
    assert control.claim("other").attempt == 2


def test_a_deleted_tenants_job_reads_as_cancelled(control: Control) -> None:
    control.create_job()
    claim = control.claim()
    control.tenants.delete(control.acme.id)
    assert control.queue.heartbeat(claim) is Directive.CANCEL
    for name in ("event", "succeed"):
        with pytest.raises(JobCancelledError):
            WRITES[name](control.queue, claim)
    assert control.counter.num_fenced == 0


def test_a_heartbeat_that_comes_after_the_end_is_no_alarm(control: Control) -> None:
    control.create_job()
    claim = control.claim()
    control.finish(claim)
    assert control.queue.heartbeat(claim) is Directive.CANCEL
    with pytest.raises(ClaimEndedError):
        control.queue.event(claim, "too late")
    assert control.counter.num_fenced == 0


def test_progress_writes_what_is_known_and_keeps_the_rest(control: Control) -> None:
    job = control.create_job()
    claim = control.claim()
    control.queue.progress(claim, resolved={"n_epochs": 3, "batch_size": 8})
    control.queue.progress(claim, trained_tokens=1234, estimated_finish=2e9)
    control.queue.progress(claim, trained_tokens=2345)
    row = control.jobs.get(control.acme.id, job.id)
    assert (row.trained_tokens, row.estimated_finish) == (2345, 2e9)
    assert row.resolved == {"n_epochs": 3, "batch_size": 8}


def test_events_keep_level_type_and_data(control: Control) -> None:
    job = control.create_job()
    claim = control.claim()
    data = {"step": 3, "train_loss": 0.25, "valid_loss": None}
    control.queue.event(claim, "Step 3", level=EventLevel.WARN, type=EventType.METRICS, data=data)
    event = control.jobs.events(control.acme.id, job.id).items[0]
    assert (event.level, event.type, event.data) == (EventLevel.WARN, EventType.METRICS, data)


def test_checkpoints_are_servable_and_newest_first(control: Control) -> None:
    job = control.create_job(suffix="s")
    claim = control.claim()
    for step in (10, 20):
        control.queue.checkpoint(
            claim,
            step=step,
            digest=f"{step}" * 32,
            base_fingerprint=BASE.fingerprint,
            metrics={"train_loss": 1 / step},
        )
    page = control.jobs.checkpoints(control.acme.id, job.id)
    assert [checkpoint.step for checkpoint in page.items] == [20, 10]
    assert page.items[0].model_id == f"{job.model_id}:ckpt-step-20"
    assert page.items[1].metrics == {"train_loss": 0.1}
    assert control.registry.resolve(control.acme.id, page.items[1].model_id).digest == "10" * 32
    rest = control.jobs.checkpoints(control.acme.id, job.id, after=page.items[0].id)
    assert rest.items == page.items[1:]


def test_the_same_checkpoint_written_again_after_a_restart_replaces_the_first(control: Control) -> None:
    job = control.create_job()
    claim = control.claim()
    for digest in ("a" * 64, "b" * 64):
        control.queue.checkpoint(
            claim, step=5, digest=digest, base_fingerprint=BASE.fingerprint, metrics={"train_loss": 1.0}
        )
    assert [point.digest for point in control.jobs.checkpoints(control.acme.id, job.id).items] == ["b" * 64]


def test_success_publishes_version_files_and_alias_with_the_job(control: Control) -> None:
    job = control.create_job(suffix="intents", alias="best")
    claim = control.claim()
    staged = control.files.stage(control.acme.id, "step_metrics.csv", FilePurpose.FINE_TUNE_RESULTS, [b"step\n"])
    model = control.queue.succeed(
        claim,
        digest="d" * 64,
        base_fingerprint=BASE.fingerprint,
        metrics={"valid_loss": 0.5},
        trained_tokens=77,
        result_files=[staged],
    )
    row = control.jobs.get(control.acme.id, job.id)
    assert (row.status, row.fine_tuned_model, row.trained_tokens) == (JobStatus.SUCCEEDED, model, 77)
    assert row.result_files == (staged.id,) and row.finished_at is not None and row.error is None
    assert control.files.get(control.acme.id, staged.id).purpose is FilePurpose.FINE_TUNE_RESULTS
    version = control.registry.version(control.acme.id, model)
    assert (version.digest, version.job_id, version.metrics) == ("d" * 64, job.id, {"valid_loss": 0.5})
    assert control.registry.resolve(control.acme.id, "best").id == model
    assert control.counter.entered[-1] is JobStatus.SUCCEEDED


def test_success_is_all_or_nothing(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    job = control.create_job(alias="best")
    claim = control.claim()
    staged = control.files.stage(control.acme.id, "r.csv", FilePurpose.FINE_TUNE_RESULTS, [b"step\n"])
    before = _state_of_everything(control, job.id)

    def crash(*_: object) -> None:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr("service.promotion.move_alias", crash)
        control.queue.succeed(
            claim, digest="d" * 64, base_fingerprint="f", metrics={}, trained_tokens=1, result_files=[staged]
        )
    assert _state_of_everything(control, job.id) == before
    with pytest.raises(NotFoundError):
        control.files.get(control.acme.id, staged.id)
    control.finish(claim)


def test_a_paused_job_may_still_finish(control: Control) -> None:
    job = control.create_job()
    claim = control.claim()
    control.jobs.pause(control.acme.id, job.id)
    control.finish(claim)
    row = control.jobs.get(control.acme.id, job.id)
    assert row.status is JobStatus.SUCCEEDED and not row.paused


def test_failure_keeps_its_reason(control: Control) -> None:
    job = control.create_job()
    control.queue.fail(
        control.claim(), code="invalid_n_examples", message="3 examples, 10 needed", param="training_file"
    )
    row = control.jobs.get(control.acme.id, job.id)
    assert row.status is JobStatus.FAILED and row.finished_at is not None
    assert row.error == JobError("invalid_n_examples", "3 examples, 10 needed", "training_file")
    event = control.jobs.events(control.acme.id, job.id).items[0]
    assert (event.level, event.message) == (EventLevel.ERROR, "3 examples, 10 needed")
    assert control.queue.claim("worker") is None


def test_a_job_that_keeps_losing_its_workers_fails(control: Control) -> None:
    queue = JobQueue(control.database, max_lost_leases=2, observer=control.counter)
    job, next_job = control.create_job(), control.create_job()
    for _ in range(3):
        claim = queue.claim("worker")
        assert claim is not None and claim.job.id == job.id
        control.expire_lease(job.id)
    claim = queue.claim("worker")
    assert claim is not None and claim.job.id == next_job.id
    row = control.jobs.get(control.acme.id, job.id)
    assert row.status is JobStatus.FAILED and row.error is not None and row.error.code == "worker_lost"


def test_a_job_that_gets_on_between_losses_is_not_given_up(control: Control) -> None:
    queue = JobQueue(control.database, max_lost_leases=1)
    job = control.create_job()
    for number in range(5):
        claim = queue.claim("worker")
        assert claim is not None and claim.attempt == number + 1
        queue.save_resume_point(claim, f"step-{number}")
        control.expire_lease(job.id)


def test_the_age_of_the_stalest_lease_is_known(control: Control) -> None:
    assert control.queue.max_lease_age_seconds() == 0.0
    job = control.create_job()
    control.claim()
    with control.database.begin() as connection:
        silent = jobs.c.lease_renewed_at - 100
        connection.execute(jobs.update().where(jobs.c.id == job.id).values(lease_renewed_at=silent))
    assert control.queue.max_lease_age_seconds() == pytest.approx(100, abs=30)


WORKER = """
import sys, time
from service.database import connect
from service.job_queue import JobQueue
queue = JobQueue(connect(sys.argv[1]), lease_seconds=2.0)
claim = queue.claim("killed")
queue.files_validated(claim)
queue.checkpoint(claim, step=4, digest="4" * 64, base_fingerprint="fingerprint-of-tiny", metrics={"train_loss": 2.0})
queue.save_resume_point(claim, "state-of-step-4")
print(claim.attempt, flush=True)
while True:
    queue.heartbeat(claim)
    time.sleep(0.05)
"""


def test_after_kill_9_another_worker_goes_on_from_the_checkpoint_and_the_zombie_is_fenced(control: Control) -> None:
    job = control.create_job()
    command = [sys.executable, "-c", WORKER, control.url]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": "."})
    with worker:
        assert worker.stdout is not None and worker.stdout.readline() == b"1\n"
        assert control.queue.claim("impatient") is None  # it lives, so its lease holds
        worker.send_signal(signal.SIGKILL)
    zombie = Claim(control.jobs.get(control.acme.id, job.id), attempt=1, worker="killed", lease_seconds=2.0)
    deadline = time.monotonic() + 30
    while (heir := control.queue.claim("heir")) is None:
        assert time.monotonic() < deadline, "the dead worker's lease never ran out"
        time.sleep(0.05)
    assert (heir.job.id, heir.attempt, heir.job.resume_point) == (job.id, 2, "state-of-step-4")
    assert [point.step for point in control.jobs.checkpoints(control.acme.id, job.id).items] == [4]
    for write in WRITES.values():
        with pytest.raises(FencedWriteError):
            write(control.queue, zombie)
    assert control.counter.num_fenced == len(WRITES)
    control.finish(heir)
    assert control.jobs.get(control.acme.id, job.id).status is JobStatus.SUCCEEDED
