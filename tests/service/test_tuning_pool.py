"""Several jobs at once: of different tenants, on one base, each to the bits it would reach alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from adapters.shared_forward import SharedForward
from adapters.trainer import StepResult, Trainer
from service.engine.base_model import BaseModel, load_base_model
from service.files import FilePurpose
from service.job import Hyperparameters, Job, JobStatus
from service.tenants import Tenant
from service.tuning import TuningServices
from service.tuning_pool import TuningPool
from tests.service.tuning_fixtures import QUICK, Workshop, tiny_base, workshop

pytestmark = pytest.mark.slow

__all__ = ["tiny_base", "workshop"]

SHORT = replace(QUICK, n_epochs=2)
LONG = replace(QUICK, n_epochs=50, early_stopping_patience=None, learning_rate=1e-4)


@pytest.fixture(scope="module")
def nf4_base(tiny_llama_dir: Path) -> BaseModel:
    return load_base_model(str(tiny_llama_dir), quantization="nf4", device="cpu", name="tiny")


@contextmanager
def _working(services: TuningServices, num_jobs: int) -> Iterator[TuningPool]:
    pool = TuningPool(services, num_jobs, name="worker", poll_seconds=0.02, heartbeat_seconds=0.02)
    pool.start()
    try:
        yield pool
    finally:
        pool.stop()
        assert not pool.alive


def _job(workshop: Workshop, tenant: Tenant, word: str, hyperparameters: Hyperparameters) -> Job:
    row = '{{"messages": [{{"role": "user", "content": "word {0}?"}}, {{"role": "assistant", "content": "a {1}"}}]}}\n'
    lines = [row.format(number, word).encode() for number in range(24)]
    file = workshop.control.files.create(tenant.id, "train.jsonl", FilePurpose.FINE_TUNE, lines)
    return workshop.control.create_job(tenant, hyperparameters=hyperparameters, seed=3, training_file=file.id)


def _state(workshop: Workshop, tenant: Tenant, job: Job) -> JobStatus:
    return workshop.control.jobs.get(tenant.id, job.id).state


def _digest(workshop: Workshop, tenant: Tenant, job: Job) -> str:
    model = workshop.control.jobs.get(tenant.id, job.id).fine_tuned_model
    assert model is not None
    (version,) = [v for v in workshop.control.registry.versions(tenant.id) if v.id == model]
    return version.digest


def _two_jobs(workshop: Workshop, services: TuningServices, num_jobs: int) -> list[str]:
    """Digests of a job of each tenant, with other data and another rank."""
    acme, zenith = workshop.control.acme, workshop.control.zenith
    jobs = [(acme, _job(workshop, acme, "medlar", SHORT))]
    jobs.append((zenith, _job(workshop, zenith, "quince or two", replace(SHORT, lora_r=4, batch_size=3))))
    with _working(services, num_jobs):
        workshop.await_that(lambda: all(_state(workshop, *job) is JobStatus.SUCCEEDED for job in jobs))
    return [_digest(workshop, *job) for job in jobs]


@pytest.mark.slow
def test_jobs_of_two_tenants_at_once_publish_the_adapters_they_would_publish_alone(
    workshop: Workshop, nf4_base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    forward = SharedForward._forward

    def counting(shared: SharedForward, packs: list[Any]) -> None:
        sizes.append(len(packs))
        forward(shared, packs)

    monkeypatch.setattr(SharedForward, "_forward", counting)
    services = replace(workshop.services, base=nf4_base)
    alone = _two_jobs(workshop, services, 1)
    monkeypatch.setattr("adapters.turns.SHORTEST_PATIENCE", 1.0)
    monkeypatch.setattr("adapters.turns.LONGEST_PATIENCE", 1.0)
    both, step = Barrier(2, timeout=60), Trainer.step

    def step_when_both_have_come(trainer: Trainer, *args: Any) -> StepResult:
        if trainer.steps_done == 0:
            both.wait()
        return step(trainer, *args)

    monkeypatch.setattr(Trainer, "step", step_when_both_have_come)
    together = _two_jobs(workshop, services, 2)
    assert max(sizes) == 2, "they did not train together"
    assert together == alone
    assert len(set(alone)) == 2


def test_as_many_jobs_run_at_once_as_are_asked_for_and_all_are_given_back(workshop: Workshop) -> None:
    acme, zenith = workshop.control.acme, workshop.control.zenith
    jobs = [(acme, _job(workshop, acme, "medlar", LONG)) for _ in range(2)]
    jobs.append((zenith, _job(workshop, zenith, "quince", LONG)))
    with _working(workshop.services, 2):
        workshop.await_that(lambda: sum(_state(workshop, *job) is JobStatus.RUNNING for job in jobs) == 2)
        workshop.await_that(lambda: workshop.tally.num_tokens > 0)
        assert [_state(workshop, *job) for job in jobs] == [JobStatus.RUNNING, JobStatus.QUEUED, JobStatus.RUNNING]
    assert [_state(workshop, *job) for job in jobs] == [JobStatus.QUEUED] * 3
    assert workshop.tally.outcomes == ["shutdown"] * 2


def test_a_job_that_is_cancelled_leaves_the_others_running(workshop: Workshop) -> None:
    acme, zenith = workshop.control.acme, workshop.control.zenith
    doomed, other = _job(workshop, acme, "medlar", LONG), _job(workshop, zenith, "quince", SHORT)
    with _working(workshop.services, 2):
        workshop.await_that(lambda: workshop.tally.num_tokens > 0)
        workshop.control.jobs.cancel(acme.id, doomed.id)
        workshop.await_that(lambda: _state(workshop, zenith, other) is JobStatus.SUCCEEDED)
        workshop.await_that(lambda: len(workshop.tally.outcomes) == 2)
    assert sorted(workshop.tally.outcomes) == ["cancelled", "succeeded"]
