"""A real Postgres is stopped and started again under a running service with a job."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import httpx
import psycopg
import pytest
import sqlalchemy as sa

from service.database import connect
from service.tables import jobs
from tools.kill_jobs.clients import Clients
from tools.kill_jobs.invariants import Invariants
from tools.kill_jobs.recipes import Recipe
from tools.kill_jobs.run import QUICK_SETTINGS
from tools.kill_jobs.victims import Nursery, Victim

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass
class Postgres:
    """A server of our own, to be stopped and started."""

    directory: Path
    user: str | None
    servers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"postgresql://postgres@/postgres?host={self.directory}"

    def start(self) -> None:
        command = ["postgres", "-D", f"{self.directory}/data", "-k", str(self.directory), "-c", "listen_addresses="]
        with (self.directory / "log").open("ab") as log:
            self.servers.append(subprocess.Popen(command, user=self.user, stdout=log, stderr=log, cwd=self.directory))
        deadline = time.monotonic() + 300
        while True:
            try:
                psycopg.connect(self.url).close()
                return
            except psycopg.OperationalError:
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def stop(self) -> None:
        """Without waiting for those who are connected."""
        server = self.servers.pop()
        server.send_signal(2)
        server.wait(300)


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    if not (shutil.which("initdb") and shutil.which("postgres")):
        pytest.skip("needs Postgres on the PATH")
    directory, user = Path(tempfile.mkdtemp(prefix="rootstock-pg-")), None
    if os.geteuid() == 0:
        user = "nobody"
        os.chown(directory, pwd.getpwnam(user).pw_uid, -1)
    made = Postgres(directory, user)
    initdb = ["initdb", "-D", f"{directory}/data", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync"]
    subprocess.run(initdb, user=user, check=True, capture_output=True, cwd=directory)
    made.start()
    yield made
    while made.servers:
        made.stop()
    shutil.rmtree(directory)


def test_a_database_that_is_away_is_a_503_and_what_was_acknowledged_goes_on(
    born: Nursery, tiny_llama_dir: Path, tmp_path: Path, postgres: Postgres
) -> None:
    """Broke: requests were answered with a 500, and a running job failed with an internal error."""
    settings: dict[str, Any] = {**QUICK_SETTINGS, "base": str(tiny_llama_dir), "database_url": postgres.url}
    victim = born.start(tmp_path, **settings)
    assert victim.wait_ready()
    clients = Clients(Random(0), (), num_tenants=2)
    clients.introduce(victim.url)
    for tenant in clients.tenants:
        clients.order(tenant, Recipe(0, num_epochs=20), "best")
    clients.ask(victim.url, num_unfinished=0)
    _await_training(postgres)
    postgres.stop()
    for _ in range(3):
        _refused(victim, clients.tenants[0].key)
        time.sleep(0.7)
    postgres.start()
    deadline = time.monotonic() + 300
    while clients.ask(victim.url, num_unfinished=0):
        assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.1)
    assert clients.compare(victim.url) == []
    database = connect(postgres.url)
    with database.read() as connection:
        assert set(connection.execute(sa.select(jobs.c.state)).scalars()) == {"succeeded"}
    assert Invariants(database, tmp_path / "storage").structure().violations == []
    database.close()
    victim.kill()


def _await_training(postgres: Postgres) -> None:
    database, deadline = connect(postgres.url), time.monotonic() + 300
    while True:
        with database.read() as connection:
            if all(connection.execute(sa.select(jobs.c.trained_tokens)).scalars()):
                break
        assert time.monotonic() < deadline
        time.sleep(0.02)
    database.close()


def _refused(victim: Victim, key: str) -> None:
    """In OpenAI's shape, with the time after which to come back; the service itself is well."""
    headers = {"authorization": f"Bearer {key}"}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    with httpx.Client(base_url=victim.url, headers=headers, timeout=60) as http:
        for answer in (
            http.get("/v1/models"),
            http.get("/v1/fine_tuning/jobs"),
            http.post("/v1/chat/completions", json=body),
            http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("train.jsonl", b"{}\n")}),
        ):
            assert answer.status_code == 503, answer.text
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["code"] == "database_unavailable" and int(answer.headers["retry-after"]) >= 1
    assert httpx.get(f"{victim.ops_url}/livez", timeout=60).status_code == 200
