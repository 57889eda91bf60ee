"""Disks that are full or fail, under uploads, training states, adapters and the database."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import adapters.store
from adapters.durable import fsync_path
from adapters.errors import StoreError
from adapters.store import AdapterStore
from service.database import AWAY
from service.errors import UnavailableError
from service.files import FilePurpose
from service.job import JobStatus
from service.resume_points import ResumePoints
from service.tuning import Outcome, TuningRun
from tests.service.control_fixtures import make_control
from tests.service.tuning_fixtures import QUICK, Workshop

MIB = 1024 * 1024
FULL, BROKEN = errno.ENOSPC, errno.EIO


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB, which can really be full."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield path
    subprocess.run(["umount", path], check=True)


def _fill(path: Path) -> Path:
    filler = path / "filler"
    with filler.open("wb", buffering=0) as stream:
        for size in (64 * 1024, 4096):
            try:
                while True:
                    stream.write(b"\0" * size)
            except OSError as error:
                assert error.errno == FULL
    return filler


class Faulty:
    """Passes calls on, except so many in a row from the `first` on."""

    def __init__(self, call: Callable[..., object], number: int, *, first: int = 1, times: int = 1) -> None:
        self._call, self._number = call, number
        self._faulty = range(first, first + times)
        self.num_calls = 0

    def __call__(self, *arguments: object) -> object:
        self.num_calls += 1
        if self.num_calls in self._faulty:
            raise OSError(self._number, os.strerror(self._number))
        return self._call(*arguments)


def _run(workshop: Workshop, **changes: object) -> Outcome:
    services = replace(workshop.services, **changes)  # type: ignore[arg-type]
    claim = services.queue.claim("worker")
    assert claim is not None
    return TuningRun(services, claim, lambda: None).execute()


def _files_under(path: Path) -> list[Path]:
    return [found for found in path.rglob("*") if found.is_file()]


def test_an_upload_to_a_full_disk_is_refused_leaves_nothing_and_succeeds_later(
    small_disk: Path, tmp_path: Path
) -> None:
    from service.database import connect

    url = f"sqlite:///{tmp_path / 'rootstock.db'}"
    database = connect(url)
    control = make_control(database, url, small_disk / "files")
    kept = control.upload()
    with pytest.raises(UnavailableError, match="No space left") as caught:
        control.files.create(control.acme.id, "big.jsonl", FilePurpose.FINE_TUNE, [b"x" * MIB] * 3)
    assert caught.value.code == "storage_unavailable" and caught.value.retry_after == 30
    assert [path.name for path in _files_under(small_disk)] == [kept]
    assert [file.id for file in control.files.list(control.acme.id).items] == [kept]
    control.upload()
    database.close()


def test_a_database_on_a_full_disk_refuses_writes_tears_nothing_and_goes_on(small_disk: Path, tmp_path: Path) -> None:
    from service.database import connect

    url = f"sqlite:///{small_disk / 'rootstock.db'}"
    database = connect(url)
    control = make_control(database, url, tmp_path / "files")
    job = control.create_job()
    filler = _fill(small_disk)
    refused = 0
    for _ in range(200):
        try:
            control.tenants.create_key(control.acme.id)
        except AWAY:
            refused += 1
            break
    assert refused
    assert control.jobs.get(control.acme.id, job.id).state is JobStatus.QUEUED  # it can still be read
    filler.unlink()
    control.finish(control.claim())
    with database.read() as connection:
        assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
    database.close()


@pytest.mark.parametrize("number", [FULL, BROKEN])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_an_fsync_that_fails_loses_no_acknowledged_file_and_leaves_none_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: int
) -> None:
    """Broke: when the folder could not be made durable, the content stayed without a row."""
    from service.database import connect

    url = f"sqlite:///{tmp_path / 'rootstock.db'}"
    database = connect(url)
    control = make_control(database, url, tmp_path / "files")
    faulty = Faulty(os.fsync, number, first=call)
    monkeypatch.setattr(os, "fsync", faulty)
    with pytest.raises(UnavailableError):
        control.upload()
    monkeypatch.undo()
    assert faulty.num_calls == call and _files_under(tmp_path / "files") == []
    control.upload()
    database.close()


@pytest.mark.parametrize("call", [1, 2, 3, 4, 5])
def test_an_adapter_is_published_only_when_all_of_it_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Broke: an adapter whose folder was not durable yet counted as published when it was published again."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (source / name).write_bytes(name.encode())
    store = AdapterStore(str(tmp_path / "store"), tmp_path / "cache")
    (tmp_path / "store" / "sha256").mkdir(parents=True)
    synced: list[Path] = []

    def sync(path: Path) -> None:
        synced.append(path)
        fsync_path(path)

    faulty = Faulty(sync, BROKEN, first=call)
    monkeypatch.setattr(adapters.store, "fsync_path", faulty)
    with pytest.raises(StoreError):
        store.publish(source)
    synced.clear()
    digest = store.publish(source)
    assert tmp_path / "store" / "sha256" in synced
    assert store.read(digest) and store.digests() == [digest]
    assert [path.name for path in (tmp_path / "store" / "sha256").iterdir()] == [digest]


@pytest.mark.slow
def test_a_training_state_that_cannot_be_stored_costs_no_job(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broke: the job failed with an internal error."""
    job = workshop.submit(hyperparameters=replace(QUICK, n_epochs=1))
    points = ResumePoints(str(workshop.control.storage))
    faulty = Faulty(points.save, FULL, times=3)

    def save(*arguments: object) -> object:
        try:
            return faulty(*arguments)
        except OSError as error:
            raise StoreError(str(error)) from error

    monkeypatch.setattr(points, "save", save)
    assert _run(workshop, resume_points=points, save_every_seconds=0.0) is Outcome.SUCCEEDED
    assert faulty.num_calls > 3
    assert workshop.job(job).state is JobStatus.SUCCEEDED


def test_a_state_that_does_not_fit_leaves_the_last_one_as_it_was(small_disk: Path) -> None:
    import torch

    points = ResumePoints(str(small_disk))
    reference = points.save("job", 1, {"weights": torch.ones(1000)})
    with pytest.raises(StoreError, match="No space left"):
        points.save("job", 1, {"weights": torch.ones(MIB)})
    assert torch.equal(points.load(reference)["weights"], torch.ones(1000))
    assert len(_files_under(small_disk)) == 1


@pytest.mark.slow
def test_a_job_waits_for_a_store_that_takes_no_adapter_and_publishes_the_same_bytes(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broke: a disk that was full at the last moment cost the whole training."""
    hyperparameters = replace(QUICK, n_epochs=1)
    twin = workshop.submit(hyperparameters=hyperparameters)
    assert _run(workshop) is Outcome.SUCCEEDED
    job = workshop.control.create_job(workshop.control.acme, **twin.spec.__dict__)
    workshop.store.delete(workshop.digest(twin))
    monkeypatch.setattr(adapters.store, "fsync_path", Faulty(fsync_path, FULL, first=2, times=2))
    monkeypatch.setattr("service.tuning.RETRY_SECONDS", 0.01)
    assert _run(workshop) is Outcome.SUCCEEDED
    assert workshop.digest(job) == workshop.digest(twin)
    said = [message for message in workshop.messages(job) if "cannot be stored" in message]
    assert said == ["The adapter cannot be stored at the moment; it is tried again"]
    assert workshop.weights(workshop.digest(job)) is not None


@pytest.mark.slow
def test_a_store_that_stays_full_fails_the_job_and_says_so(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    job = workshop.submit(hyperparameters=replace(QUICK, n_epochs=1))
    monkeypatch.setattr(adapters.store, "fsync_path", Faulty(fsync_path, FULL, times=10_000))
    monkeypatch.setattr("service.tuning.RETRY_SECONDS", 0.01)
    assert _run(workshop, storage_patience_seconds=0.05) is Outcome.FAILED
    error = workshop.job(job).error
    assert error is not None and "The adapter could not be stored" in error.message
    assert "No space left" in error.message
    assert workshop.control.registry.versions(workshop.control.acme.id) == []
    assert workshop.store.digests() == []
