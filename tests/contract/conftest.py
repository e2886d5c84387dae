"""The contract: one behaviour, one test, five runners."""

from pathlib import Path

import pytest

PATIENCE = 30  # seconds after which a test counts as a deadlock


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(PATIENCE, func_only=True))  # a cluster may take its time to start
