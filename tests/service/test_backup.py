"""A backup of a service at work starts as a service again, with the same bits; a torn one is refused."""

from __future__ import annotations

import json
import shutil
import threading
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adapters.errors import StoreError
from adapters.store import AdapterStore
from service.backup import DATABASE, MANIFEST, BackupError, BackupReport, restore_backup, take_backup
from service.cli import app
from service.database import connect
from service.files import Files
from service.references import references
from service.resume_points import ResumePoints
from tests.service.control_fixtures import Control, make_control


@dataclass(frozen=True)
class Place:
    """A data directory as a service lays it out, and the control plane over it."""

    data: Path
    control: Control
    store: AdapterStore
    points: ResumePoints
    url: str

    def publish(self, weights: str, **spec: Any) -> str:
        made = self.data.parent / f"made-{weights}"
        made.mkdir()
        (made / "adapter_config.json").write_text("{}")
        (made / "adapter_model.safetensors").write_text(weights)
        digest = self.store.publish(made)
        self.control.publish(digest=digest, suffix=weights, **spec)
        return digest

    def back_up(self, destination: Path) -> BackupReport:
        storage = str(self.data / "storage")
        return take_backup(self.control.database, self.url, storage, str(destination), self.store)


@pytest.fixture
def place(tmp_path: Path):  # type: ignore[no-untyped-def]
    data = tmp_path / "data"
    url = f"sqlite:///{data / 'rootstock.db'}"
    with closing(connect(url)) as database:
        control = make_control(database, url, data / "storage" / "files")
        store = AdapterStore(str(data / "storage" / "adapters"), data / "cache" / "adapters")
        yield Place(data, control, store, ResumePoints(str(data / "storage")), url)


def _restore(source: Path, data: Path) -> BackupReport:
    return restore_backup(str(source), data, f"sqlite:///{data / 'rootstock.db'}", str(data / "storage"))


def _check_whole(data: Path) -> int:
    """Every row's artifacts are there and verified; how many adapters that were."""
    with closing(connect(f"sqlite:///{data / 'rootstock.db'}")) as database:
        store = AdapterStore(str(data / "storage" / "adapters"), data / "cache")
        points = ResumePoints(str(data / "storage"))
        with database.read() as connection:
            found = references(connection)
        for digest in found.digests:
            store.read(digest)
        for reference in found.resume_points:
            points.load(reference)
        for key in found.storage_keys:
            assert (data / "storage" / "files" / key).is_file()
        return len(found.digests)


def test_what_is_restored_is_what_was_there(place: Place, tmp_path: Path) -> None:
    first, second = place.publish("first", alias="best"), place.publish("second", alias="best")
    file_id = place.control.upload()
    job = place.control.create_job(parent_digest=first, model="ft:x")
    claim = place.control.claim()
    place.control.queue.save_resume_point(claim, place.points.save(job.id, 1, {"step": 3}), 5)
    report = place.back_up(tmp_path / "backup")
    assert (
        report.has_database
        and report.num_files == len(json.loads((tmp_path / "backup" / MANIFEST).read_text())["backup"]["files"]) + 0
    )
    restored = _restore(tmp_path / "backup", tmp_path / "again")
    assert (restored.num_files, restored.num_bytes, restored.missing) == (report.num_files, report.num_bytes, ())
    assert _check_whole(tmp_path / "again") == 2
    url = f"sqlite:///{tmp_path / 'again' / 'rootstock.db'}"
    with closing(connect(url)) as database:
        store = AdapterStore(str(tmp_path / "again" / "storage" / "adapters"), tmp_path / "cache")
        assert store.read(second) == place.store.read(second)
        files, tenant = Files(database, str(tmp_path / "again" / "storage" / "files")), place.control.acme.id
        assert files.open(tenant, file_id).read() == place.control.files.open(tenant, file_id).read()
    assert ResumePoints(str(tmp_path / "again" / "storage")).load(f"{job.id}/attempt-000001.pt") == {"step": 3}


def test_a_backup_beside_publishers_and_deleters_never_has_a_row_without_its_artifact(
    place: Place, tmp_path: Path
) -> None:
    stop, tenant = threading.Event(), place.control.acme.id

    def work() -> None:
        number = 0
        while not stop.is_set():
            place.publish(f"w{number}")
            if number >= 2:
                oldest = place.control.registry.versions(tenant)[-2]  # the last is the kept one
                digest = place.control.registry.delete_model(tenant, oldest.id)
                if digest is not None:
                    place.control.registry.discard(place.store, digest)
            number += 1
            stop.wait(0.01)

    place.publish("kept", alias="best")
    place.control.registry.aliases.set(tenant, "best", place.control.registry.versions(tenant)[0].id)
    worker = threading.Thread(target=work)
    worker.start()
    try:
        for number in range(4):
            try:
                place.back_up(tmp_path / f"backup-{number}")
            except BackupError as error:
                assert "quieter" in error.message
                continue
            _restore(tmp_path / f"backup-{number}", tmp_path / f"again-{number}")
            assert _check_whole(tmp_path / f"again-{number}") >= 1
    finally:
        stop.set()
        worker.join()
    assert (tmp_path / "again-0").exists() or (tmp_path / "again-1").exists()


def test_torn_and_changed_backups_and_places_that_are_not_empty_are_refused(place: Place, tmp_path: Path) -> None:
    digest = place.publish("first")
    place.back_up(tmp_path / "backup")
    with pytest.raises(BackupError, match="not empty"):
        place.back_up(tmp_path / "backup")
    with pytest.raises(BackupError, match="not empty"):
        _restore(tmp_path / "backup", place.data)

    def torn(name: str, change: str) -> Path:
        copy = tmp_path / f"torn-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(tmp_path / "backup", copy)
        if change == "missing":
            (copy / name).unlink()
        else:
            content = bytearray((copy / name).read_bytes())
            content[len(content) // 2] ^= 1
            (copy / name).write_bytes(bytes(content))
        return copy

    weights = f"storage/adapters/sha256/{digest}/adapter_model.safetensors"
    for name in (MANIFEST, DATABASE, weights):
        for change in ("missing", "flipped"):
            source = torn(name, change)
            data = tmp_path / f"data-of-{source.name}"
            with pytest.raises((BackupError, StoreError)):
                _restore(source, data)
            assert not (data / "rootstock.db").exists(), "nothing that a service would start on"


def test_a_damaged_adapter_is_not_backed_up_as_if_it_were_whole(place: Place, tmp_path: Path) -> None:
    digest = place.publish("first")
    path = place.data / "storage" / "adapters" / "sha256" / digest / "adapter_model.safetensors"
    path.write_text("fIrst")
    with pytest.raises(BackupError, match="is damaged"):
        place.back_up(tmp_path / "backup")
    assert not (tmp_path / "backup" / MANIFEST).exists()


def test_the_commands_say_what_they_did(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    place.publish("first")
    runner = CliRunner()

    def run(*arguments: object) -> tuple[int, str]:
        result = runner.invoke(app, [str(argument) for argument in arguments])
        return result.exit_code, result.output

    code, told = run("backup", tmp_path / "backup", "--data-dir", place.data)
    assert (code, "files" in told) == (0, True), told
    assert run("restore", tmp_path / "backup", "--data-dir", tmp_path / "again")[0] == 0
    assert run("restore", tmp_path / "backup", "--data-dir", tmp_path / "again")[0] == 1
    assert run("gc", "--dry-run", "--data-dir", tmp_path / "again") == (0, "0 would be removed\n")
    assert run("gc", "--data-dir", tmp_path / "nowhere")[0] == 2
