"""A worker that stands still for longer than its lease and then goes on: real processes, SIGSTOP and SIGCONT."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path
from random import Random

import httpx
import pytest
import sqlalchemy as sa

from service.database import connect
from service.tables import adapter_versions, alias_moves, jobs, usage_hours
from tools.kill_jobs.clients import Clients
from tools.kill_jobs.invariants import Invariants
from tools.kill_jobs.recipes import recipes
from tools.kill_jobs.run import QUICK_SETTINGS
from tools.kill_jobs.victims import Nursery, Victim

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def _await(condition: object, seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def _fenced(victim: Victim) -> float:
    text = httpx.get(f"{victim.ops_url}/metrics", timeout=60).text
    found = re.search(r"^rootstock_job_fenced_writes_total (\S+)$", text, re.MULTILINE)
    return 0.0 if found is None else float(found.group(1))


@pytest.mark.parametrize("step", ["train.stepped", "results.staged"])
def test_what_a_zombie_writes_after_its_lease_is_fenced_and_counted(
    born: Nursery, tiny_llama_dir: Path, tmp_path: Path, database_url: str, step: str
) -> None:
    settings = {**QUICK_SETTINGS, "base": str(tiny_llama_dir), "database_url": database_url, "training_jobs": 1}
    zombie = born.start(tmp_path, fault=f"stop:{step}:2" if step == "train.stepped" else f"stop:{step}:1", **settings)
    assert zombie.wait_ready()
    clients = Clients(Random(0), (), num_tenants=1)
    clients.introduce(zombie.url)
    clients.order(clients.tenants[0], recipes()[0], "best")
    clients.ask(zombie.url, num_unfinished=0)
    _await(zombie.is_stopped)
    heir = born.start(tmp_path, **settings)
    assert heir.wait_ready()
    _await(lambda: clients.ask(heir.url, num_unfinished=0) == 0)
    database = connect(database_url)
    before = _everything(database)
    zombie.send(signal.SIGCONT)
    _await(lambda: _fenced(zombie) >= 1)
    time.sleep(0.5)  # what else it may try
    assert _everything(database) == before
    with database.read() as connection:
        (job,) = connection.execute(sa.select(jobs)).all()
        versions = sa.select(adapter_versions).where(adapter_versions.c.step.is_(None))
        assert len(connection.execute(versions).all()) == 1
        assert (job.state, job.attempt) == ("succeeded", 2)
        assert connection.execute(sa.select(sa.func.sum(usage_hours.c.training_tokens))).scalar() == job.trained_tokens
    found = Invariants(database, tmp_path / "storage").structure()
    assert found.violations == []
    assert clients.compare(heir.url) == []
    database.close()
    for victim in (zombie, heir):
        victim.kill()


def _everything(database: object) -> list[object]:
    with database.read() as connection:  # type: ignore[attr-defined]
        tables = (jobs, adapter_versions, alias_moves, usage_hours)
        return [[tuple(row) for row in connection.execute(sa.select(table))] for table in tables]
