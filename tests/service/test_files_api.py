"""/v1/files through the official client, over a socket."""

from __future__ import annotations

import io
from pathlib import Path

import httpx
import openai
import pytest

from service.files import FilePurpose
from tests.service.http_fixtures import Served, serve_fake

LINES = '{"messages": [{"role": "user", "content": "Grüße"}]}\n'.encode()


def _upload(served: Served, content: bytes = LINES) -> str:
    file = served.client().files.create(file=("train.jsonl", content), purpose="fine-tune")
    return file.id


def _error(response: httpx.Response) -> tuple[int, str | None, str | None]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and response.headers["x-request-id"]
    return response.status_code, error["param"], error["code"]


def test_the_official_client_uploads_reads_lists_and_deletes_a_file(served: Served) -> None:
    client = served.client()
    made = client.files.create(file=("train.jsonl", io.BytesIO(LINES)), purpose="fine-tune")
    assert (made.object, made.bytes, made.filename, made.purpose) == ("file", len(LINES), "train.jsonl", "fine-tune")
    assert made.status == "processed" and made.expires_at is None
    assert client.files.retrieve(made.id) == made
    assert client.files.content(made.id).content == LINES
    assert [file.id for file in client.files.list()] == [made.id]
    assert client.files.wait_for_processing(made.id).id == made.id
    deleted = client.files.delete(made.id)
    assert deleted.deleted and deleted.id == made.id
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)


def test_a_local_path_uploads_under_its_name(served: Served, tmp_path: Path) -> None:
    path = tmp_path / "Übung.jsonl"
    path.write_bytes(LINES)
    assert served.client().files.create(file=path, purpose="user_data").filename == "Übung.jsonl"


def test_the_client_pages_through_a_long_list(served: Served) -> None:
    made = [_upload(served) for _ in range(5)]
    client = served.client()
    assert [file.id for file in client.files.list(limit=2)] == made[::-1]
    assert [file.id for file in client.files.list(limit=2, order="asc")] == made
    page = served.http().get("/v1/files", params={"limit": 2}).json()
    assert (page["object"], page["has_more"]) == ("list", True)
    assert (page["first_id"], page["last_id"]) == (made[4], made[3])
    assert list(client.files.list(purpose="user_data")) == []


def test_a_file_expires_when_the_client_asks_for_it(served: Served) -> None:
    file = served.client().files.create(
        file=("a", LINES), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert file.expires_at is not None and abs(file.expires_at - file.created_at - 3600) <= 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "purpose"),
        ({"purpose": "assistants"}, "purpose"),
        ({"purpose": "fine-tune-results"}, "purpose"),
        ({"purpose": "fine-tune", "colour": "green"}, "colour"),
        ({"purpose": "fine-tune", "expires_after[seconds]": "3600"}, "expires_after[anchor]"),
        (
            {"purpose": "fine-tune", "expires_after[anchor]": "last_used_at", "expires_after[seconds]": "3600"},
            "expires_after[anchor]",
        ),
        ({"purpose": "fine-tune", "expires_after[anchor]": "created_at"}, "expires_after[seconds]"),
        (
            {"purpose": "fine-tune", "expires_after[anchor]": "created_at", "expires_after[seconds]": "60"},
            "expires_after[seconds]",
        ),
        (
            {"purpose": "fine-tune", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3e3"},
            "expires_after[seconds]",
        ),
    ],
)
def test_a_wrong_field_is_a_400_that_names_it(shared_service: Served, fields: dict[str, str], param: str) -> None:
    response = shared_service.http().post("/v1/files", data=fields, files={"file": ("a", LINES)})
    status, named, _ = _error(response)
    assert (status, named) == (400, param)


def test_a_missing_file_is_a_400_that_names_it(shared_service: Served) -> None:
    http = shared_service.http()
    assert _error(http.post("/v1/files", data={"purpose": "fine-tune"}))[:2] == (400, "file")
    assert _error(http.post("/v1/files", json={"purpose": "fine-tune"}))[:2] == (400, "file")
    as_text = {"file": (None, "text"), "purpose": (None, "fine-tune")}
    assert _error(http.post("/v1/files", files=as_text))[:2] == (400, "file")
    two = [("file", ("a", LINES)), ("file", ("b", LINES))]
    assert http.post("/v1/files", files=two, data={"purpose": "fine-tune"}).status_code == 400
    broken = http.post("/v1/files", content=b"nonsense", headers={"content-type": "multipart/form-data; boundary=x"})
    assert broken.status_code == 400


def test_a_file_over_the_limit_is_a_413_and_is_not_kept(tmp_path: Path) -> None:
    with serve_fake(tmp_path, max_file_bytes=4096) as served:
        small = served.client().files.create(file=("a", b"x" * 4096), purpose="fine-tune")
        with pytest.raises(openai.APIStatusError) as caught:
            served.client().files.create(file=("a", b"x" * 200_000), purpose="fine-tune")
        assert caught.value.status_code == 413
        assert [file.id for file in served.client().files.list()] == [small.id]


def test_another_tenants_file_is_a_404(served: Served) -> None:
    file_id = _upload(served)
    other = served.client(served.control.zenith_key)
    for action in (other.files.retrieve, other.files.delete, other.files.content):
        with pytest.raises(openai.NotFoundError) as caught:
            action(file_id)
        assert caught.value.code == "file_not_found"
    assert list(other.files.list()) == []
    assert served.client().files.content(file_id).content == LINES


def test_a_file_in_use_is_a_400_that_names_the_job(served: Served) -> None:
    job = served.control.create_job()
    with pytest.raises(openai.BadRequestError, match=job.id) as caught:
        served.client().files.delete(job.spec.training_file)
    assert caught.value.code == "file_in_use"


def test_a_file_name_is_reduced_to_what_a_name_may_be(served: Served) -> None:
    names = {"../../etc/passwd": "passwd", "C:\\temp\\a.jsonl": "a.jsonl", "a\x7fb": "ab", "x" * 300: "x" * 255}
    for sent, kept in names.items():
        assert served.client().files.create(file=(sent, LINES), purpose="fine-tune").filename == kept


def test_a_download_names_the_file_and_its_length(served: Served) -> None:
    file = served.client().files.create(file=("ü b.jsonl", LINES), purpose="fine-tune")
    response = served.http().get(f"/v1/files/{file.id}/content")
    assert response.headers["content-disposition"] == "attachment; filename*=UTF-8''%C3%BC%20b.jsonl"
    assert response.headers["content-length"] == str(len(LINES))


def test_query_parameters_are_checked(shared_service: Served) -> None:
    http = shared_service.http()
    for params, param in (
        ({"limit": "0"}, "limit"), ({"limit": "x"}, "limit"), ({"order": "up"}, "order"), ({"colour": "x"}, "colour"),
        ({"after": "file-none"}, "after"), ({"purpose": "colour"}, "purpose"),
    ):  # fmt: skip
        assert _error(http.get("/v1/files", params=params))[:2] == (400, param)


def test_nothing_is_read_from_a_caller_without_a_key(served: Served) -> None:
    with pytest.raises(openai.AuthenticationError):
        served.client("rs-wrong").files.create(file=("a", LINES), purpose="fine-tune")
    assert served.control.files.list(served.control.acme.id).items == ()


def test_result_files_are_listed_under_their_purpose(served: Served) -> None:
    control = served.control
    control.create_job()
    staged = control.files.stage(control.acme.id, "step_metrics.csv", FilePurpose.FINE_TUNE_RESULTS, [b"step\n"])
    control.queue.succeed(
        control.claim(), digest="d" * 64, base_fingerprint="f", metrics={}, trained_tokens=1, result_files=[staged]
    )
    (file,) = served.client().files.list(purpose="fine-tune-results")
    assert (file.id, file.purpose, file.filename) == (staged.id, "fine-tune-results", "step_metrics.csv")
