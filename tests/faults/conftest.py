"""Fixtures of the tests that break what the service stands on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.service.control_fixtures import control, database, database_url, postgres_server, postgres_url
from tests.service.tuning_fixtures import tiny_base, workshop
from tools.kill_jobs.victims import Nursery, nursery

__all__ = ["born", "control", "database", "database_url", "postgres_server", "postgres_url", "tiny_base", "workshop"]


@pytest.fixture(scope="package")
def born() -> Iterator[Nursery]:
    """Starts services in about a second each."""
    with nursery() as made:
        yield made
