"""A run of kills on one data directory: which step, when, and what comes after. Knows the service by its outside."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa

from service.database import Database, connect
from service.fault_points import STEPS
from service.job import JobStatus
from service.tables import adapter_versions, jobs
from tools.kill_jobs.clients import Clients
from tools.kill_jobs.invariants import Expected, Invariants, taken_up_again
from tools.kill_jobs.recipes import Recipe, recipes
from tools.kill_jobs.victims import Nursery, Victim

PATIENCE_SECONDS = 90.0
"""For a step to be reached; then the kill comes at that moment instead."""
MAX_LOST_LEASES = 3
"""The queue's: a job is not lost more often in a row, or it fails by design."""
NUM_UNFINISHED = 3
ARRIVALS = {
    "train.stepped": 9,
    "train.evaluated": 6,
    "resume.written": 9,
    "resume.referenced": 9,
    "checkpoint.listed": 2,
}
"""The kill comes at one of the first so many arrivals; at others' first three."""
ANY_TIME = "any time"
STARTING = "starting"
QUICK_SETTINGS: dict[str, Any] = {"base_name": "tiny", "resume_point_seconds": 0.0}


def undisturbed(
    nursery: Nursery, directory: Path, base: str, wanted: tuple[Recipe, ...] | None = None
) -> dict[int, Expected]:
    """What each recipe's job ends with when nobody kills it."""
    directory.mkdir(parents=True)
    found: dict[int, Expected] = {}
    victim = nursery.start(directory, base=base, training_jobs=1, **_settings(None))
    assert victim.wait_ready(), (directory / "log").read_text()[-2000:]
    clients = Clients(random.Random(0), (), num_tenants=1)
    clients.introduce(victim.url)
    for recipe in recipes() if wanted is None else wanted:
        clients.order(clients.tenants[0], recipe, None)
    _until_finished(victim, clients)
    victim.kill()
    with _opened(_url(directory, None)) as database, database.read() as connection:
        query = sa.select(jobs, adapter_versions.c.digest).where(
            adapter_versions.c.job_id == jobs.c.id, adapter_versions.c.step.is_(None)
        )
        for row in connection.execute(query):
            found[row.spec["seed"]] = Expected(row.digest, row.trained_tokens)
    return found


class KillRun:
    def __init__(
        self,
        nursery: Nursery,
        directory: Path,
        base: str,
        *,
        seed: int,
        database_url: str | None = None,
        training_jobs: int = 2,
        choice: tuple[Recipe, ...] | None = None,
        plan: Sequence[str] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        directory.mkdir(parents=True)
        self._nursery, self._directory, self._base = nursery, directory, base
        self._rng = random.Random(seed)
        self._clients = Clients(self._rng, recipes() if choice is None else choice)
        self._settings = {"training_jobs": training_jobs, **_settings(database_url)}
        self._database_url = _url(directory, database_url)
        self.kills: Counter[str] = Counter()
        self.not_reached: Counter[str] = Counter()
        self._found: dict[str, Any] = {}
        self._plan, self._say = plan, say

    def execute(self, num_kills: int, expected: dict[int, Expected], seconds: float) -> list[str]:
        """Kill so often, finish, and say what is wrong."""
        deadline = time.monotonic() + seconds
        victim = self._start("")
        self._clients.introduce(victim.url)
        victim.kill()
        plan: list[str] = []
        violations: list[str] = []
        while self.kills.total() < num_kills and not violations and time.monotonic() < deadline:
            plan = plan or self._shuffled()
            self._live(plan.pop())
            violations = self._look_inside(None)
            self._say(f"{self.kills.total()} kills, {self._found['jobs']}")
        victim = self._start("")
        _until_finished(victim, self._clients)
        violations += self._clients.compare(victim.url)
        victim.kill()
        return violations + self._look_inside(expected)

    def counts(self) -> dict[str, Any]:
        return {
            "kills": self.kills.total(),
            "kills_by_step": dict(sorted(self.kills.items())),
            "steps_not_reached_in_time": dict(self.not_reached),
            **self._found,
        }

    def _shuffled(self) -> list[str]:
        """Each step once, and one kill in five at no step at all; or what was asked for, in that order."""
        if self._plan is not None:
            return list(reversed(self._plan))
        plan = [*STEPS, *[ANY_TIME] * (len(STEPS) // 6), *[STARTING] * (len(STEPS) // 10)]
        self._rng.shuffle(plan)
        return plan

    def _live(self, step: str) -> None:
        """One service, until it is killed."""
        self._let_the_unlucky_finish()
        if step == STARTING:
            victim = self._start("", wait=False)
            victim.ended.wait(self._rng.uniform(0.0, 1.5))
            return self._kill(victim, STARTING)
        fault = "" if step == ANY_TIME else f"kill:{step}:{self._rng.randint(1, ARRIVALS.get(step, 3))}"
        victim = self._start(fault, wait=False)
        patience = self._rng.uniform(0.0, 5.0) if step == ANY_TIME else PATIENCE_SECONDS
        if not victim.wait_ready():  # it trains before it answers, so that was quick
            return self._count_fault(victim, step)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and not victim.ended.is_set():
            with suppress(httpx.TransportError):
                self._clients.ask(victim.url, num_unfinished=NUM_UNFINISHED)
                self._clients.move_aliases(victim.url)
                if self._rng.random() < 0.01:
                    self._clients.cancel_one(victim.url)
            victim.ended.wait(0.1)
        if victim.ended.is_set():
            return self._count_fault(victim, step)
        if step != ANY_TIME:
            self.not_reached[step] += 1
        self._kill(victim, ANY_TIME)

    def _count_fault(self, victim: Victim, step: str) -> None:
        assert victim.was_killed, f"{step}: ended with {victim.status}\n{self._log()}"
        self.kills[step] += 1

    def _kill(self, victim: Victim, name: str) -> None:
        victim.kill()
        self.kills[name] += 1

    def _let_the_unlucky_finish(self) -> None:
        """Who was lost as often in a row as may be gets a service that nobody kills."""
        unlucky = sa.select(jobs.c.id).where(
            jobs.c.num_lost_leases + 1 >= MAX_LOST_LEASES, jobs.c.state.in_((JobStatus.RUNNING, JobStatus.QUEUED))
        )
        with _opened(self._database_url) as database:
            if not _ids(database, unlucky):
                return
            victim = self._start("")
            deadline = time.monotonic() + 1800
            while _ids(database, unlucky):
                assert time.monotonic() < deadline and not victim.ended.is_set(), self._log()
                time.sleep(0.1)
        self._kill(victim, ANY_TIME)

    def _start(self, fault: str, *, wait: bool = True) -> Victim:
        victim = self._nursery.start(self._directory, fault=fault, base=self._base, **self._settings)
        if wait:
            assert victim.wait_ready(), self._log()
        return victim

    def _look_inside(self, expected: dict[int, Expected] | None) -> list[str]:
        with _opened(self._database_url) as database:
            invariants = Invariants(database, self._directory / "storage")
            found = invariants.structure() if expected is None else invariants.outcome(expected)
            resumed, again = taken_up_again(database)
            with database.read() as connection:
                states = connection.execute(sa.select(jobs.c.state, sa.func.count()).group_by(jobs.c.state)).all()
        self._found = {
            "jobs": {state: number for state, number in states},
            "taken_up_again": again,
            "resumed_from_a_state": resumed,
            "garbage": dict(found.garbage),
        }
        return found.violations

    def _log(self) -> str:
        return (self._directory / "log").read_text()[-3000:]


def _until_finished(victim: Victim, clients: Clients, seconds: float = 1800.0) -> None:
    deadline = time.monotonic() + seconds
    while clients.ask(victim.url, num_unfinished=0):
        assert time.monotonic() < deadline, "the jobs do not end"
        time.sleep(0.1)


def _settings(database_url: str | None) -> dict[str, Any]:
    return QUICK_SETTINGS if database_url is None else {**QUICK_SETTINGS, "database_url": database_url}


def _url(directory: Path, database_url: str | None) -> str:
    return database_url or f"sqlite:///{directory / 'rootstock.db'}"


def _opened(url: str) -> closing[Database]:
    return closing(connect(url))


def _ids(database: Database, query: sa.Select[Any]) -> list[str]:
    with database.read() as connection:
        return list(connection.execute(query).scalars())
