"""Hostile names: paths, labels, and what belongs to somebody else."""

from __future__ import annotations

from tests.hostile.cases import Case, Request, chat, get, job, part, post, upload

_LABEL = 'a"} 1\nrootstock_requests_total{operation="x'


CASES = [
    Case("up and away from a file", get("/v1/files/..%2f..%2fetc%2fpasswd"), 404),
    Case("up and away from a file's content", get("/v1/files/..%2f{other_tenant}%2f{other_file}/content"), 404),
    Case("up and away from a model", get("/v1/models/..%2f..%2fetc%2fpasswd"), 404, param="model"),
    Case("up and away from an adapter", get("/v1/adapters/../../etc/passwd/export"), 404, param="model"),
    Case("twice encoded", get("/v1/files/%252e%252e%252fpasswd"), 404, param="file_id"),
    Case("NUL in a path", get("/v1/files/file%00id")),
    Case("NUL in a query", get("/v1/files?after=%00")),
    Case("no UTF-8 in a path", get("/v1/files/%ff%fe"), 404, param="file_id"),
    Case("half a surrogate pair in a path", get("/v1/files/%ed%a0%80"), 404, param="file_id"),
    Case("an id of 10 kB", get("/v1/files/" + "a" * 3000), 404, param="file_id"),
    Case("SQL in an id", get("/v1/files/'%20OR%201=1;--"), 404, param="file_id"),
    Case("SQL in a page", get("/v1/files?after='%20OR%201=1;--"), 400, param="after"),
    Case("an unknown query", get("/v1/files?tenant={other_tenant}"), param="tenant"),
    Case("a query twice", get("/v1/files?limit=1&limit=2"), param="limit"),
    Case("somebody else's file", get("/v1/files/{other_file}"), 404, param="file_id"),
    Case("somebody else's content", get("/v1/files/{other_file}/content"), 404, param="file_id"),
    Case("deleting somebody else's file", Request("DELETE", "/v1/files/{other_file}"), 404, param="file_id"),
    Case("a report on somebody else's file", Request("POST", "/v1/files/{other_file}/report"), 404, param="file_id"),
    Case("training on somebody else's file", job(training_file="{other_file}"), param="training_file"),
    Case("validating on somebody else's file", job(validation_file="{other_file}"), param="validation_file"),
    Case("somebody else's job", get("/v1/fine_tuning/jobs/{other_job}"), 404, param="job_id"),
    Case(
        "cancelling somebody else's job",
        Request("POST", "/v1/fine_tuning/jobs/{other_job}/cancel"),
        404,
        param="job_id",
    ),
    Case("events of somebody else's job", get("/v1/fine_tuning/jobs/{other_job}/events"), 404, param="job_id"),
    Case("asking somebody else's model", chat(model="{other_model}"), 404, param="model"),
    Case("asking somebody else's alias", chat(model="theirs"), 404, param="model"),
    Case(
        "taking over somebody else's model",
        post("/v1/aliases/mine", {"model": "{other_model}"}, "PUT"),
        404,
        param="model",
    ),
    Case("somebody else's alias", get("/v1/aliases/theirs"), 404, param="alias"),
    Case("exporting somebody else's adapter", get("/v1/adapters/{other_model}/export"), 404, param="model"),
    Case("deleting somebody else's model", Request("DELETE", "/v1/models/{other_model}"), 404, param="model"),
    Case("training on from somebody else's model", job(model="{other_model}"), 404, param="model"),
    Case("a page that begins at somebody else's file", get("/v1/files?after={other_file}"), param="after"),
    Case("labels in a tenant's name", post("/v1/admin/tenants", {"name": _LABEL}, admin=True), param="name"),
    Case(
        "a line break behind a tenant's name", post("/v1/admin/tenants", {"name": "evil\n"}, admin=True), param="name"
    ),
    Case("a tenant named upwards", post("/v1/admin/tenants", {"name": "../acme"}, admin=True), param="name"),
    Case("labels in a suffix", job(suffix=_LABEL), param="suffix"),
    Case("a line break behind a suffix", job(suffix="mine\n"), param="suffix"),
    Case("labels in an alias", post("/v1/aliases/a%22%7d%0a", {"model": "{model}"}, "PUT"), param="alias"),
    Case("an alias for a job with a line break", job(alias="a\nb"), param="alias"),
    Case(
        "an alias like a model's id", post("/v1/aliases/ft:tiny:acme:x:1", {"model": "{model}"}, "PUT"), param="alias"
    ),
    Case("labels in a model's name", chat(model=_LABEL), 404, param="model"),
    Case("a file name that climbs", upload(b"{}", "../../../etc/passwd"), 200, shows={"filename": "passwd"}),
    Case(
        "a file name that climbs on Windows", upload(b"{}", "..\\\\..\\\\boot.ini"), 200, shows={"filename": "boot.ini"}
    ),
    Case("a file name with a line break and a header", upload(b"{}", "a%0d%0aset-cookie: b"), 200),
    Case("a file name of nothing", upload(b"{}", "////"), 200, shows={"filename": "file"}),
    Case("a file name of 1000 letters", upload(b"{}", "a" * 1000), 200, shows={"filename": "a" * 255}),
    Case("a part named upwards", upload(b"{}", "a", part("../file", b"{}")), param="../file"),
    Case("an address that is none", get("/v1/../../etc/passwd"), 404),
    Case("metrics on the API's port", get("/metrics"), 404),
    Case("the API's own description", get("/openapi.json"), 404),
]
