"""What somebody with bad intentions sends: the memory of a server does not grow, and others are answered."""

import contextlib
import json
import os
import socket
import statistics
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import msgpack
import psutil
import pytest

from penstock.api.remote import HttpStore
from tests.chaos.figures import keep
from tests.serving import COMMAND, Served, served
from tests.story import batch, story

UNMETERED = f"""
import penstock.api.server as server
made = server.create_app
server.create_app = lambda *args, **details: made(*args, rate=1e9, **details)
{COMMAND}
"""
MEMORY = 50 << 20
PATIENCE = 0.2  # seconds, of 99 in 100 requests of others
GIB = 1 << 30


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("attacked")
    with served(home, code=UNMETERED) as found:
        store = HttpStore(home, found.url, found.token)
        store.send(batch(story().events))
        store.close()
        with found.client() as client:
            for _ in range(100):  # everything is loaded now
                client.get("/api/v1/flow-runs")
        yield found


class Bystander(threading.Thread):
    """Somebody who only wants to read, and notes how long that takes and what the server weighs."""

    def __init__(self, server: Served) -> None:
        super().__init__(daemon=True)
        self.server = server
        self.times: list[float] = []
        self.statuses: set[int] = set()
        self.largest = 0
        self._over = threading.Event()
        self._process = psutil.Process(server.process.pid)
        self.before = self._process.memory_info().rss

    def run(self) -> None:
        with self.server.client() as client:
            while not self._over.wait(0.01):
                begun = time.perf_counter()
                self.statuses.add(client.get("/api/v1/flow-runs").status_code)
                self.times.append(time.perf_counter() - begun)
                self.largest = max(self.largest, self._process.memory_info().rss)

    def end(self) -> dict[str, float]:
        self._over.set()
        self.join(30)
        return {
            "requests": len(self.times),
            "p99_seconds": round(statistics.quantiles(self.times, n=100)[98], 4),
            "grown_bytes": self.largest - self.before,
        }


def connected(server: Served) -> socket.socket:
    parts = urlsplit(server.url)
    assert parts.hostname is not None
    return socket.create_connection((parts.hostname, parts.port or 0), 20)


def head(server: Served, path: str, kind: str, *lines: str) -> bytes:
    host = urlsplit(server.url).netloc
    fixed = [f"POST {path} HTTP/1.1", f"Host: {host}", f"Authorization: Bearer {server.token}"]
    return "\r\n".join([*fixed, f"Content-Type: {kind}", *lines, "", ""]).encode()


def posted(server: Served, path: str, body: bytes, kind: str = "application/json", **headers: str) -> int:
    with server.client() as client:
        return client.post(path, content=body, headers={"content-type": kind, **headers}).status_code


def pours(server: Served, path: str, opening: bytes, chunk: bytes) -> int:
    """Send for as long as the server takes it; return how much that was."""
    with connected(server) as one:
        one.sendall(opening)
        sent = 0
        with contextlib.suppress(OSError):
            while sent < GIB:
                one.sendall(chunk)
                sent += len(chunk)
        return sent


def huge_bodies(server: Served) -> None:
    chunk = b"x" * (1 << 16)
    framed = b"%x\r\n%s\r\n" % (len(chunk), chunk)
    for path, kind in (("/api/v1/ask", "application/json"), ("/api/v1/ingest", "application/msgpack")):
        assert pours(server, path, head(server, path, kind, f"Content-Length: {GIB}"), chunk) < GIB
        opening = head(server, path, kind, "Transfer-Encoding: chunked")
        assert pours(server, path, opening, framed) < GIB


def zip_bombs(server: Served) -> None:
    packing = zlib.compressobj(9)
    bomb = b"".join(packing.compress(b"\0" * (1 << 20)) for _ in range(1000)) + packing.flush()
    assert len(bomb) < 1 << 20
    for _ in range(10):
        assert (
            posted(server, "/api/v1/ingest", bomb, "application/msgpack", **{"content-encoding": "deflate"})
            == 413
        )


def long_lists(server: Served) -> None:
    numbers = json.dumps([0] * 1_000_000).encode()
    for _ in range(5):
        assert posted(server, "/api/v1/ask", numbers) in {400, 413, 422}
        assert posted(server, "/api/v1/ask", b'{"what": "runs", "states": %s}' % numbers) in {400, 413, 422}
        many: bytes = msgpack.packb({"writer": "0" * 32, "first": 1, "payloads": [b""] * 500_000})
        assert posted(server, "/api/v1/ingest", many, "application/msgpack") in {400, 413}


def deep_nests(server: Served) -> None:
    deep = b"[" * 1_000_000
    for body in (deep, b'{"what": ' + deep, b'{"a":' * 500_000, b"[" * 33 + b"]" * 33):
        for _ in range(5):
            assert posted(server, "/api/v1/ask", body) in {400, 422}
    for body in (b"\x91" * 900_000, b"\x81\xa1a" * 300_000):
        assert posted(server, "/api/v1/ingest", body, "application/msgpack") == 400


def slow_headers(server: Served) -> None:
    with contextlib.ExitStack() as stack:
        several = [stack.enter_context(connected(server)) for _ in range(300)]
        for letter in b"GET /api/v1/flows HTTP/1.1\r\nX-Slow: " + b"a" * 60:
            for one in several:
                with contextlib.suppress(OSError):
                    one.sendall(bytes([letter]))


def slow_bodies(server: Served) -> None:
    opening = head(server, "/api/v1/ask", "application/json", f"Content-Length: {1 << 20}")
    with contextlib.ExitStack() as stack:
        several = [stack.enter_context(connected(server)) for _ in range(200)]
        for one in several:
            one.sendall(opening)
        for _ in range(20):
            for one in several:
                with contextlib.suppress(OSError):
                    one.sendall(b"[" * 64)


def endless_headers(server: Served) -> None:
    with connected(server) as one, contextlib.suppress(OSError):
        one.sendall(b"GET / HTTP/1.1\r\n")
        for number in range(2000):
            one.sendall(b"X-%d: %s\r\n" % (number, b"a" * 60_000))


@pytest.mark.parametrize(
    "attack", [huge_bodies, zip_bombs, long_lists, deep_nests, slow_headers, slow_bodies, endless_headers]
)
def test_others_are_answered_and_memory_does_not_grow(
    server: Served, attack: Callable[[Served], None], request: pytest.FixtureRequest
) -> None:
    bystander = Bystander(server)
    bystander.start()
    try:
        attack(server)
        time.sleep(1.0)  # work: what an attack leaves behind is seen after it, too
    finally:
        found = bystander.end()
    keep(f"attack-{attack.__name__.replace('_', '-')}", {"what": "server under attack", **found})
    assert bystander.statuses == {200}
    assert found["grown_bytes"] < MEMORY
    busy = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))  # with others on the machine
    assert found["p99_seconds"] < PATIENCE * busy
    assert server.process.poll() is None


def test_who_asks_nothing_is_sent_away(tmp_path: Path) -> None:
    code = f"import penstock.api.server as server\nserver.HEADER_SECONDS = 0.3\n{COMMAND}"
    with served(tmp_path, code=code) as server, connected(server) as silent, connected(server) as slow:
        slow.sendall(b"GET /api/v1/health HTTP/1.1\r\nX-Slow: ")
        for one in (silent, slow):
            one.settimeout(10)
            assert one.recv(100) == b""
        with server.client() as client:  # one that goes on asking is kept
            for _ in range(30):
                assert client.get("/api/v1/health").status_code == 200


def test_a_server_that_was_attacked_still_records(server: Served, tmp_path: Path) -> None:
    found = batch(story().events, "d" * 32)
    store = HttpStore(tmp_path, server.url, server.token)
    assert store.send(found) == found.last
    store.close()
    assert httpx.get(f"{server.url}/api/v1/ready").status_code == 200
