"""The named steps: all are on the way of a job, they can be armed by nobody but the starter, and each is atomic."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from adapters.steps import unwatched
from adapters.store import AdapterStore
from service.config import SettingsError
from service.fault_points import STEPS, VARIABLE, fault_point
from service.job import JobStatus
from service.job_queue import JobQueue
from service.registry import Registry
from service.tables import adapter_versions, alias_moves, jobs
from service.tuning import TuningRun
from tests.service.control_fixtures import BASE, Control
from tests.service.tuning_fixtures import QUICK, Workshop

REPOSITORY = Path(__file__).parents[2]


def test_unarmed_nobody_watches() -> None:
    assert fault_point({}) is unwatched and fault_point({VARIABLE: ""}) is unwatched


@pytest.mark.parametrize(
    "armed", ["publish.renamed", "kill", "kill:", "kill:nowhere", "raise:publish.renamed", "kill:publish.renamed:0"]
)
def test_a_fault_that_is_none_stops_the_start(armed: str) -> None:
    with pytest.raises(SettingsError, match=VARIABLE):
        fault_point({VARIABLE: armed})


@pytest.mark.slow
def test_the_process_is_killed_at_the_arrival_that_was_asked_for() -> None:
    program = """
import os, sys
from service.fault_points import fault_point
reached = fault_point(os.environ)
for number in range(5):
    reached("train.evaluated")
    print(number, flush=True)
    reached("train.stepped")
"""
    found = subprocess.run(
        [sys.executable, "-c", program],
        env={VARIABLE: "kill:train.stepped:3", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        cwd=REPOSITORY,
    )
    assert found.returncode == -signal.SIGKILL
    assert found.stdout.split() == [b"0", b"1", b"2"]


@pytest.mark.slow
def test_every_step_is_on_the_way_of_a_job_and_of_an_alias(workshop: Workshop) -> None:
    seen: list[str] = []
    control = workshop.control
    queue = JobQueue(control.database, reached=seen.append)
    store = AdapterStore(str(control.storage), control.storage / "cache", seen.append)
    services = replace(workshop.services, queue=queue, store=store, reached=seen.append, save_every_seconds=0.0)
    job = workshop.submit(hyperparameters=replace(QUICK, n_epochs=1))
    claim = queue.claim("worker")
    assert claim is not None
    TuningRun(services, claim, lambda: None).execute()
    model = workshop.job(job).fine_tuned_model
    assert model is not None
    Registry(control.database, BASE, seen.append).aliases.set(control.acme.id, "hand", model)
    assert set(seen) == set(STEPS)


class PowerCutError(Exception):
    """At a step."""


@pytest.mark.slow
@pytest.mark.parametrize("step", ["claim.taken", "pointer.fenced", "pointer.alias", "pointer.written", "alias.moved"])
def test_what_is_cut_short_within_a_transaction_leaves_nothing(control: Control, step: str) -> None:
    def cut(reached: str) -> None:
        if reached == step:
            raise PowerCutError

    def everything() -> list[object]:
        with control.database.read() as connection:
            tables = (jobs, adapter_versions, alias_moves)
            return [[tuple(row) for row in connection.execute(sa.select(table))] for table in tables]

    model = control.publish(alias="best")
    job = control.create_job(alias="best")
    queue = JobQueue(control.database, reached=cut)
    if step == "claim.taken":
        before = everything()
        with pytest.raises(PowerCutError):
            queue.claim("worker")
    elif step == "alias.moved":
        before = everything()
        with pytest.raises(PowerCutError):
            Registry(control.database, BASE, cut).aliases.set(control.acme.id, "other", model)
    else:
        claim = queue.claim("worker")
        assert claim is not None
        before = everything()
        with pytest.raises(PowerCutError):
            queue.succeed(claim, digest="e" * 64, base_fingerprint=BASE.fingerprint, metrics={}, trained_tokens=9)
        assert control.jobs.get(control.acme.id, job.id).state is JobStatus.RUNNING
    assert everything() == before
    assert control.registry.resolve(control.acme.id, "best").id == model
