"""Tenants and keys, on SQLite and Postgres."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa

from service.database import connect
from service.errors import InvalidRequestError, NotFoundError
from service.tables import adapter_versions, aliases, api_keys, files, job_events, jobs
from service.tenants import Tenants
from tests.service.control_fixtures import Control


def test_a_tenant_authenticates_with_its_key_only(control: Control) -> None:
    assert control.tenants.authenticate(control.acme_key) == control.acme
    assert control.tenants.authenticate(control.zenith_key) == control.zenith
    key_id, secret = control.acme_key.removeprefix("rs-").split("-", 1)
    other_id = control.zenith_key.split("-", 2)[1]
    wrong = [
        "", "rs-", "rs--", "sk-abc", f"rs-{key_id}-", f"rs-{key_id}-{secret}x", f"rs-{other_id}-{secret}",
        f"rs-{key_id}", control.acme_key[:-1], control.acme_key.upper(), "rs-é-x", f"rs-{key_id}-é",
    ]  # fmt: skip
    assert [control.tenants.authenticate(key) for key in wrong] == [None] * len(wrong)


def test_keys_are_random_long_and_stored_only_as_hashes(control: Control, tmp_path: Path) -> None:
    secret = control.acme_key.split("-", 2)[2]
    assert control.acme_key.startswith("rs-") and len(secret) == 43  # 256 bits in base64
    with control.database.read() as connection:
        rows = connection.execute(sa.select(api_keys)).all()
    assert rows and all(secret not in str(row) for row in rows)


def test_rotating_gives_a_new_key_and_ends_the_old_one(control: Control) -> None:
    fresh = control.tenants.rotate_key(control.acme.id)
    assert control.tenants.authenticate(fresh) == control.acme
    assert control.tenants.authenticate(control.acme_key) is None
    assert control.tenants.authenticate(control.zenith_key) == control.zenith


def test_a_name_is_unique_and_plain(control: Control) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        control.tenants.create("acme")
    assert caught.value.code == "tenant_exists"
    for name in ("", "a,b", "a:b", "a b", "-a", "a" * 65, "a/b", "a\n"):
        with pytest.raises(InvalidRequestError) as caught:
            control.tenants.create(name)
        assert caught.value.param == "name"


def test_tenants_are_listed_by_name(control: Control) -> None:
    control.tenants.create("Beech")
    assert {tenant.name for tenant in control.tenants.list()} == {"Beech", "acme", "zenith"}
    assert control.tenants.get(control.acme.id) == control.acme


def test_an_unknown_tenant_is_not_found(control: Control) -> None:
    for action in (control.tenants.get, control.tenants.delete, control.tenants.rotate_key):
        with pytest.raises(NotFoundError):
            action("tenant-none")


def test_a_deleted_tenant_takes_everything_of_its_own_along_and_nothing_else(control: Control) -> None:
    control.publish(suffix="a", alias="best", metadata={"k": "v"}, digest="a" * 64)
    control.publish(suffix="shared", digest="c" * 64)
    control.publish(control.zenith, suffix="shared", alias="best", digest="c" * 64)
    removed = control.tenants.delete(control.acme.id)
    assert removed.tenant == control.acme
    assert removed.left.digests == ("a" * 64,)  # zenith still uses the shared one
    assert len(removed.left.jobs) == 2
    control.files.discard_all(control.acme.id)
    assert control.tenants.authenticate(control.acme_key) is None
    with control.database.read() as connection:
        for table in (files, jobs, adapter_versions, aliases, api_keys):
            assert set(connection.execute(sa.select(table.c.tenant_id)).scalars()) == {control.zenith.id}
        owners = sa.select(jobs.c.tenant_id).join(job_events, job_events.c.job_id == jobs.c.id)
        assert set(connection.execute(owners).scalars()) == {control.zenith.id}
    assert len([path for path in control.storage.rglob("*") if path.is_file()]) == 1


def test_a_key_survives_a_restart(control: Control) -> None:
    again = connect(control.url)
    assert Tenants(again).authenticate(control.acme_key) == control.acme
    again.close()
