"""Servers for tests: the application without a socket, and real processes."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgpack

from penstock.api.app import create_app
from penstock.api.auth import Scope, token_path
from penstock.api.note import read_note
from penstock.api.service import Service
from penstock.engine.spool import Batch
from tests.conftest import wait_until

URL = "http://127.0.0.1:4270"
COMMAND = "from penstock.cli import main; main()"


def packed(batch: Batch) -> bytes:
    body: bytes = msgpack.packb({"writer": batch.writer, "first": batch.first, "payloads": batch.payloads})
    return body


class Api:
    """The application of a home, asked in this process."""

    def __init__(self, home: Path, rate: float = 1e9, hosts: Sequence[str] = ()) -> None:
        self._loop = asyncio.Runner()
        self.service = Service(home)
        self.app = create_app(self.service, hosts=hosts, rate=rate)
        self.tokens = {scope: self.app.state.keyring.add(scope) for scope in list(Scope)[1:]}
        self.admin = token_path(home).read_text().strip()
        self._lifespan = self.app.router.lifespan_context(self.app)
        self._loop.run(self._lifespan.__aenter__())
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False, client=("127.0.0.1", 5))
        self._client = httpx.AsyncClient(transport=transport, base_url=URL)

    def request(
        self, method: str, path: str, scope: Scope | None = Scope.ADMIN, **details: Any
    ) -> httpx.Response:
        headers = dict(details.pop("headers", {}))
        if scope:
            headers.setdefault("authorization", f"Bearer {self.tokens[scope]}")
        self._client.cookies.clear()
        return self._loop.run(self._client.request(method, path, headers=headers, **details))

    def get(self, path: str, **query: Any) -> Any:
        answer = self.request("GET", f"/api/v1{path}", params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path: str, body: Any, scope: Scope | None = Scope.ADMIN) -> httpx.Response:
        kind = {"content-type": "application/json"}
        return self.request("POST", f"/api/v1{path}", scope, content=json.dumps(body), headers=kind)

    def send(self, batch: Batch, **headers: str) -> httpx.Response:
        kind = {"content-type": "application/msgpack", **headers}
        return self.request("POST", "/api/v1/ingest", Scope.RUN, content=packed(batch), headers=kind)

    def close(self) -> None:
        self._loop.run(self._client.aclose())
        self._loop.run(self._lifespan.__aexit__(None, None, None))
        self._loop.close()


class Served:
    """A server in a process of its own."""

    def __init__(self, home: Path, process: subprocess.Popen[bytes]) -> None:
        self.home = home
        self.process = process
        self.url = ""

    @property
    def token(self) -> str:
        return token_path(self.home).read_text().strip()

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {self.token}"}, timeout=30)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)


def start(home: Path, arguments: Sequence[str] = (), code: str = COMMAND, port: int = 0) -> Served:
    """Start a server and wait until it answers."""
    environment = {**os.environ, "PENSTOCK_HOME": str(home)}
    environment.pop("PENSTOCK_API_URL", None)
    log = (home / "log").open("ab")
    process = subprocess.Popen(
        [sys.executable, "-c", code, "server", "start", "--port", str(port), *arguments],
        env=environment,
        stdout=log,
        stderr=log,
    )
    log.close()
    found = Served(home, process)

    def answers() -> bool:
        note = read_note(home)
        if note is not None and note["pid"] == process.pid:
            found.url = note["url"]
            with contextlib.suppress(httpx.HTTPError):
                return httpx.get(f"{found.url}/api/v1/health").status_code == 200
        return process.poll() is not None

    try:
        wait_until(answers, 30.0)
        assert process.poll() is None, (home / "log").read_text()
    except AssertionError:
        found.kill()
        raise
    return found


@contextlib.contextmanager
def served(home: Path, arguments: Sequence[str] = (), code: str = COMMAND, port: int = 0) -> Iterator[Served]:
    found = start(home, arguments, code, port)
    try:
        yield found
    finally:
        if found.process.poll() is None:
            found.kill()


def lines_of(response: httpx.Response) -> Iterator[tuple[str, Any, str | None]]:
    """Events of a stream: name, data, id."""
    from penstock.api.sse import parse

    for kind, data, last in parse(response.iter_lines()):
        yield kind, json.loads(data) if data else None, last
