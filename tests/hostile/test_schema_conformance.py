"""Whatever can be written down after the API's own description is answered as that description says: schemathesis."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hostile.count import counts
from tests.hostile.description import BODY_LINKS, LINKS, linked
from tests.hostile.generated import PHASES, tried
from tests.service.http_fixtures import serve_fake

FEW = 1
"""Examples of each operation, in the phases that have them; `make hostile` takes a hundred."""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_generated_requests_are_answered_as_the_description_says(tmp_path: Path) -> None:
    with serve_fake(tmp_path) as served:
        found = tried(served, FEW, tuple(phase for phase in PHASES if phase != "coverage"))
    assert not found.failures, found.failures
    assert found.num_cases > 50


def test_every_failure_has_one_declared_shape_and_links_name_operations_that_exist(tmp_path: Path) -> None:
    with serve_fake(tmp_path) as served:
        described = linked(served.api.openapi())
    operations = [one for methods in described["paths"].values() for one in methods.values()]
    names = {one["operationId"] for one in operations}
    links = [
        link for one in operations for answer in one["responses"].values() for link in answer.get("links", {}).values()
    ]
    assert len(links) == len(LINKS) + len(BODY_LINKS) and {link["operationId"] for link in links} <= names
    for one in operations:
        for status in ("4XX", "5XX"):
            shape = one["responses"][status]["content"]["application/json"]["schema"]
            assert shape == {"$ref": "#/components/schemas/ErrorBody"}, one["operationId"]
        assert "422" not in one["responses"]


def test_the_count_knows_every_kind() -> None:
    assert len(counts()) >= 10 and all(counts().values())
