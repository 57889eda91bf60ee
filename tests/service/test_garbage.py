"""The sweep takes what nobody needs and nothing else, also beside publishers, readers and rollbacks."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from adapters.errors import AdapterDamagedError, AdapterNotFoundError
from service.files import FilePurpose
from service.tables import jobs
from tests.service.control_fixtures import Control
from tests.service.stored_adapters import Shelf


@pytest.fixture
def shelf(control: Control, tmp_path: Path) -> Shelf:
    return Shelf(control, tmp_path)


def test_what_rows_need_stays_and_the_rest_goes_once_it_is_old(shelf: Shelf) -> None:
    control, tenant = shelf.control, shelf.control.acme.id
    old_model, rollback_target = shelf.version("first", alias="best")
    _, active = shelf.version("second", alias="best")
    parent = shelf.upload("parent")  # of an unfinished job; its version was deleted
    job = control.create_job(parent_digest=parent, model="ft:x")
    shelf.points.save(job.id, 1, {"step": 1})
    shelf.points.save("ftjob-gone", 1, {"step": 1})
    orphan = shelf.upload("orphan")
    kept_file = control.upload()
    staged = control.files.stage(tenant, "lost.jsonl", FilePurpose.FINE_TUNE, [b"x"])
    (shelf.root / "sha256" / ".dead.tmp").mkdir()
    garbage = shelf.garbage()
    assert garbage.sweep() == [], "younger than the grace: somebody may be about to publish it"
    shelf.age()
    expected = {
        ("adapter", orphan),
        ("file", staged.storage_key),
        ("training_state", "ftjob-gone"),
        ("temporary", ".dead.tmp"),
    }
    assert {(one.kind, one.name) for one in garbage.sweep(dry_run=True)} == expected
    assert shelf.store.exists(orphan), "a dry run removes nothing"
    assert {(one.kind, one.name) for one in garbage.sweep()} == expected
    assert sorted(shelf.store.digests()) == sorted([rollback_target, active, parent])
    assert shelf.points.load(f"{job.id}/attempt-000001.pt") == {"step": 1}
    assert control.files.open(tenant, kept_file).read()
    assert garbage.sweep() == []
    assert control.registry.aliases.roll_back(tenant, "best").model == old_model
    assert shelf.store.read(rollback_target)


def test_what_requests_in_flight_use_stays_and_old_quarantine_goes_later(shelf: Shelf) -> None:
    digest, bad = shelf.upload("used"), shelf.upload("bad")
    shelf.damage(bad)
    with pytest.raises(AdapterDamagedError):
        shelf.store.read(bad)
    shelf.age()
    assert shelf.garbage(in_use=lambda: {digest}).sweep() == []
    assert shelf.store.exists(digest)
    later = max(leftover.modified_at for leftover in shelf.store.leftovers()) + 40 * 86400
    assert {one.kind for one in shelf.garbage(clock=lambda: later).sweep()} == {"adapter", "quarantined"}


def test_an_adapter_that_is_published_again_between_the_look_and_the_sweep_stays(shelf: Shelf) -> None:
    """Its bytes were old and nobody's, and a publisher found them there just before they were swept."""
    digest = shelf.upload("again")
    shelf.age()
    garbage = shelf.garbage()
    real = garbage._remove_adapter

    def beside(swept: str) -> bool:
        assert shelf.upload("again") == swept
        return real(swept)

    garbage._remove_adapter = beside  # type: ignore[assignment, method-assign]
    assert garbage.sweep() == [] and shelf.store.read(digest)


def test_rows_that_come_while_an_adapter_is_swept_find_out(shelf: Shelf) -> None:
    """A publisher beside a sweeper: once a row is committed, its bytes are there after the publisher's own look."""
    lost: list[str] = []
    stop = threading.Event()

    def sweep() -> None:
        garbage = shelf.garbage(clock=lambda: 4e9)  # every adapter is old
        while not stop.is_set():
            for digest in shelf.store.digests():
                garbage._remove_adapter(digest)
            time.sleep(0.001)

    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    try:
        for number in range(12):
            _, digest = shelf.version(f"w{number}")
            if not shelf.store.touch(digest):  # what `service.tuning` does
                shelf.upload(f"w{number}")
            if not shelf.store.exists(digest):
                lost.append(digest)
            time.sleep(0.002)
    finally:
        stop.set()
        sweeper.join()
    shelf.garbage(clock=lambda: 4e9).sweep()  # a row names each
    assert not lost and len(shelf.store.digests()) == 12


def test_a_deleted_models_bytes_stay_when_another_row_has_come_to_need_them(shelf: Shelf) -> None:
    control = shelf.control
    mine, digest = shelf.version("same")
    assert control.registry.delete_model(control.acme.id, mine) == digest
    control.publish(control.zenith, digest=digest)
    assert not control.registry.discard(shelf.store, digest) and shelf.store.exists(digest)
    with control.database.begin() as connection:
        connection.execute(jobs.delete())
    alone = shelf.upload("alone")
    assert control.registry.discard(shelf.store, alone) and not shelf.store.exists(alone)


def test_a_sweep_beside_a_reader_never_hands_out_half_an_adapter(shelf: Shelf) -> None:
    errors: list[Exception] = []
    for number in range(8):
        digest = shelf.upload(f"r{number}")

        def read(digest: str = digest, number: int = number) -> None:
            try:
                assert shelf.store.read(digest)["adapter_model.safetensors"].startswith(f"r{number}".encode())
            except AdapterNotFoundError:
                return
            except Exception as error:
                errors.append(error)

        readers = [threading.Thread(target=read) for _ in range(4)]
        for reader in readers:
            reader.start()
        shelf.garbage(clock=lambda: 4e9).sweep()
        for reader in readers:
            reader.join()
    assert errors == [] and shelf.store.leftovers() == []
