"""Fixtures of the tests that break what the service stands on."""

from __future__ import annotations

from tests.service.control_fixtures import control, database, database_url, postgres_server, postgres_url
from tests.service.tuning_fixtures import tiny_base, workshop

__all__ = ["control", "database", "database_url", "postgres_server", "postgres_url", "tiny_base", "workshop"]
