"""Whatever can be written down after the API's own description is answered without a 5xx: schemathesis, in bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.core.result import Ok

from tests.service.http_fixtures import ADMIN_KEY, serve_fake

MAX_EXAMPLES = 10
"""Of each operation, in each mode."""
MODES = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)


class Asking:
    """Sends generated requests; remembers how many, and which were answered with a 5xx."""

    def __init__(self, key: str) -> None:
        self._headers = {"authorization": f"Bearer {key}"}
        self.num_cases = 0
        self.failures: list[tuple[str, str, int, str]] = []

    def ask(self, case: Any) -> None:
        self.num_cases += 1
        answer = case.call(headers=self._headers, timeout=30)
        if answer.status_code >= 500:
            self.failures.append((case.method, case.formatted_path, answer.status_code, repr(case.body)[:200]))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_generated_request_is_a_server_error(tmp_path: Path) -> None:
    with serve_fake(tmp_path) as served:
        tenant, admin = Asking(served.control.acme_key), Asking(ADMIN_KEY)
        schema = schemathesis.openapi.from_dict(served.api.openapi())
        schema.config.update(base_url=served.url)
        for result in schema.get_all_operations():
            assert isinstance(result, Ok), result
            operation = result.ok()
            asking = admin if "/admin/" in operation.path else tenant
            for mode in MODES:
                bounded = settings(
                    max_examples=MAX_EXAMPLES,
                    deadline=None,
                    database=None,
                    derandomize=True,
                    suppress_health_check=list(HealthCheck),
                )
                bounded(given(operation.as_strategy(generation_mode=mode))(lambda case: asking.ask(case)))()  # noqa: B023
    assert tenant.num_cases + admin.num_cases > 500
    assert not tenant.failures + admin.failures, (tenant.failures + admin.failures)[:10]
