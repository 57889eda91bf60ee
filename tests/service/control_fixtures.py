"""Fixtures of the control plane: a database (SQLite, and Postgres where there is one) and what stands on it.

Postgres is `ROOTSTOCK_TEST_POSTGRES_URL`, or a server started from the `initdb` and `postgres` found on the PATH.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from service.database import Database, connect
from service.files import FilePurpose, Files
from service.job import Claim, Job, JobSpec, JobStatus
from service.job_queue import JobQueue
from service.jobs import Idempotency, Jobs
from service.registry import BaseIdentity, Registry
from service.schema import HEAD
from service.tables import jobs
from service.tenants import Tenant, Tenants

__all__ = ["control", "database", "database_url", "postgres_server", "postgres_url"]

BASE = BaseIdentity("tiny", "fingerprint-of-tiny", created_at=1.0)


@dataclass
class Counter:
    """A JobObserver that remembers."""

    entered: list[JobStatus] = field(default_factory=list)
    num_fenced: int = 0

    def job_entered(self, state: JobStatus) -> None:
        self.entered.append(state)

    def write_fenced(self) -> None:
        self.num_fenced += 1


@dataclass(frozen=True)
class Control:
    """The whole control plane over one database, with two tenants."""

    database: Database
    url: str
    storage: Path
    tenants: Tenants
    files: Files
    jobs: Jobs
    queue: JobQueue
    registry: Registry
    counter: Counter
    acme: Tenant
    acme_key: str
    zenith: Tenant
    zenith_key: str

    def upload(self, tenant: Tenant | None = None, purpose: FilePurpose = FilePurpose.FINE_TUNE) -> str:
        return self.files.create((tenant or self.acme).id, "train.jsonl", purpose, [b'{"messages": []}\n']).id

    def create_job(self, tenant: Tenant | None = None, **spec: object) -> Job:
        """A job of its own training file, never taken for a repetition of another."""
        tenant = tenant or self.acme
        values = {"model": "tiny", "base_model": "tiny", "seed": 1, **spec}
        values.setdefault("training_file", self.upload(tenant))
        return self.jobs.create(tenant.id, JobSpec(**values), Idempotency(secrets.token_hex(32), retry=False))  # type: ignore[arg-type]

    def claim(self, worker: str = "worker") -> Claim:
        claim = self.queue.claim(worker)
        assert claim is not None
        return claim

    def finish(self, claim: Claim, digest: str = "d" * 64, fingerprint: str = BASE.fingerprint) -> str:
        return self.queue.succeed(
            claim, digest=digest, base_fingerprint=fingerprint, metrics={"valid_loss": 0.5}, trained_tokens=10
        )

    def publish(self, tenant: Tenant | None = None, *, digest: str = "d" * 64, **spec: object) -> str:
        """A fine-tuned model of the tenant, from a job that ran through; its id."""
        job = self.create_job(tenant, **spec)
        claim = self.claim()
        assert claim.job.id == job.id
        return self.finish(claim, digest)

    def expire_lease(self, job_id: str) -> None:
        """As if the worker had been silent for longer than its lease."""
        with self.database.begin() as connection:
            connection.execute(jobs.update().where(jobs.c.id == job_id).values(lease_expires_at=1.0))


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The url of a Postgres server in which the tests may create databases."""
    if url := os.environ.get("ROOTSTOCK_TEST_POSTGRES_URL"):
        yield url
        return
    if not (shutil.which("initdb") and shutil.which("postgres")):
        pytest.skip("needs ROOTSTOCK_TEST_POSTGRES_URL or Postgres on the PATH")
    directory = tempfile.mkdtemp(prefix="rootstock-pg-")  # short: the path of a socket has at most 107 bytes
    try:
        yield from _run_postgres(directory)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _run_postgres(directory: str) -> Iterator[str]:
    user = None
    if os.geteuid() == 0:  # Postgres refuses to run as root
        user = "nobody"
        os.chown(directory, pwd.getpwnam(user).pw_uid, -1)
    data = f"{directory}/data"
    initdb = ["initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync"]
    subprocess.run(initdb, user=user, check=True, capture_output=True, cwd=directory)
    serve = ["postgres", "-D", data, "-k", directory, "-c", "listen_addresses=", "-c", "fsync=off"]
    with open(f"{directory}/log", "wb") as log:
        server = subprocess.Popen(serve, user=user, stdout=log, stderr=log, cwd=directory)
    try:
        url = f"postgresql://postgres@/postgres?host={directory}"
        _await_server(url)
        yield url
    finally:
        server.terminate()
        server.wait(30)


def _await_server(url: str) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            psycopg.connect(url).close()
            return
        except psycopg.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@pytest.fixture(scope="session")
def postgres_url(postgres_server: str) -> Iterator[str]:
    """A database of this test run; `database_url` empties it after each test."""
    name = f"test_{secrets.token_hex(8)}"
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    url = sa.make_url(postgres_server).set(database=name).render_as_string(hide_password=False)
    connect(url).close()
    yield url
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database, on both engines."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'data' / 'rootstock.db'}"
        return
    url: str = request.getfixturevalue("postgres_url")
    yield url
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("TRUNCATE tenants, usage_hours, usage_entries, audit_log, removals RESTART IDENTITY CASCADE")
        connection.execute("UPDATE alembic_version SET version_num = %s", (HEAD,))


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = connect(database_url)
    yield opened
    opened.close()


@pytest.fixture
def control(database: Database, database_url: str, tmp_path: Path) -> Control:
    return make_control(database, database_url, tmp_path / "storage")


def make_control(database: Database, url: str, storage: Path) -> Control:
    tenants, counter = Tenants(database), Counter()
    acme, acme_key = tenants.create("acme")
    zenith, zenith_key = tenants.create("zenith")
    return Control(
        database=database,
        url=url,
        storage=storage,
        tenants=tenants,
        files=Files(database, str(storage)),
        jobs=Jobs(database, counter),
        queue=JobQueue(database, observer=counter),
        registry=Registry(database, BASE),
        counter=counter,
        acme=acme,
        acme_key=acme_key,
        zenith=zenith,
        zenith_key=zenith_key,
    )
