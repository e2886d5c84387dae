"""The store on a server: what a driver's sender and its questions talk to when ``PENSTOCK_API_URL`` is set.

Nothing counts as committed before the server has said so in a form that only it can give: a proxy
that answers 200 to everything loses nothing. What the server can never take is set aside, so that
it holds up nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgpack

from penstock.api.connection import Answer, Connection, ServerError, Unreachable
from penstock.engine import destination
from penstock.engine.events import Event, pack
from penstock.engine.sender import StoreUnusable
from penstock.engine.spool import (
    HEADER,
    Batch,
    SpoolReader,
    _crc,
    mend,
    remove,
    spools,
    take_orphan,
)
from penstock.errors import ConfigurationError
from penstock.settings import settings

__all__ = ["HttpStore"]

logger = logging.getLogger("penstock.tracking")

PIECE = (1 << 20) - (16 << 10)  # bytes of a request, with room for the frame around the events
FRAME = 9  # bytes that msgpack puts around an event at most
SWEEP = 2.0  # seconds between two looks for what dead drivers left
ROUND = 0.5  # seconds for these at a time
NEVER = frozenset({400, 413, 422})
"""Statuses that a batch will get for ever; all others pass."""

_NOBODY = "0" * 32


class HttpStore:
    """Sends events to a server and asks it.

    Parameters
    ----------
    home : Path
        Whose dead drivers' spools are sent, too.
    url : str
        Address of the server.
    token : str, optional
        Instead of the one in the settings or the home.
    """

    def __init__(self, home: Path, url: str, token: str | None = None) -> None:
        try:
            self._sending = Connection(url, token, home)
            self._asking = Connection(url, token, home)
        except ConfigurationError as error:
            raise StoreUnusable(str(error)) from error
        self.home = home
        self.rejected = 0
        self._set_aside: set[tuple[str, int]] = set()
        self._swept = 0.0

    # -- the seam ---------------------------------------------------------------------------
    def send(self, batch: Batch) -> int:
        """Commit a batch; return up to which event everything of its writer is committed."""
        committed = self._send(batch)
        if committed >= batch.last and time.monotonic() - self._swept >= SWEEP:
            with contextlib.suppress(ServerError, OSError):  # ours is done; theirs can wait
                self.sweep(time.monotonic() + ROUND)
            self._swept = time.monotonic()
        return committed

    def ask(self, question: Mapping[str, Any]) -> Any:
        """Answer a question about the record."""
        return self._asking.ask("POST", "/tell", dict(question))["answer"]

    def close(self) -> None:
        """Close the connections."""
        self._sending.close()
        self._asking.close()

    def sweep(self, deadline: float | None = None) -> bool:
        """Send what dead drivers of this home left for this server, and remove it; False if it took too long."""
        for path in spools(self.home / "spool", destination.server(self._sending.url)):
            if deadline is not None and time.monotonic() > deadline:
                return False
            orphan = take_orphan(path)
            if orphan is not None:
                try:
                    if not self._send_orphan(path, deadline):
                        return False
                finally:
                    orphan.release()
        return True

    # -- batches ----------------------------------------------------------------------------
    def _send(self, batch: Batch) -> int:
        committed = batch.first - 1
        for piece in pieces(batch):
            committed = self._send_piece(piece)
            if committed < piece.last:
                break
        return committed

    def _send_piece(self, batch: Batch) -> int:
        answer = self._post(batch)
        if answer.status in NEVER:
            return self._refused(batch, answer.status)
        return self._acknowledged(batch, answer)

    def _post(self, batch: Batch) -> Answer:
        body = msgpack.packb({"writer": batch.writer, "first": batch.first, "payloads": batch.payloads})
        headers = {"Content-Type": "application/msgpack"}
        if len(body) > 1 << 20:
            body = zlib.compress(body, 1)
            headers["Content-Encoding"] = "deflate"
        return self._sending.request("POST", "/ingest", body, headers)

    def _acknowledged(self, batch: Batch, answer: Answer) -> int:
        if answer.status != 200:
            raise self._sending.refusal(answer)
        try:
            found = answer.json()
            echoed = found["writer"] == batch.writer and found["last"] == batch.last
            committed = found["acked_seq"]
            if echoed and type(committed) is int and committed >= 0:
                return min(committed, batch.last)
        except (ValueError, KeyError, TypeError):
            pass
        raise Unreachable(
            f"what answers at {self._sending.url} is no penstock server: it acknowledged nothing"
        )

    def _refused(self, batch: Batch, status: int) -> int:
        """Find the event that the server refuses, and set it aside."""
        if len(batch.payloads) > 1:
            middle = len(batch.payloads) // 2
            committed = self._send_piece(Batch(batch.writer, batch.first, batch.payloads[:middle]))
            if committed < batch.first + middle - 1:
                return committed
            return self._send_piece(Batch(batch.writer, batch.first + middle, batch.payloads[middle:]))
        news = (batch.writer, batch.first) not in self._set_aside
        if news:
            self._put_aside(batch)
        body = {"bytes": len(batch.payloads[0]), "status": status}
        note = pack(Event("rejected", _NOBODY, _NOBODY, time.time(), body))  # there must be no gap
        committed = self._acknowledged(batch, self._post(Batch(batch.writer, batch.first, [note])))
        if news:
            self.rejected += 1
            where = self._beside(batch.writer)
            logger.warning("The server can never take one event (%s); it is kept in %s.", status, where)
        return committed

    def _beside(self, writer: str) -> Path:
        return self.home / "spool" / f"{writer}.rejected"

    def _put_aside(self, batch: Batch) -> None:
        payload = batch.payloads[0]
        handle = os.open(
            self._beside(batch.writer), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
        with os.fdopen(handle, "ab") as file:
            file.write(HEADER.pack(len(payload), _crc(payload, batch.first)) + payload)
            file.flush()
            os.fsync(file.fileno())
        self._set_aside.add((batch.writer, batch.first))

    # -- what others left -------------------------------------------------------------------
    def _send_orphan(self, path: Path, deadline: float | None) -> bool:
        """Send a dead writer's spool, whose lock we hold; False if it is not finished."""
        reader = SpoolReader(path)
        with contextlib.closing(reader):
            while (batch := reader.read()).payloads:
                committed = self._send(batch)
                if committed != batch.last:
                    reader.seek(committed)
                if committed < batch.first:
                    return False
                if deadline is not None and time.monotonic() > deadline:
                    return False
            if reader.foreign:
                return True
            if mend(path, reader) and reader.damaged:
                logger.warning(
                    "A spool was damaged; what cannot be read is in %s.", path.with_suffix(".rejected")
                )
            remove(path)
        return True


def pieces(batch: Batch) -> Iterator[Batch]:
    """Cut a batch so that each part fits into a request; an event larger than that travels alone."""
    first, size = 0, 0
    for place, payload in enumerate(batch.payloads):
        length = len(payload) + FRAME
        if place > first and size + length > PIECE:
            yield Batch(batch.writer, batch.first + first, batch.payloads[first:place])
            first, size = place, 0
        size += length
    if first < len(batch.payloads):
        yield Batch(batch.writer, batch.first + first, batch.payloads[first:])


def open_store(home: Path) -> HttpStore:
    """Open the store at the address in the settings."""
    return HttpStore(home, settings().api_url)


def drain(home: Path, url: str, deadline: float) -> bool:
    """Send a server what dead drivers of a home left for it; False if there was no time for all."""
    with contextlib.closing(HttpStore(home, url)) as store:
        return store.sweep(deadline)


def ask_note(home: Path, note: Mapping[str, Any], question: Mapping[str, Any]) -> Any:
    """Ask the server that holds this home; see `penstock.api.note`."""
    with contextlib.closing(HttpStore(home, note["url"])) as store:
        return store.ask(question)
