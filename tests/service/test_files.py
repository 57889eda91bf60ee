"""Files: durable content, limits, isolation, expiry; on SQLite and Postgres."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import sqlalchemy as sa
from starlette.requests import ClientDisconnect

from service.database import Database, connect
from service.errors import ConflictError, InvalidRequestError, NotFoundError, TooLargeError
from service.files import FilePurpose, Files
from service.tables import files
from service.tenants import Tenants
from tests.service.control_fixtures import Control

REPOSITORY = Path(__file__).parents[2]


def _contents(control: Control) -> list[Path]:
    return [path for path in control.storage.rglob("*") if path.is_file()]


def _expire(control: Control, file_id: str) -> None:
    with control.database.begin() as connection:
        connection.execute(files.update().where(files.c.id == file_id).values(expires_at=1.0))


def test_a_file_is_read_back_byte_for_byte(control: Control) -> None:
    made = control.files.create(control.acme.id, "t.jsonl", FilePurpose.FINE_TUNE, [b"a\n", b"", b"\xc3\xa9"])
    assert made.bytes == 4 and made.filename == "t.jsonl" and made.expires_at is None
    assert control.files.get(control.acme.id, made.id) == made
    with control.files.open(control.acme.id, made.id) as stream:
        assert stream.read() == b"a\n\xc3\xa9"


def test_an_acknowledged_file_survives_a_restart(control: Control) -> None:
    file_id = control.upload()
    again = connect(control.url)
    with Files(again, str(control.storage)).open(control.acme.id, file_id) as stream:
        assert stream.read() == b'{"messages": []}\n'
    again.close()


def test_a_file_over_the_limit_is_refused_and_leaves_nothing(control: Control) -> None:
    small = Files(control.database, str(control.storage), max_bytes=10)
    small.create(control.acme.id, "fits", FilePurpose.FINE_TUNE, [b"12345", b"67890"])
    before = _contents(control)
    with pytest.raises(TooLargeError) as caught:
        small.create(control.acme.id, "big", FilePurpose.FINE_TUNE, [b"12345", b"67890", b"1"])
    assert caught.value.param == "file"
    assert _contents(control) == before


def test_an_upload_that_breaks_off_leaves_nothing(control: Control) -> None:
    def breaking() -> Iterator[bytes]:
        yield b"half"
        raise ClientDisconnect

    with pytest.raises(ClientDisconnect):
        control.files.create(control.acme.id, "t", FilePurpose.FINE_TUNE, breaking())
    assert _contents(control) == []
    assert control.files.list(control.acme.id).items == ()


def test_another_tenants_file_is_not_there(control: Control) -> None:
    file_id = control.upload(control.acme)
    for action in (control.files.get, control.files.open, control.files.delete):
        with pytest.raises(NotFoundError):
            action(control.zenith.id, file_id)
    assert control.files.list(control.zenith.id).items == ()
    with pytest.raises(InvalidRequestError):
        control.files.list(control.zenith.id, after=file_id)
    assert control.files.get(control.acme.id, file_id).id == file_id


def test_a_deleted_file_is_gone_with_its_content(control: Control) -> None:
    file_id = control.upload()
    control.files.delete(control.acme.id, file_id)
    with pytest.raises(NotFoundError):
        control.files.open(control.acme.id, file_id)
    assert _contents(control) == []


def test_a_file_cannot_be_deleted_under_an_unfinished_job(control: Control) -> None:
    training, validation = control.upload(), control.upload()
    job = control.create_job(training_file=training, validation_file=validation)
    for file_id in (training, validation):
        with pytest.raises(ConflictError, match=job.id) as caught:
            control.files.delete(control.acme.id, file_id)
        assert caught.value.code == "file_in_use"
    control.claim()
    with pytest.raises(ConflictError):
        control.files.delete(control.acme.id, training)
    control.jobs.cancel(control.acme.id, job.id)
    control.files.delete(control.acme.id, training)


def test_lists_are_newest_first_or_oldest_first_and_filtered_by_purpose(control: Control) -> None:
    made = [control.upload(), control.upload(purpose=FilePurpose.USER_DATA), control.upload()]
    page = control.files.list(control.acme.id)
    assert [file.id for file in page.items] == made[::-1] and not page.has_more
    assert [file.id for file in control.files.list(control.acme.id, newest_first=False).items] == made
    first = control.files.list(control.acme.id, purpose=FilePurpose.FINE_TUNE, limit=1)
    assert [file.id for file in first.items] == [made[2]] and first.has_more
    rest = control.files.list(control.acme.id, purpose=FilePurpose.FINE_TUNE, after=made[2])
    assert [file.id for file in rest.items] == [made[0]] and not rest.has_more


def test_an_expired_file_is_hidden_and_then_removed(control: Control) -> None:
    made = control.files.create(control.acme.id, "t", FilePurpose.FINE_TUNE, [b"x"], expires_after_seconds=3600)
    assert made.expires_at == pytest.approx(made.created_at + 3600, abs=1)
    keep = control.upload()
    assert control.files.remove_expired() == 0
    _expire(control, made.id)
    with pytest.raises(NotFoundError):
        control.files.get(control.acme.id, made.id)
    assert [file.id for file in control.files.list(control.acme.id).items] == [keep]
    assert control.files.remove_expired() == 1
    assert len(_contents(control)) == 1


def test_a_file_does_not_expire_under_an_unfinished_job(control: Control) -> None:
    file_id = control.upload()
    job = control.create_job(training_file=file_id)
    _expire(control, file_id)
    assert control.files.remove_expired() == 0
    control.files.open(control.acme.id, file_id).close()
    control.jobs.cancel(control.acme.id, job.id)
    assert control.files.remove_expired() == 1


def test_a_staged_file_is_durable_but_not_visible(control: Control) -> None:
    staged = control.files.stage(control.acme.id, "r.csv", FilePurpose.FINE_TUNE_RESULTS, [b"step\n"])
    assert len(_contents(control)) == 1
    with pytest.raises(NotFoundError):
        control.files.get(control.acme.id, staged.id)


def test_a_file_of_a_tenant_that_was_deleted_meanwhile_leaves_nothing(control: Control) -> None:
    def deleting() -> Iterator[bytes]:
        yield b"x"
        control.tenants.delete(control.acme.id)

    with pytest.raises(NotFoundError):
        control.files.create(control.acme.id, "t", FilePurpose.FINE_TUNE, deleting())
    assert _contents(control) == []


def test_content_may_lie_on_a_remote_file_system(database: Database) -> None:
    owner = Tenants(database).create("acme")[0]
    remote = Files(database, "memory://rootstock-files-test", max_bytes=10)
    made = remote.create(owner.id, "t", FilePurpose.FINE_TUNE, [b"abc"])
    with remote.open(owner.id, made.id) as stream:
        assert stream.read() == b"abc"
    with pytest.raises(TooLargeError):
        remote.create(owner.id, "t", FilePurpose.FINE_TUNE, [b"x" * 11])
    remote.delete(owner.id, made.id)
    with database.read() as connection:
        assert connection.execute(sa.select(files)).all() == []
    memory = fsspec.filesystem("memory")
    assert memory.find("/rootstock-files-test") == []
    memory.store.clear()


WRITER = """
import sys
from service.database import connect
from service.files import FilePurpose, Files
from service.tenants import Tenants
database = connect(sys.argv[1])
files, tenants = Files(database, sys.argv[2]), Tenants(database)
for number in range(1_000_000):
    tenant, key = tenants.create(f"t{number}")
    file = files.create(tenant.id, "f", FilePurpose.FINE_TUNE, [b"x" * 70_000, str(number).encode()])
    print(key, file.id, flush=True)
"""


@pytest.mark.slow
def test_after_kill_9_whatever_was_acknowledged_is_there_and_whole(database_url: str, tmp_path: Path) -> None:
    storage = str(tmp_path / "storage")
    command = [sys.executable, "-c", WRITER, database_url, storage]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY)
    with writer:
        assert writer.stdout is not None
        acknowledged = [writer.stdout.readline().split() for _ in range(5)]
        writer.send_signal(signal.SIGKILL)
        acknowledged += [line.split() for line in writer.stdout.read().splitlines()]
    again = connect(database_url)
    owners, kept = Tenants(again), Files(again, storage)
    for number, (key, file_id) in enumerate(acknowledged):
        tenant = owners.authenticate(key.decode())
        assert tenant is not None and tenant.name == f"t{number}"
        with kept.open(tenant.id, file_id.decode()) as stream:
            assert stream.read() == b"x" * 70_000 + str(number).encode()
    for tenant in owners.list():  # what was not acknowledged is there completely or not at all
        assert all(file.bytes >= 70_001 for file in kept.list(tenant.id).items)
    again.close()
