"""The worker's threads: it takes jobs up, obeys pause and cancel, survives, and gives back what it cannot finish."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import service.tuning_worker
from adapters.thread_priority import LOWEST_PRIORITY
from service.heartbeat import Heartbeat, StopReason, StopRequested
from service.job import Claim, Directive, Job, JobStatus
from service.job_queue import FencedWriteError, JobQueue
from service.tuning import TuningServices
from service.tuning_worker import TuningWorker
from tests.service.tuning_fixtures import QUICK, Workshop, medlars, tiny_base, workshop

pytestmark = pytest.mark.slow

__all__ = ["tiny_base", "workshop"]

LONG = replace(QUICK, n_epochs=50, early_stopping_patience=None, learning_rate=1e-4)


@contextmanager
def _working(services: TuningServices) -> Iterator[TuningWorker]:
    worker = TuningWorker(services, name="worker", poll_seconds=0.02, heartbeat_seconds=0.02)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop()
        assert not worker.alive


def _step(workshop: Workshop, job: Job) -> int:
    """The last step that the job's events tell of."""
    steps = [message for message in workshop.messages(job) if message.startswith("Step ")]
    return int(steps[-1].split()[1].split("/")[0]) if steps else 0


def test_jobs_are_taken_up_one_after_another_at_the_lowest_priority(workshop: Workshop) -> None:
    priorities: list[int] = []
    jobs = [workshop.submit(hyperparameters=replace(QUICK, n_epochs=1)) for _ in range(2)]
    with _working(workshop.services) as worker:
        for job in jobs:
            workshop.await_state(job, JobStatus.SUCCEEDED)
        tid = worker._thread.native_id
        assert tid is not None
        priorities.append(os.getpriority(os.PRIO_PROCESS, tid))
    assert priorities == [LOWEST_PRIORITY]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) < LOWEST_PRIORITY
    assert workshop.tally.outcomes == ["succeeded", "succeeded"]


def test_serving_goes_on_while_a_job_trains(workshop: Workshop) -> None:
    before = workshop.answer("word 5?", None)
    job = workshop.submit(hyperparameters=LONG)
    with _working(workshop.services):
        workshop.await_that(lambda: _step(workshop, job) >= 3)
        assert workshop.answer("word 5?", None) == before
        assert workshop.job(job).state is JobStatus.RUNNING
        workshop.control.jobs.cancel(workshop.control.acme.id, job.id)
        workshop.await_that(lambda: workshop.tally.outcomes == ["cancelled"])


@pytest.mark.slow
def test_pause_and_resume_reach_a_running_job(workshop: Workshop) -> None:
    job = workshop.submit(hyperparameters=replace(LONG, n_epochs=10))
    with _working(workshop.services):
        workshop.await_that(lambda: _step(workshop, job) >= 3)
        workshop.control.jobs.pause(workshop.control.acme.id, job.id)
        workshop.await_that(lambda: workshop.tally.outcomes == ["paused"])
        assert workshop.job(job).status is JobStatus.QUEUED
        stopped_at = _step(workshop, job)
        assert 3 <= stopped_at < 50
        workshop.control.jobs.resume(workshop.control.acme.id, job.id)
        workshop.await_state(job, JobStatus.SUCCEEDED)
    assert f"Fine-tuning job paused at step {stopped_at}" in workshop.messages(job)
    assert f"Resuming from step {stopped_at}" in workshop.messages(job)


@pytest.mark.slow
def test_a_worker_that_stops_gives_its_job_to_the_next_one(workshop: Workshop) -> None:
    job = workshop.submit(hyperparameters=replace(LONG, n_epochs=10))
    with _working(workshop.services):
        workshop.await_that(lambda: _step(workshop, job) >= 3)
    assert workshop.tally.outcomes == ["shutdown"]
    assert workshop.job(job).state is JobStatus.QUEUED
    with _working(workshop.services):
        workshop.await_state(job, JobStatus.SUCCEEDED)
    assert any(message.startswith("Resuming from step") for message in workshop.messages(job))


class FaultyQueue(JobQueue):
    """Its first claims fail, as when the database is away."""

    num_faults = 3

    def claim(self, worker: str) -> Claim | None:
        if self.num_faults:
            self.num_faults -= 1
            raise ConnectionError("the database is away")
        return super().claim(worker)


def test_a_worker_outlives_a_database_that_is_away(workshop: Workshop, caplog: pytest.LogCaptureFixture) -> None:
    queue = FaultyQueue(workshop.control.database)
    job = workshop.submit(hyperparameters=replace(QUICK, n_epochs=1))
    with _working(replace(workshop.services, queue=queue)):
        workshop.await_state(job, JobStatus.SUCCEEDED)
    assert caplog.text.count("tuning.worker_error") == 3


def test_a_failed_job_does_not_stop_the_next_one(workshop: Workshop) -> None:
    bad, good = workshop.submit(medlars(2)), workshop.submit(hyperparameters=replace(QUICK, n_epochs=1))
    with _working(workshop.services):
        workshop.await_state(good, JobStatus.SUCCEEDED)
    assert workshop.job(bad).state is JobStatus.FAILED
    assert workshop.tally.outcomes == ["failed", "succeeded"]


class ScriptedQueue(JobQueue):
    """Answers heartbeats from a list; the last answer for good."""

    def __init__(self, workshop: Workshop, *answers: Directive | Exception) -> None:
        super().__init__(workshop.control.database, lease_seconds=0.3)
        self.answers = list(answers)
        self.num_beats = 0

    def heartbeat(self, claim: Claim) -> Directive:
        self.num_beats += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([Directive.CONTINUE, Directive.CONTINUE, Directive.PAUSE], StopReason.PAUSED),
        ([Directive.CONTINUE, Directive.CANCEL], StopReason.CANCELLED),
        ([Directive.CONTINUE, FencedWriteError("taken")], StopReason.LOST),
        ([ConnectionError("away")], StopReason.LOST),  # for as long as the lease
    ],
)
def test_a_heartbeat_brings_back_why_to_stop(
    workshop: Workshop, answers: list[Directive | Exception], reason: StopReason
) -> None:
    workshop.submit()
    queue = ScriptedQueue(workshop, *answers)
    claim = queue.claim("worker")
    assert claim is not None
    heartbeat = Heartbeat(queue)
    heartbeat.start()
    heartbeat.watch(claim)
    reasons: list[StopReason] = []

    def stopped() -> bool:
        try:
            heartbeat.check()
        except StopRequested as stop:
            reasons.append(stop.reason)
        return bool(reasons)

    workshop.await_that(stopped, seconds=10)
    heartbeat.unwatch()
    heartbeat.stop()
    assert reasons == [reason]
    assert queue.num_beats >= len(answers)


def test_a_short_absence_of_the_database_costs_nothing(workshop: Workshop) -> None:
    workshop.submit()
    queue = ScriptedQueue(workshop, ConnectionError("away"), Directive.CONTINUE)
    claim = queue.claim("worker")
    assert claim is not None
    heartbeat = Heartbeat(queue)
    heartbeat.start()
    heartbeat.watch(claim)
    workshop.await_that(lambda: queue.num_beats >= 10, seconds=10)
    heartbeat.check()
    heartbeat.unwatch()
    heartbeat.stop()


def test_a_heartbeat_says_that_the_process_ends(workshop: Workshop) -> None:
    heartbeat = Heartbeat(workshop.control.queue)
    heartbeat.start()
    heartbeat.check()
    heartbeat.shut_down()
    with pytest.raises(StopRequested) as caught:
        heartbeat.check()
    assert caught.value.reason is StopReason.SHUTDOWN
    heartbeat.stop()


VICTIM = """
import sys
from pathlib import Path
from adapters.store import AdapterStore
from service.database import connect
from service.engine.base_model import load_base_model
from service.files import Files
from service.job_queue import JobQueue
from service.resume_points import ResumePoints
from service.tuning import TuningServices
from service.tuning_worker import TuningWorker
from tests.service.tuning_fixtures import Tally
url, storage, base = sys.argv[1:]
database = connect(url)
services = TuningServices(
    queue=JobQueue(database),
    files=Files(database, storage),
    store=AdapterStore(storage, Path(storage) / "cache"),
    resume_points=ResumePoints(storage),
    base=load_base_model(base, quantization="none", device="cpu", name="tiny"),
    engine=None,
    observer=Tally(),
    max_lora_rank=64,
    save_every_seconds=0.0,
)
worker = TuningWorker(services, name="victim", poll_seconds=0.02)
worker.start()
worker._thread.join()
"""


@pytest.mark.slow
def test_after_kill_9_the_job_goes_on_from_its_last_resume_point_to_the_very_same_bytes(
    workshop: Workshop, tiny_llama_dir: Path
) -> None:
    job = workshop.submit(hyperparameters=replace(LONG, n_epochs=10))
    arguments = [workshop.control.url, str(workshop.control.storage), str(tiny_llama_dir)]
    root = Path(service.tuning_worker.__file__).parents[1]
    victim = subprocess.Popen([sys.executable, "-c", VICTIM, *arguments], cwd=root)
    try:
        workshop.await_that(lambda: workshop.job(job).resume_point is not None and _step(workshop, job) >= 5)
    finally:
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    assert workshop.job(job).state is JobStatus.RUNNING
    workshop.control.expire_lease(job.id)
    with _working(workshop.services):
        workshop.await_state(job, JobStatus.SUCCEEDED)
        twin = workshop.control.create_job(workshop.control.acme, **job.spec.__dict__)
        workshop.await_state(twin, JobStatus.SUCCEEDED)
    (resumed,) = [message for message in workshop.messages(job) if message.startswith("Resuming from step")]
    assert int(resumed.split()[-1]) >= 4
    assert workshop.digest(job) == workshop.digest(twin)
