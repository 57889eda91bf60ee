"""Fixtures of everything under `service`."""

from tests.service.control_fixtures import control, database, database_url, postgres_server, postgres_url
from tests.service.http_fixtures import served, shared_service

__all__ = ["control", "database", "database_url", "postgres_server", "postgres_url", "served", "shared_service"]
