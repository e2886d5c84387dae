"""What our OpenAPI allows and forbids, tried: no error of the server, no answer that it does not describe."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from schemathesis import checks

from penstock.api.remote import HttpStore
from tests.serving import COMMAND, Api, Served, served
from tests.story import CHILD, LOAD, MAP, ROOT, batch, story

UNMETERED = f"""
import penstock.api.server as server
made = server.create_app
server.create_app = lambda *args, **details: made(*args, rate=1e9, **details)
{COMMAND}
"""
ENDLESS = {"/api/v1/events", "/api/v1/runs/{run}/logs/stream"}
EXAMPLES = 25  # of each operation: some 20 s in all


@schemathesis.serializer("application/msgpack")
def as_it_is(context: Any, value: Any) -> bytes:
    return value if isinstance(value, bytes) else getattr(value, "data", b"")


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Any:
    api = Api(tmp_path_factory.mktemp("schema"))
    try:
        return schemathesis.openapi.from_dict(api.app.openapi())
    finally:
        api.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("served")
    with served(home, code=UNMETERED) as found:
        store = HttpStore(home, found.url, found.token)
        store.send(batch(story().events))
        store.close()
        yield found


def test_the_api_is_as_it_says(schema: Any, server: Served) -> None:
    tried = 0
    headers = {"Authorization": f"Bearer {server.token}"}
    wanted = [
        checks.not_a_server_error,
        *(
            checks.CHECKS.get_one(name)
            for name in ("status_code_conformance", "content_type_conformance", "response_schema_conformance")
        ),
    ]
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path in ENDLESS:
            continue

        @given(case=operation.as_strategy(), run=st.sampled_from([None, ROOT, CHILD, LOAD, MAP]))
        @examples(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        def tries(case: Any, run: str | None) -> None:
            nonlocal tried
            if run is not None and "run" in case.path_parameters:
                case.path_parameters["run"] = run
            response = case.call(base_url=server.url, headers=headers)
            # 501 says that something cannot be done yet, 503 that the store is away.
            if response.status_code not in {501, 503}:
                case.validate_response(response, checks=wanted)
            else:
                assert response.json()["detail"]
            tried += 1

        tries()
    assert tried > 25 * EXAMPLES * 0.5
    assert server.process.poll() is None
