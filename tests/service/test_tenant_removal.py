"""A deleted tenant leaves nothing behind, whatever happens meanwhile."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import sqlalchemy as sa

from adapters.errors import StoreError
from adapters.store import AdapterStore
from service.database import connect
from service.merges import Merges
from service.resume_points import ResumePoints
from service.tables import metadata, removals, tenants
from service.tenant_inventory import TABLES, Fate
from service.tenant_removal import TenantRemoval
from service.tenants import Tenants
from tests.filled_database import fill, rows
from tests.service.control_fixtures import Control

MARKER = "quincemarmalade"


@dataclass
class Memory:
    """What a process keeps."""

    forgotten: list[str] = field(default_factory=list)
    retired: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Household:
    """The archive of `control` with a removal on it."""

    control: Control
    store: AdapterStore
    merges: Merges
    directory: Path

    def removal(self, memory: Memory, grace_seconds: float = 300.0) -> TenantRemoval:
        """As one process has it."""
        return TenantRemoval(
            self.control.database,
            self.control.files,
            self.store,
            ResumePoints(str(self.directory)),
            self.merges,
            retire=memory.retired.append,
            forget=[memory.forgotten.append],
            grace_seconds=grace_seconds,
        )

    def adapter(self, text: str) -> str:
        folder = self.directory / f"made-{text}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"text": text}))
        (folder / "adapter_model.safetensors").write_bytes(text.encode())
        digest = self.store.publish(folder)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        return digest

    def left(self) -> list[str]:
        """Files in the storage and the data directory that hold the marker."""
        paths = [path for path in self.directory.rglob("*") if path.is_file() and path.suffix != ".db"]
        return [str(path.relative_to(self.directory)) for path in paths if MARKER.encode() in path.read_bytes()]


@pytest.fixture
def household(control: Control, tmp_path: Path) -> Iterator[Household]:
    store = AdapterStore(str(tmp_path / "adapters"), tmp_path / "cache")
    merges = Merges(control.database, tmp_path / "merged", max_bytes=1 << 30, ttl_seconds=3600.0)
    yield Household(control, store, merges, tmp_path)


def furnish(household: Household) -> str:
    """Everything that acme can have outside the database; the digest of its adapter."""
    control, acme = household.control, household.control.acme.id
    digest = household.adapter(MARKER)
    control.publish(digest=digest, suffix="fruit")
    job = control.create_job()
    with control.files.open(acme, control.upload()) as stream:
        assert stream.read()
    control.files.stage(acme, "staged.csv", control.files.list(acme).items[0].purpose, [MARKER.encode()])
    for path in (household.directory / "training" / job.id / "attempt-000001.pt",):
        path.parent.mkdir(parents=True)
        path.write_text(MARKER)
    version = control.registry.versions(acme)[0]
    merge = household.merges.create(acme, version, 10)
    household.merges.directory(merge).mkdir(parents=True)
    (household.merges.directory(merge) / "model.safetensors").write_text(MARKER)
    assert len(household.left()) >= 4
    return digest


def test_the_inventory_names_every_table_and_what_is_gone_goes_with_the_tenants_row() -> None:
    assert set(TABLES) == set(metadata.tables), "name the new table in service.tenant_inventory, and delete from it"
    follows = {"tenants"}
    for table in metadata.sorted_tables:
        for key in table.foreign_keys:
            if key.ondelete == "CASCADE" and key.column.table.name in follows:
                follows.add(table.name)
    assert {name for name, fate in TABLES.items() if fate is Fate.GONE} == follows
    for table in metadata.sorted_tables:  # whoever is the tenant's by a column of that name, and is not gone, is known
        if "tenant_id" in table.columns and table.name not in follows:
            assert TABLES[table.name] in (Fate.NUMBERS, Fate.RECORD, Fate.TO_DO), table.name


def test_no_table_holds_a_word_of_a_deleted_tenant_but_those_that_say_so(control: Control) -> None:
    with control.database.begin() as connection:
        fill(connection, "tenant-doomed", MARKER)
        fill(connection, "tenant-spared", "medlar")
        connection.execute(removals.delete())
        others = {table.name: len(rows(connection, table)) - 1 for table in metadata.sorted_tables}
    Tenants(control.database).delete("tenant-doomed")
    found, spared = {}, {}
    with control.database.read() as connection:
        for table in metadata.sorted_tables:
            texts = [str(row) for row in rows(connection, table)]
            found[table.name] = {word for word in (MARKER, "tenant-doomed") if any(word in text for text in texts)}
            spared[table.name] = len([text for text in texts if "tenant-doomed" not in text and MARKER not in text])
    gone = [name for name, fate in TABLES.items() if fate is Fate.GONE]
    assert {name: found[name] for name in gone if found[name]} == {}
    assert {name: spared[name] for name in gone} == {name: others[name] for name in gone}
    assert found["usage_hours"] == {"tenant-doomed"}  # numbers; no name of a key or a model
    assert found["removals"] >= {"tenant-doomed"}


def test_sqlites_files_hold_no_byte_of_it(tmp_path: Path) -> None:
    """Deleted rows stood in free pages and in the write-ahead log."""
    path = tmp_path / "rootstock.db"
    database = connect(f"sqlite:///{path}")
    with database.begin() as connection:
        fill(connection, "tenant-doomed", MARKER)
        connection.execute(sa.update(metadata.tables["captures"]).values(answer=MARKER * 5000))
        for name in ("audit_log", "usage_hours", "usage_entries", "removals"):  # what stays, by the inventory
            connection.execute(metadata.tables[name].delete())

    def bytes_on_disk() -> bytes:
        return b"".join(found.read_bytes() for found in tmp_path.iterdir())

    assert MARKER.encode() in bytes_on_disk()
    Tenants(database).delete("tenant-doomed")
    with database.begin() as connection:
        connection.execute(removals.delete())
    assert database.scrub()
    assert MARKER.encode() not in bytes_on_disk()
    database.close()


def test_a_reader_that_needs_the_log_is_told_of_and_the_next_sweep_empties_it(tmp_path: Path) -> None:
    database = connect(f"sqlite:///{tmp_path / 'rootstock.db'}")
    with database.read() as connection:
        assert connection.execute(sa.select(tenants)).all() == []
        with database.begin() as writer:
            writer.execute(tenants.insert().values(id="t", name="acme", created_at=0.0))
        assert not database.scrub()
    assert database.scrub() and (tmp_path / "rootstock.db-wal").stat().st_size == 0
    database.close()


def test_everything_outside_the_database_goes_too(household: Household) -> None:
    digest, memory = furnish(household), Memory()
    assert household.removal(memory).remove(household.control.acme.id)
    assert household.left() == []
    assert household.store.digests() == []
    assert memory.forgotten == [household.control.acme.id] and memory.retired == [digest]


def test_what_a_crash_left_and_what_came_in_late_is_removed_by_the_sweep(household: Household) -> None:
    furnish(household)
    acme, memory = household.control.acme.id, Memory()
    household.control.tenants.delete(acme)  # and there the process dies
    assert household.left()
    removal = household.removal(memory)
    removal.sweep()
    assert household.left() == [] and memory.forgotten == [acme]
    late = household.directory / "storage" / acme / "file-late"
    late.parent.mkdir(parents=True)
    late.write_text(MARKER)
    removal.sweep()
    assert household.left() == []
    assert memory.retired and len(memory.retired) == 1  # once: another may have the same adapter by then


def test_every_process_hears_of_it_and_then_it_is_forgotten_that_there_was_one(household: Household) -> None:
    furnish(household)
    acme, here, there = household.control.acme.id, Memory(), Memory()
    one, other = household.removal(here), household.removal(there, grace_seconds=-1.0)
    assert one.remove(acme)
    other.sweep()
    assert there.forgotten == [acme] and len(there.retired) == 1
    with household.control.database.read() as connection:
        assert rows(connection, removals) == []
    other.sweep()
    assert there.forgotten == [acme]


def test_an_adapter_that_another_tenant_has_by_now_stays(household: Household) -> None:
    digest = furnish(household)
    control, memory = household.control, Memory()
    control.tenants.delete(control.acme.id)
    control.publish(control.zenith, digest=digest)
    household.removal(memory).sweep()
    assert household.store.digests() == [digest] and memory.retired == []


def test_a_storage_that_is_away_delays_it_and_the_answer_says_so(
    household: Household, monkeypatch: pytest.MonkeyPatch
) -> None:
    furnish(household)
    removal = household.removal(Memory(), grace_seconds=-1.0)

    def away(digest: str) -> None:
        raise StoreError("the storage is away")

    monkeypatch.setattr(household.store, "delete", away)
    assert not removal.remove(household.control.acme.id)
    removal.sweep()
    assert household.left()
    monkeypatch.undo()
    removal.sweep()
    assert household.left() == []
