"""Every failure leaves in OpenAI's shape, with a request id and without a traceback."""

from __future__ import annotations

import httpx
import openai
import pytest
import structlog

from adapters.errors import AdapterFormatError, AdapterNotFoundError, DatasetError, NoFreeSlotError
from service import errors
from service.engine.errors import EngineDeadError, QueueFullError, RequestRejectedError
from service.errors import ServiceError, wire_error
from service.log import ID_PROCESSORS
from tests.service.http_fixtures import ADMIN_KEY, Served, serve_fake


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.InvalidRequestError("m", param="p", code="c"), 400),
        (errors.ConflictError("m"), 400),
        (errors.AuthenticationError("m"), 401),
        (errors.PermissionDeniedError("m"), 403),
        (errors.NotFoundError("m"), 404),
        (errors.TooLargeError("m"), 413),
        (errors.RateLimitError("m", retry_after=1), 429),
        (errors.UnavailableError("m"), 503),
        (RequestRejectedError("m"), 400),
        (QueueFullError("m", retry_after=1), 429),
        (EngineDeadError("m"), 503),
        (DatasetError("m", line=3), 400),
        (AdapterFormatError("m", check="rank"), 400),
        (AdapterNotFoundError("m"), 404),
        (NoFreeSlotError("m"), 503),
        (ServiceError("m"), 500),
    ],
)
def test_the_table_gives_each_error_its_status_and_tells_its_message(error: Exception, status: int) -> None:
    wire = wire_error(error)
    assert wire.status == status
    assert "m" in wire.body["error"]["message"]
    assert set(wire.body["error"]) == {"message", "type", "param", "code"}


def test_an_error_outside_the_table_gives_nothing_away() -> None:
    wire = wire_error(RuntimeError("the password is swordfish"))
    assert wire.status == 500 and "swordfish" not in str(wire.body)


def test_no_state_conflict_is_a_status_that_clients_retry() -> None:
    assert 409 not in {status for status, _ in errors.STATUS.values()}


def test_retry_after_stays_below_what_clients_obey() -> None:
    assert wire_error(errors.RateLimitError("m", retry_after=3600)).headers == {"retry-after": "120"}
    assert wire_error(errors.RateLimitError("m", retry_after=0.2)).headers == {"retry-after": "1"}


def test_malformed_json_is_a_400_that_says_where(shared_service: Served) -> None:
    answer = _post(shared_service, content=b'{"model": "tiny",', headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_json"


@pytest.mark.parametrize("content", [b"[]", b'"text"', b"null", b"", b"7"])
def test_a_body_that_is_no_object_is_a_400(shared_service: Served, content: bytes) -> None:
    answer = _post(shared_service, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_a_body_of_another_content_type_is_told_to_be_json(shared_service: Served) -> None:
    answer = _post(shared_service, content=b"model=tiny", headers={"content-type": "text/plain"})
    assert answer.status_code == 400
    assert "application/json" in answer.json()["error"]["message"]


def test_bytes_that_are_no_utf8_are_a_400(shared_service: Served) -> None:
    answer = _post(shared_service, content=b'{"model": "\xff"}', headers={"content-type": "application/json"})
    assert answer.status_code == 400 and "error" in answer.json()


def test_unknown_paths_and_methods_answer_in_the_same_shape(shared_service: Served) -> None:
    http = shared_service.http()
    missing, wrong = http.get("/v1/nothing"), http.put("/v1/chat/completions")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "unknown_url")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_supported")
    assert wrong.headers["allow"] == "POST"


def test_without_a_key_with_a_wrong_one_and_with_the_admins_key_nothing_is_served(shared_service: Served) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
    url = f"{shared_service.url}/v1/chat/completions"
    assert httpx.post(url, json=body).status_code == 401
    for scheme in ("Basic abc", "Bearer", "Bearer rs-nobody-nothing", "Bearer ö"):
        answer = httpx.post(url, json=body, headers=[(b"authorization", scheme.encode())])
        assert answer.status_code == 401, scheme
        assert answer.json()["error"]["code"] == "invalid_api_key"
    with pytest.raises(openai.PermissionDeniedError):
        shared_service.client(ADMIN_KEY).chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}]
        )


@pytest.mark.slow
def test_every_route_of_the_api_asks_for_a_key(shared_service: Served) -> None:
    assert len(shared_service.operations) > 15
    with httpx.Client(base_url=shared_service.url) as stranger:
        for method, path in shared_service.operations:
            assert stranger.request(method, path).status_code == 401, (method, path)
        for path in ("/openapi.json", "/docs", "/redoc"):
            assert stranger.get(path).status_code == 404


def test_a_405_lists_every_method_of_its_path(shared_service: Served) -> None:
    """Only those of the path's first route were listed."""
    http = shared_service.http()
    assert http.options("/v1/aliases/any").headers["allow"] == "DELETE, GET, PUT"
    assert http.put("/v1/files").headers["allow"] == "GET, POST"
    assert http.post("/v1/models/some/model").headers["allow"] == "DELETE, GET"


def test_a_sane_request_id_is_echoed_and_another_replaced(shared_service: Served) -> None:
    http = shared_service.http()
    assert http.get("/v1/models", headers={"x-request-id": "mine-7"}).headers["x-request-id"] == "mine-7"
    made = http.get("/v1/models", headers={"x-request-id": "two words"}).headers["x-request-id"]
    assert made.startswith("req_")
    assert http.get("/v1/nothing").headers["x-request-id"].startswith("req_")
    assert http.post("/v1/chat/completions", json={}).headers["x-request-id"].startswith("req_")


def test_an_unexpected_exception_is_a_500_that_names_the_request_but_not_the_cause(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*asked: object) -> None:
        raise RuntimeError("the password is swordfish")

    monkeypatch.setattr(served.control.registry, "route", explode)
    with structlog.testing.capture_logs(processors=ID_PROCESSORS) as logs:
        answer = _post(served, json={"model": "tiny", "messages": [{"role": "user", "content": "x"}]})
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error" and "swordfish" not in answer.text
    failures = [line for line in logs if line["event"] == "request_failed"]
    assert [line["request_id"] for line in failures] == [answer.headers["x-request-id"]]


def test_the_log_line_of_a_request_names_the_tenant_and_neither_key_nor_prompt(served: Served) -> None:
    with structlog.testing.capture_logs(processors=ID_PROCESSORS) as logs:
        _post(served, json={"model": "tiny", "messages": [{"role": "user", "content": "my secret prompt"}]})
        served.wait_until(lambda: any(line["event"] == "request" for line in logs))
    (line,) = (line for line in logs if line["event"] == "request")
    assert (line["status"], line["outcome"], line["tenant"]) == (200, "success", served.control.acme.id)
    assert "secret" not in str(logs) and served.control.acme_key not in str(logs)


def test_a_body_over_the_limit_is_a_413_whether_its_length_was_declared_or_not(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with serve_fake(tmp_path, max_body_bytes=2048) as served:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "x" * 4096}]}
        assert _post(served, json=body).status_code == 413
        chunks = iter([b'{"model": "tiny", "user": "', b"x" * 4096, b'"}'])
        answer = _post(served, content=chunks, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
        assert _post(served, json={**body, "messages": [{"role": "user", "content": "x"}]}).status_code == 200


def _post(served: Served, **request: object) -> httpx.Response:
    http = served.http()
    return http.post("/v1/chat/completions", **request)  # type: ignore[arg-type]
