"""Who gets in: scopes of every route, hosts, origins, bodies, headers; and what never happens inside."""

import ast
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.api.auth import Keyring, Scope, declared, token_path
from penstock.api.guard import BODY
from penstock.errors import ConfigurationError
from tests.serving import URL, Api
from tests.story import LOAD, ROOT, Flow, batch, count_events, story

API = Path(__file__).parent.parent.parent / "penstock" / "api"
PRIVATE = stat.S_IRWXG | stat.S_IRWXO
ENDLESS = {"/api/v1/events", "/api/v1/runs/{run}/logs/stream"}
"""Streams: asked in a process of their own, since this one would wait for their end."""


@pytest.fixture
def api(clean_environment: Path) -> Iterator[Api]:
    found = Api(clean_environment)
    yield found
    found.close()


@pytest.fixture
def told(api: Api) -> Api:
    assert api.send(batch(story().events)).status_code == 200
    return api


def routes(api: Api) -> list[tuple[str, str, Any]]:
    return [(method, route.path, route) for route in api.app.routes for method in sorted(route.methods)]  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------ scopes


def test_every_route_declares_its_scope(api: Api) -> None:
    assert [path for _, path, route in routes(api) if declared(route) is None] == []
    public = {path for _, path, route in routes(api) if declared(route) is Scope.PUBLIC}
    assert public == {"/api/v1/health", "/api/v1/ready", "/login"}
    changing = {
        path for method, path, route in routes(api) if method != "GET" and declared(route) == Scope.VIEW
    }
    assert changing == {"/api/v1/ask"}  # its questions only read


def test_a_route_without_a_scope_would_be_found(api: Api) -> None:
    @api.app.get("/forgotten")
    def forgotten() -> None: ...

    assert [path for _, path, route in routes(api) if declared(route) is None] == ["/forgotten"]


def test_each_route_with_each_credential(told: Api) -> None:
    tried = 0
    for method, path, route in routes(told):
        least = declared(route)
        assert least is not None
        target = path.replace("{run}", ROOT)
        for scope in (None, "bad", *list(Scope)[1:]):
            allowed = least is Scope.PUBLIC or (isinstance(scope, Scope) and scope >= least)
            if allowed and path in ENDLESS:
                continue
            headers = {"authorization": f"Bearer {'0' * 64}"} if scope == "bad" else {}
            credential = scope if isinstance(scope, Scope) else None
            answer = told.request(method, target, credential, headers=headers)
            refused = answer.status_code in {401, 403} and path != "/login"
            assert refused is not allowed, (method, path, scope, answer.status_code, answer.text)
            if refused:
                assert answer.status_code == (403 if isinstance(scope, Scope) else 401)
            tried += 1
    assert tried > 140


@pytest.mark.parametrize("name", ["health", "ready", "docs", "login"])
def test_a_name_that_ends_like_an_open_door_opens_none(told: Api, name: str) -> None:
    for path in (
        f"/api/v1/flows/{name}",
        f"/api/v1/flow-runs/{name}",
        f"/api/v1/runs/{name}/logs",
        f"/api/v1/runs/x{name}/state",
        f"/api/v1/flow-runs/x%2F{name}",
        f"/api/v1/flows?/{name}",
        f"/api/v1/flow-runs/{ROOT}/{name}",
        f"/api/v1/flow-runs/{ROOT};/{name}",
        f"/api/v1//{name}",
        f"/x/api/v1/{name}",
    ):
        for method in ("GET", "POST"):
            answer = told.request(
                method, path, None, content=b"{}", headers={"content-type": "application/json"}
            )
            assert answer.status_code in {401, 404, 405}, (method, path, answer.status_code)
            assert "runs" not in answer.text


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Basic dXNlcjpwYXNz", "bearer \xe9", "Bearer " + "a" * 5000]
)
def test_odd_credentials_are_no_credentials(told: Api, header: str) -> None:
    raw = {"authorization": header.encode("latin-1")}
    answer = told.request("GET", "/api/v1/flows", None, headers=raw)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"


def test_the_token_of_the_account_is_private_and_not_stored_in_the_open(
    api: Api, clean_environment: Path
) -> None:
    for name in ("token", "tokens.json"):
        assert not (clean_environment / name).stat().st_mode & PRIVATE
    assert len(bytes.fromhex(token_path(clean_environment).read_text())) == 32
    stored = (clean_environment / "tokens.json").read_text()
    assert not any(token in stored for token in api.tokens.values())
    assert api.request(
        "GET", "/api/v1/flows", None, headers={"authorization": f"Bearer {api.admin}"}
    ).is_success


def test_a_token_that_others_can_read_is_refused(clean_environment: Path) -> None:
    token_path(clean_environment).write_text("a" * 64)
    token_path(clean_environment).chmod(0o644)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        Keyring(clean_environment)


def test_tokens_come_and_go_while_the_server_runs(api: Api, clean_environment: Path) -> None:
    token = Keyring(clean_environment).add(Scope.VIEW)
    headers = {"authorization": f"Bearer {token}"}
    assert api.request("GET", "/api/v1/flows", None, headers=headers).status_code == 200
    (clean_environment / "tokens.json").unlink()
    assert api.request("GET", "/api/v1/flows", None, headers=headers).status_code == 401


# ------------------------------------------------------------------------------------------------ browsers


@pytest.mark.parametrize(
    "host, status",
    [
        ("127.0.0.1:4270", 200),
        ("localhost:1", 200),
        ("LOCALHOST", 200),
        ("[::1]:4270", 200),
        ("evil.example", 421),
        ("127.0.0.1.evil.example", 421),
        ("evil.example:4270", 421),
        ("127.0.0.1@evil.example", 421),
        ("127.0.0.2", 421),
        ("", 421),
    ],
)
def test_only_our_own_names_are_answered(told: Api, host: str, status: int) -> None:
    for path in ("/api/v1/health", "/api/v1/flows", "/docs", "/nothing"):
        answer = told.request("GET", path, headers={"host": host})
        assert answer.status_code == (404 if path == "/nothing" and status == 200 else status)


@pytest.mark.parametrize(
    "headers, allowed",
    [
        ({}, True),
        ({"origin": URL}, True),
        ({"origin": "null"}, False),
        ({"origin": "http://evil.example"}, False),
        ({"origin": "https://127.0.0.1:4270"}, False),
        ({"origin": "http://127.0.0.1:8888"}, False),
        ({"origin": "http://localhost:4270"}, False),
        ({"origin": URL, "sec-fetch-site": "cross-site"}, False),
        ({"sec-fetch-site": "same-site"}, False),
        ({"sec-fetch-site": "same-origin"}, True),
        ({"sec-fetch-site": "none"}, True),
    ],
)
def test_requests_of_foreign_pages_change_nothing(told: Api, headers: dict[str, str], allowed: bool) -> None:
    kind = {"content-type": "application/json", **headers}
    answer = told.request("POST", "/api/v1/ask", content=b'{"what": "runs"}', headers=kind)
    assert answer.status_code == (200 if allowed else 403)
    assert "access-control-allow-origin" not in answer.headers


PROXY = "penstock.example.org"


@pytest.mark.parametrize(
    "host, headers, status",
    [
        (PROXY, {"origin": f"https://{PROXY}", "sec-fetch-site": "same-origin"}, 200),
        (PROXY, {"origin": f"http://{PROXY}"}, 200),
        (f"{PROXY}:8443", {"origin": f"https://{PROXY}:8443"}, 200),
        (PROXY, {"origin": f"https://{PROXY}:8443"}, 403),
        (PROXY, {"origin": "https://evil.example"}, 403),
        (PROXY, {"origin": f"https://evil.{PROXY}"}, 403),
        (PROXY, {"origin": f"ftp://{PROXY}"}, 403),
        (PROXY, {"origin": f"https://{PROXY}", "sec-fetch-site": "cross-site"}, 403),
        ("evil.example", {"origin": "https://evil.example"}, 421),
        ("127.0.0.1:4270", {"origin": "https://127.0.0.1:4270"}, 403),
        ("localhost", {"origin": "https://localhost"}, 403),
    ],
)
def test_a_page_of_ours_behind_a_proxy_with_tls_is_ours(
    home: Path, host: str, headers: dict[str, str], status: int
) -> None:
    api = Api(home, hosts=[PROXY])
    try:
        kind = {"content-type": "application/json", "host": host, **headers}
        answer = api.request("POST", "/api/v1/ask", content=b'{"what": "runs"}', headers=kind)
        assert answer.status_code == status
    finally:
        api.close()


def test_a_browser_logs_in_through_a_proxy_with_tls(home: Path) -> None:
    api = Api(home, hosts=[PROXY])
    try:
        key = api.post("/login-link", None).json()["path"].partition("key=")[2]
        form = {
            "content-type": "application/x-www-form-urlencoded",
            "host": PROXY,
            "origin": f"https://{PROXY}",
        }
        answer = api.request("POST", "/login", None, content=f"key={key}", headers=form)
        assert answer.status_code == 303
        assert answer.headers["location"] == "docs"
        cookie = answer.headers["set-cookie"]
        assert {"HttpOnly", "SameSite=strict", "Secure"} <= set(cookie.split("; "))
        held = {"cookie": cookie.partition(";")[0], "host": PROXY}
        assert api.request("GET", "/api/v1/flows", None, headers=held).status_code == 200
    finally:
        api.close()


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""]
)
def test_what_a_form_can_send_is_refused(told: Api, kind: str) -> None:
    for path in ("/api/v1/ask", "/api/v1/ingest", f"/api/v1/runs/{ROOT}/state"):
        answer = told.request("POST", path, content=b'{"what": "runs"}', headers={"content-type": kind})
        assert answer.status_code == 415


def test_a_preflight_gets_no_permission(told: Api) -> None:
    asked = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    answer = told.request("OPTIONS", "/api/v1/ingest", None, headers=asked)
    assert answer.status_code in {403, 405}
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_browser_logs_in_once(told: Api) -> None:
    path = told.post("/login-link", None).json()["path"]
    key = path.partition("key=")[2]
    assert told.request("GET", path, None).status_code == 200  # a look uses nothing up
    form = {"content-type": "application/x-www-form-urlencoded", "origin": URL}
    foreign = {**form, "origin": "http://evil.example"}
    assert told.request("POST", "/login", None, content=f"key={key}", headers=foreign).status_code == 403
    answer = told.request("POST", "/login", None, content=f"key={key}", headers=form)
    cookie = answer.headers["set-cookie"]
    assert answer.status_code == 303
    assert cookie.startswith("penstock-4270=")
    assert {"HttpOnly", "SameSite=strict", "Max-Age=43200"} <= set(cookie.split("; "))
    again = told.request("POST", "/login", None, content=f"key={key}", headers=form)
    assert (again.status_code, "set-cookie" in again.headers) == (401, False)

    held = {"cookie": cookie.partition(";")[0]}
    assert told.request("GET", "/api/v1/flows", None, headers=held).status_code == 200
    assert (
        told.request("GET", "/api/v1/flows", None, headers={"cookie": "penstock-4270=x"}).status_code == 401
    )
    with_body = {**held, "content-type": "application/json", "origin": "http://evil.example"}
    body = b'{"action": "cancel"}'
    assert (
        told.request("POST", f"/api/v1/runs/{ROOT}/state", None, content=body, headers=with_body).status_code
        == 403
    )


def test_a_session_ends(told: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    keyring = told.app.state.keyring
    session = keyring.enter(keyring.link())
    assert keyring.session(session) is Scope.ADMIN
    key = keyring.link()
    now = time.monotonic()
    monkeypatch.setattr("penstock.api.auth.time.monotonic", lambda: now + 12 * 3600 + 1)
    assert keyring.session(session) is None
    assert keyring.enter(key) is None


def test_every_answer_carries_the_headers(told: Api) -> None:
    for path in ("/docs", "/login", "/api/v1/flows", "/api/v1/nothing", "/api/v1/health"):
        headers = told.request("GET", path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]


def test_names_are_text_in_pages(api: Api) -> None:
    page = api.request("GET", "/login", None, params={"key": '"><script>alert(1)</script>'}).text
    assert "<script" not in page


def test_reading_changes_nothing(told: Api) -> None:
    before = told.service.database.path.read_bytes()  # type: ignore[union-attr]
    for method, path, _ in routes(told):
        if method == "GET" and path not in ENDLESS:
            told.request("GET", path.replace("{run}", ROOT))
    assert told.service.database.path.read_bytes() == before  # type: ignore[union-attr]
    assert count_events(told.service.database) == 18


# ------------------------------------------------------------------------------------------------ bodies


def test_bodies_are_limited(told: Api) -> None:
    kind = {"content-type": "application/json"}
    large = told.request("POST", "/api/v1/ask", content=b"[" + b"1," * BODY + b"1]", headers=kind)
    assert large.status_code == 413

    async def endless() -> Any:
        while True:
            yield b"x" * 65536

    answer = told.request("POST", "/api/v1/ask", content=endless(), headers=kind)
    assert answer.status_code == 413


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"what": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b"1" * 100_000,
        b'{"what": "runs", "limit": 1e400}',
        b"\xff",
    ],
)
def test_deep_and_odd_bodies_are_refused_with_words(told: Api, body: bytes) -> None:
    answer = told.request("POST", "/api/v1/ask", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in {400, 422}, answer.text


def test_requests_are_metered_and_ingest_is_not(clean_environment: Path) -> None:
    api = Api(clean_environment, rate=2.0)
    try:
        statuses = [api.request("GET", "/api/v1/version", Scope.VIEW).status_code for _ in range(10)]
        assert statuses[:4] == [200] * 4
        assert 429 in statuses
        found = batch(story().events)
        assert {api.send(found).status_code for _ in range(10)} == {200}
        assert api.request("GET", "/api/v1/version", Scope.ADMIN).status_code == 200  # another one's bucket
    finally:
        api.close()


# ------------------------------------------------------------------------------------------------ pickles


def test_nothing_is_unpickled_in_a_server(api: Api) -> None:
    import pickle

    loaded: list[Any] = []
    active = [True]

    def hook(event: str, details: tuple[Any, ...]) -> None:
        if active[0] and event in {"pickle.find_class", "marshal.loads"} and event.startswith("pickle"):
            loaded.append(details)

    sys.addaudithook(hook)
    try:
        flow = Flow()
        poison = pickle.dumps(Path("x"))
        flow.add("flow_run", ROOT, flow="f", name="x", parameters={"p": "cos\nsystem\n(S'true'\ntR."})
        flow.add("task_run", LOAD, flow_run=ROOT, task="t", name=poison, tags=[poison])
        flow.state(LOAD, "FAILED", error={"type": poison, "message": poison, "text": poison})
        flow.add("log", LOAD, lines=[[1.0, "INFO", poison]])
        api.send(batch(flow.events))
        for method, path, _ in routes(api):
            if path not in ENDLESS:
                api.request(method, path.replace("{run}", ROOT))
                api.request(method, path.replace("{run}", LOAD))
    finally:
        active[0] = False
    assert loaded == []


def test_the_server_half_of_the_api_names_no_pickle() -> None:
    for path in sorted(API.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [one.name for one in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"pickle", "cloudpickle", "marshal", "shelve", "dill"} & {
                name.partition(".")[0] for name in names
            }
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec", "compile", "__import__"}, path
