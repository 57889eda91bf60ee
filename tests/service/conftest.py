"""Fixtures of everything under `service`."""

from tests.service.control_fixtures import control, database, database_url, postgres_server

__all__ = ["control", "database", "database_url", "postgres_server"]
