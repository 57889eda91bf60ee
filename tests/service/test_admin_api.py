"""/v1/admin/tenants over a socket."""

from __future__ import annotations

import openai
import pytest

from tests.service.http_fixtures import Served

TENANTS = "/v1/admin/tenants"


def test_a_new_tenants_key_works_at_once_and_is_shown_once(served: Served) -> None:
    admin = served.admin()
    made = admin.post(TENANTS, json={"name": "beech"}).raise_for_status().json()
    assert made["name"] == "beech" and made["api_key"].startswith("rs-")
    assert [model.id for model in served.client(made["api_key"]).models.list()] == ["tiny"]
    listed = admin.get(TENANTS).json()
    assert [tenant["name"] for tenant in listed["data"]] == ["acme", "beech", "zenith"]
    assert made["api_key"] not in admin.get(TENANTS).text + admin.get(f"{TENANTS}/{made['id']}").text


def test_a_rotated_key_replaces_the_old_one(served: Served) -> None:
    answer = served.admin().post(f"{TENANTS}/{served.control.acme.id}/keys").raise_for_status().json()
    assert (answer["id"], answer["name"]) == (served.control.acme.id, "acme")
    assert served.client(answer["api_key"]).models.list().data
    with pytest.raises(openai.AuthenticationError):
        served.client().models.list()


def test_a_deleted_tenant_is_gone_with_files_models_and_key(served: Served) -> None:
    control = served.control
    control.publish(alias="best")
    served.client().models.list()
    tenant_id = control.acme.id
    assert served.admin().delete(f"{TENANTS}/{tenant_id}").json() == {
        "id": tenant_id, "object": "tenant", "deleted": True, "erased": True
    }  # fmt: skip
    with pytest.raises(openai.AuthenticationError):
        served.client().models.list()
    assert served.engine.retired == ["d" * 64]
    assert [path for path in control.storage.rglob("*") if path.is_file()] == []
    assert tenant_id not in served.scrape()
    assert served.admin().get(f"{TENANTS}/{tenant_id}").status_code == 404
    assert served.client(control.zenith_key).models.list().data


def test_only_the_admin_key_opens_the_admin_api(served: Served) -> None:
    target = f"{TENANTS}/{served.control.acme.id}"
    for http, status in ((served.http(), 403), (served.http("rs-wrong"), 401), (served.http("x"), 401)):
        for method, url in (("POST", TENANTS), ("GET", TENANTS), ("DELETE", target), ("POST", f"{target}/keys")):
            assert http.request(method, url, json={"name": "beech"}).status_code == status
    assert len(served.control.tenants.list()) == 2


def test_wrong_requests_name_the_field(served: Served) -> None:
    admin = served.admin()
    for body, param in (
        ({}, "name"),
        ({"name": "a b"}, "name"),
        ({"name": "acme"}, "name"),
        ({"name": "x", "a": 1}, "a"),
    ):
        response = admin.post(TENANTS, json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    for method, url in (("GET", "none"), ("DELETE", "none"), ("POST", "none/keys")):
        assert admin.request(method, f"{TENANTS}/{url}").status_code == 404
