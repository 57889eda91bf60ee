"""The API's own description as schemathesis gets it: with links, so that what one request makes the next ones use.

Knows paths, not how they are tried.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

Description = dict[str, Any]

FILE, JOB, ALIAS = "/v1/files/{file_id}", "/v1/fine_tuning/jobs/{job_id}", "/v1/aliases/{alias}"
TENANT = "/v1/admin/tenants/{tenant_id}"
ID = "$response.body#/id"

LINKS: tuple[tuple[str, str, str, str, Mapping[str, Any]], ...] = (
    ("post", "/v1/files", "get", FILE, {"file_id": ID}),
    ("post", "/v1/files", "get", f"{FILE}/content", {"file_id": ID}),
    ("post", "/v1/files", "delete", FILE, {"file_id": ID}),
    ("delete", FILE, "get", FILE, {"file_id": ID}),
    ("post", "/v1/fine_tuning/jobs", "get", JOB, {"job_id": ID}),
    ("post", "/v1/fine_tuning/jobs", "post", f"{JOB}/cancel", {"job_id": ID}),
    ("post", "/v1/fine_tuning/jobs", "post", f"{JOB}/pause", {"job_id": ID}),
    ("post", "/v1/fine_tuning/jobs", "get", f"{JOB}/events", {"job_id": ID}),
    ("post", f"{JOB}/pause", "post", f"{JOB}/resume", {"job_id": ID}),
    ("post", f"{JOB}/resume", "post", f"{JOB}/cancel", {"job_id": ID}),
    ("put", ALIAS, "get", ALIAS, {"alias": ID}),
    ("put", ALIAS, "post", f"{ALIAS}/rollback", {"alias": ID}),
    ("put", ALIAS, "delete", ALIAS, {"alias": ID}),
    ("delete", ALIAS, "get", ALIAS, {"alias": ID}),
    ("post", "/v1/keys", "post", "/v1/keys/{key_id}/rotate", {"key_id": ID}),
    ("post", "/v1/keys", "delete", "/v1/keys/{key_id}", {"key_id": ID}),
    ("post", "/v1/admin/tenants", "get", TENANT, {"tenant_id": ID}),
    ("post", "/v1/admin/tenants", "patch", TENANT, {"tenant_id": ID}),
    ("post", "/v1/admin/tenants", "get", f"{TENANT}/keys", {"tenant_id": ID}),
    ("post", "/v1/admin/tenants", "post", f"{TENANT}/keys", {"tenant_id": ID}),
    ("post", "/v1/admin/tenants", "post", f"{TENANT}/keys/additional", {"tenant_id": ID}),
    ("post", "/v1/admin/tenants", "delete", TENANT, {"tenant_id": ID}),
    ("delete", TENANT, "get", TENANT, {"tenant_id": ID}),
)
"""What was done, where; what may be done next, where; with what of the answer."""
BODY_LINKS: tuple[tuple[str, str, str, str, Mapping[str, Any]], ...] = (
    ("post", "/v1/files", "post", "/v1/fine_tuning/jobs", {"model": "tiny", "training_file": ID}),
    ("post", "/v1/chat/completions", "post", "/v1/feedback", {"completion_id": ID, "rating": "up"}),
)
"""The same, with the body of what is done next."""


def linked(description: Description) -> Description:
    """A copy with `LINKS` and `BODY_LINKS`."""
    described = copy.deepcopy(description)
    paths = described["paths"]
    for number, (method, path, next_method, next_path, given) in enumerate((*LINKS, *BODY_LINKS)):
        link: Description = {"operationId": paths[next_path][next_method]["operationId"]}
        link["parameters" if number < len(LINKS) else "requestBody"] = dict(given)
        paths[path][method]["responses"]["200"].setdefault("links", {})[f"link{number}"] = link
    return described
