"""Fixtures of the store, as the integration tests have them."""

from tests.integration.conftest import database, database_url, home, postgres_server

__all__ = ["database", "database_url", "home", "postgres_server"]
