"""The process of a server: a socket, uvicorn on it, and a note in the home that says where it is."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import logging
import os
import signal
import socket
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from penstock.api.app import create_app
from penstock.api.local_runs import LocalRuns
from penstock.api.note import remove_note, write_note
from penstock.api.service import Service
from penstock.engine import destination
from penstock.errors import ConfigurationError

__all__ = ["HOST", "PORT", "serve"]

HOST = "127.0.0.1"
PORT = 4270
DRAIN_SECONDS = 10
CONNECTIONS = 512
HEADER_SECONDS = 10.0  # to ask something, at least; twice that at most


def serve(
    home: Path,
    host: str = HOST,
    port: int = PORT,
    hosts: Sequence[str] = (),
    tell: Callable[[str], None] = lambda text: None,
    *,
    local_runs: bool = False,
) -> None:
    """Serve a home until SIGTERM or Ctrl-C; what was taken by then is committed.

    Parameters
    ----------
    home : Path
        Whose store to serve.
    host : str
        Address to listen at.
    port : int
        0 takes one that is free.
    hosts : sequence of str
        Names by which the server may be addressed besides those of this machine.
    tell : callable
        Gets the text that says where the server is and how to log in, once it answers.
    local_runs : bool
        Start runs on this machine when somebody asks for them to go on; only where nobody else can
        reach the server.

    Raises
    ------
    ConfigurationError
        If the address cannot be used, others could reach the server without `hosts`, or ask it to
        start runs, or another server has the home.
    """
    if local_runs and not _is_loopback(host):
        raise ConfigurationError(
            f"--allow-local-runs lets whoever asks start code on this machine, and --host {host} lets other machines "
            "ask: leave out one of the two."
        )
    if not _is_loopback(host) and not hosts:
        raise ConfigurationError(
            f"--host {host} lets other machines in: name this one as they will address it, with --allowed-host NAME."
        )
    with contextlib.closing(_bound(host, port)) as listening:
        service = Service(home)
        try:
            service.prepare()
            app = create_app(service, hosts=[*hosts, *([] if _is_anywhere(host) else [_as_host(host)])])
        except BaseException:
            service.close()
            raise
        url = f"http://{_as_host('127.0.0.1' if _is_anywhere(host) else host)}:{listening.getsockname()[1]}"
        service.store.destinations.add(destination.server(url))  # what drivers of this home left for it
        service.local_runs = LocalRuns(service, url) if local_runs else None
        write_note(home, url)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,  # a path may hold the key of a login link
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=DRAIN_SECONDS,
            timeout_keep_alive=30,
            limit_concurrency=CONNECTIONS,
            ws="none",
            http=_Protocol,
        )
        _calm_collector()
        try:
            _Server(config, service, url, app.state.keyring.link(), tell).run(sockets=[listening])
        finally:
            remove_note(home)
            service.close()


def _calm_collector() -> None:
    """Look for garbage in circles more rarely: a batch makes 100,000 objects, none of them in a circle.

    With Python's own thresholds these looks take a sixth of the time of an ingest.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


class _Protocol(H11Protocol):
    """HTTP in pure Python, whose headers have a limit, and which waits for nobody who only dribbles."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to watch a connection."""
        super().connection_made(transport)
        self._idle_with: object = self
        self._watch()

    def _watch(self) -> None:
        if self.transport.is_closing():
            return
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self._idle_with is self.cycle:  # nothing was asked since the last look
            self.transport.close()
            return
        self._idle_with = self.cycle if idle else self
        self.loop.call_later(HEADER_SECONDS, self._watch)


class _Server(uvicorn.Server):
    """Ends streams as soon as it is asked to stop: they would go on for ever."""

    def __init__(
        self, config: uvicorn.Config, service: Service, url: str, key: str, tell: Callable[[str], None]
    ) -> None:
        super().__init__(config)
        self._service = service
        self._url = url
        self._key = key
        self._tell = tell

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say how to get in."""
        await super().startup(sockets=sockets)
        if self.started:
            self._tell(
                f"penstock serves {self._service.home} at {self._url} (pid {os.getpid()})\n"
                f"  drivers and commands:  export PENSTOCK_API_URL={self._url}\n"
                f"  a browser, once:       {self._url}/login?key={self._key}"
            )

    def handle_exit(self, sig: int, frame: types.FrameType | None) -> None:
        """Stop."""
        self._service.stopping.set()
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while it serves; unlike uvicorn, do not raise them again: a drained stop is no failure."""
        before = {one: signal.signal(one, self.handle_exit) for one in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)


def _bound(host: str, port: int) -> socket.socket:
    address = host.strip("[]")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((address, port))
        listening.listen(1024)  # before anybody is told of it
        listening.set_inheritable(False)
    except (OSError, OverflowError) as error:
        listening.close()
        raise ConfigurationError(
            f"The server cannot listen at {host}, port {port} ({getattr(error, 'strerror', None) or error}): choose "
            "another with --port, or stop what has it."
        ) from None
    return listening


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _is_anywhere(host: str) -> bool:
    return host.strip("[]") in {"0.0.0.0", "::", ""}  # noqa: S104 - compared, not bound


def _as_host(host: str) -> str:
    bare = host.strip("[]")
    return f"[{bare}]" if ":" in bare else bare


def log_to_stderr() -> None:
    """Write what the server has to say where its starter sees it."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("penstock", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
