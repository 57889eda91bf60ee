"""Keys with roles, an end and a successor; and the record of who changed what."""

from __future__ import annotations

import time

import pytest
import sqlalchemy as sa

from service.api.auth import INFERENCE_ROUTES
from service.keys import Role
from service.tables import api_keys, audit_log
from tests.service.control_fixtures import Control
from tests.service.http_fixtures import Served
from tests.service.test_chat import MESSAGES

ASK = {"model": "tiny", "messages": MESSAGES}


@pytest.mark.slow
def test_an_inference_key_answers_questions_and_opens_nothing_else(shared_service: Served) -> None:
    made = shared_service.http().post("/v1/keys", json={"role": "inference", "name": "app"}).raise_for_status().json()
    assert (made["role"], made["name"], made["expires_at"]) == ("inference", "app", None)
    http = shared_service.http(made["api_key"])
    assert http.post("/v1/chat/completions", json=ASK).status_code == 200
    assert http.post("/v1/embeddings", json={"model": "tiny", "input": "a"}).status_code == 200
    assert http.get("/v1/models").status_code == http.get("/v1/models/tiny").status_code == 200
    closed = [
        (method, path)
        for method, path in shared_service.operations
        if (method.upper(), path) not in {(verb, name.replace(":path", "")) for verb, name in INFERENCE_ROUTES}
    ]
    assert len(closed) > 40
    for method, path in closed:
        answer = http.request(method, path.replace("{", "").replace("}", ""))
        assert answer.status_code == 403, (method, path, answer.text)


@pytest.mark.parametrize("role", [Role.ADMIN, Role.INFERENCE])
def test_a_key_ends_at_its_time_and_at_its_revocation_at_once(control: Control, role: Role) -> None:
    tenants, acme = control.tenants, control.acme.id
    lasting, text = tenants.create_key(acme, role=role)
    ending, soon = tenants.create_key(acme, role=role, expires_in_seconds=60.0)
    access = tenants.access(soon)
    assert access is not None and (access.role, access.key_id) == (role, ending.id)
    with control.database.begin() as connection:
        connection.execute(api_keys.update().where(api_keys.c.id == ending.id).values(expires_at=time.time() - 1.0))
    assert tenants.access(soon) is None and tenants.access(text) is not None
    tenants.revoke_key(acme, lasting.id)
    assert tenants.access(text) is None
    assert {key.id for key in tenants.keys(acme)} == {ending.id, control.acme_key.split("-")[1]}


def test_both_keys_work_while_they_overlap(control: Control) -> None:
    tenants, acme = control.tenants, control.acme.id
    old, before = tenants.create_key(acme, role=Role.INFERENCE, name="app", expires_in_seconds=1000.0)
    new, after = tenants.replace_key(acme, old.id, overlap_seconds=60.0)
    assert (new.role, new.name) == (old.role, old.name)
    assert tenants.access(before) is not None and tenants.access(after) is not None
    ends = {key.id: key.expires_at for key in tenants.keys(acme)}
    assert (ends[old.id] or 0) < time.time() + 61 < (ends[new.id] or 0)
    tenants.replace_key(acme, old.id, overlap_seconds=900.0)  # an overlap never gives a key more time
    assert {key.id: key.expires_at for key in tenants.keys(acme)}[old.id] == ends[old.id]
    tenants.replace_key(acme, new.id)
    assert tenants.access(after) is None
    everything = tenants.rotate_key(acme, overlap_seconds=60.0)
    assert tenants.access(everything) and tenants.access(control.acme_key) and tenants.access(before)
    assert tenants.rotate_key(acme) and tenants.access(everything) is None and tenants.access(before) is None


def test_a_tenant_neither_sees_nor_ends_anothers_keys(served: Served) -> None:
    zeniths = served.control.zenith_key.split("-")[1]
    http = served.http()
    assert zeniths not in http.get("/v1/keys").text
    for method, path in (("DELETE", f"/v1/keys/{zeniths}"), ("POST", f"/v1/keys/{zeniths}/rotate")):
        assert http.request(method, path).status_code == 404
    assert served.http(served.control.zenith_key).get("/v1/models").status_code == 200


def test_wrong_keys_are_told_by_their_field(shared_service: Served) -> None:
    for body, param in (
        ({"role": "owner"}, "role"),
        ({"expires_in_seconds": 0}, "expires_in_seconds"),
        ({"name": "a\nb"}, "name"),
        ({"secret": "x"}, "secret"),
    ):
        response = shared_service.http().post("/v1/keys", json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.slow
def test_every_administrative_act_is_on_record_without_secrets(served: Served) -> None:
    admin, acme = served.admin(), served.control.acme.id
    base = f"/v1/admin/tenants/{acme}"
    mine = served.http().post("/v1/keys", json={}).json()
    served.http().post(f"/v1/keys/{mine['id']}/rotate", json={"overlap_seconds": 5}).raise_for_status()
    served.http().delete(f"/v1/keys/{mine['id']}").raise_for_status()
    further = admin.post(f"{base}/keys/additional", json={"role": "admin"}).raise_for_status().json()
    admin.delete(f"{base}/keys/{further['id']}").raise_for_status()
    admin.patch(base, json={"limits": {"max_jobs": 2}}).raise_for_status()
    rotated = admin.post(f"{base}/keys").raise_for_status().json()
    admin.delete(base).raise_for_status()
    query: dict[str, str] = {"tenant_id": acme, "limit": "3"}
    entries: list[dict[str, object]] = []
    while True:
        page = admin.get("/v1/admin/audit", params=query).raise_for_status().json()
        entries += page["data"]
        if not page["has_more"]:
            break
        query["after"] = page["last_id"]
    actor = f"key:{served.control.acme_key.split('-')[1]}"
    assert [(entry["action"], entry["actor"]) for entry in reversed(entries)] == [
        ("tenant.create", "administrator"),
        ("key.create", actor),
        ("key.rotate", actor),
        ("key.revoke", actor),
        ("key.create", "administrator"),
        ("key.revoke", "administrator"),
        ("tenant.limits", "administrator"),
        ("key.rotate_all", "administrator"),
        ("tenant.delete", "administrator"),
    ]
    with served.control.database.read() as connection:
        stored = str(connection.execute(sa.select(audit_log)).all())
    for key in (mine["api_key"], further["api_key"], rotated["api_key"]):
        assert key.split("-", 2)[2] not in stored
    assert served.http(served.control.zenith_key).get("/v1/admin/audit").status_code == 403
