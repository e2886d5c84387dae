"""The contract: one behaviour, one test, five runners."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
PATIENCE = 30  # seconds after which a test counts as a deadlock


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test its patience; what needs a cluster of one worker comes last of each runner."""
    places = [place for place, item in enumerate(items) if HERE in item.path.parents]
    runners: dict[str, int] = {}
    order: dict[pytest.Item, tuple[int, bool]] = {}
    for place in places:
        item = items[place]
        if item.get_closest_marker("timeout") is None:  # a cluster may take its time to start
            item.add_marker(pytest.mark.timeout(PATIENCE, func_only=True))
        callspec = getattr(item, "callspec", None)
        runner = str(callspec.params.get("runner_name")) if callspec is not None else ""
        order[item] = (
            runners.setdefault(runner, len(runners)),
            "one_worker" in getattr(item, "fixturenames", ()),
        )
    for place, item in zip(places, sorted(order, key=lambda item: order[item]), strict=True):
        items[place] = item
