"""Whatever can be written down after the API's own description is answered without a 5xx: schemathesis, in bounds."""

from __future__ import annotations

from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.config import GenerationConfig  # noqa: F401

from tests.service.http_fixtures import serve_fake

MAX_EXAMPLES = 25
DESTRUCTIVE = {("delete", "/v1/admin/tenants/{tenant_id}"), ("post", "/v1/admin/tenants/{tenant_id}/keys")}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_generated_request_is_a_server_error(tmp_path: Path) -> None:
    num_cases, failures = 0, []
    with serve_fake(tmp_path) as served:
        description = served.api.openapi()
        schema = schemathesis.openapi.from_dict(description)
        schema.config.update(base_url=served.url)
        for result in schema.get_all_operations():
            operation = result.ok()
            if (operation.method, operation.path) in DESTRUCTIVE:
                continue
            key = "the-administrators-own-key" if "/admin/" in operation.path else served.control.acme_key
            for mode in schemathesis.GenerationMode.all():

                @settings(
                    max_examples=MAX_EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck)
                )
                @given(case=operation.as_strategy(generation_mode=mode))
                def ask(case: schemathesis.Case, key: str = key) -> None:
                    nonlocal num_cases
                    num_cases += 1
                    answer = case.call(headers={"authorization": f"Bearer {key}"}, timeout=30)
                    if answer.status_code >= 500:
                        failures.append((case.method, case.formatted_path, answer.status_code, str(case.body)[:200]))

                ask()
    assert num_cases > 1000
    assert not failures, failures[:10]
