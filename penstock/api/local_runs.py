"""Runs that a server starts: each as a process of its own, `penstock resume ID`, never inside the server.

That process calls code of the user with the rights of the account, so a server does it only where
whoever started it has allowed it. The process is in a session of its own and outlives the server.
What became of it is always told: by the run itself as soon as it goes on, and before that by an
event that is written when its process is started, and by another one when it has ended without
having taken the run. Nothing is ever left merely asked for.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from penstock.api import leases
from penstock.api.ingest import ingest
from penstock.api.models import flow_runs
from penstock.api.past import entry_of
from penstock.engine.events import HOST, Event, new_id, pack
from penstock.engine.spool import Batch
from penstock.errors import ConfigurationError, RunOwnedElsewhere

if TYPE_CHECKING:
    from penstock.api.service import Service

__all__ = ["DIRECTORY", "LocalRuns", "Started", "log_path"]

logger = logging.getLogger("penstock.server")

DIRECTORY = "resumed"
MOST = 8  # processes at a time
LOGS = 100  # files of output that are kept
TAIL = 4096  # bytes of output that are looked at for the last line
SAID = 300  # characters of it that are told
WRITE_SECONDS = 10.0  # for one event to be committed
WRITE_PAUSE = 2.0
CODE = "from penstock.cli import main; main()"
# What would send the record of the run elsewhere, or nowhere, or its tasks to where only the server's own go.
DROPPED = ("API_TOKEN", "API_URL", "DATABASE_URL", "HOME", "RUNNER", "TRACKING", "UI_URL")


@dataclass(frozen=True, slots=True)
class Started:
    """A process that was started.

    Attributes
    ----------
    request : str
        Id of the request, which is settled already.
    pid : int
        Of the process.
    log : str
        File in the home to which its output goes.
    """

    request: str
    pid: int
    log: str


@dataclass(frozen=True, slots=True)
class _Candidate:
    run: str
    name: str
    epoch: int
    directory: Path | None


@dataclass(frozen=True, slots=True)
class _Told:
    """What somebody asked for, as the record knows it."""

    candidate: _Candidate
    action: str
    request: str


@dataclass(frozen=True, slots=True)
class _Child:
    told: _Told
    process: subprocess.Popen[bytes]


class LocalRuns:
    """The processes that a server has started for runs.

    Parameters
    ----------
    service : Service
        Whose home and database they use.
    url : str
        Where they find the server.
    """

    def __init__(self, service: Service, url: str) -> None:
        self._service = service
        self._url = url
        self._gate = threading.Lock()
        self._children: dict[str, _Child] = {}

    def start(self, run: str, action: str, by: str) -> Started:
        """Start `penstock resume` for a run that has ended.

        Parameters
        ----------
        run : str
            A root flow run that is Crashed, Failed or Cancelled.
        action : str
            What was asked for: "resume" or "retry", which do the same.
        by : str
            Who asks, as people will read it.

        Raises
        ------
        ConfigurationError, RunOwnedElsewhere
            If the run cannot go on, or not here: one sentence says why.
        Unavailable
            If the database takes nothing now; then nothing was started.
        """
        with self._gate:
            self._refuse_more(run)
            with self._service.read() as connection:
                candidate = _candidate(connection, run)
            told = _Told(candidate, action, new_id())
            log = log_path(self._service.home, run)
            self._announce(told, by, log.name)
            try:
                process = _spawn(self._service.home, self._url, candidate, log)
            except OSError as error:
                outcome = f"not started: {error.strerror or error}"
                self._in_background(lambda: self._tell(told, outcome, f"It was {outcome}.", "ERROR"))
                raise ConfigurationError(f"{candidate.name} was {outcome}.") from error
            self._children[run] = child = _Child(told, process)
        self._in_background(lambda: self._watch(child))
        return Started(told.request, process.pid, f"{DIRECTORY}/{log.name}")

    def _refuse_more(self, run: str) -> None:
        child = self._children.get(run)
        if child is not None:
            raise RunOwnedElsewhere(
                f"{child.told.candidate.name} is being resumed already, by pid {child.process.pid} on {HOST}."
            )
        if len(self._children) >= MOST:
            raise ConfigurationError(
                f"{MOST} runs go on in processes of this server already; wait for one of them, or type "
                f"`penstock resume {run}`."
            )

    # -- what the record gets to know -------------------------------------------------------
    def _announce(self, told: _Told, by: str, log: str) -> None:
        run = told.candidate.run
        line = (
            f"{by[:200]} asked to {told.action} it; the server on {HOST} starts `penstock resume {run}`, whose output "
            f"goes to {DIRECTORY}/{log} in PENSTOCK_HOME."
        )
        try:
            self._tell(told, f"started by the server on {HOST}", line, "INFO")
        except TimeoutError:  # it may be committed after all
            outcome = "not started: the database took nothing in time"
            self._in_background(lambda: self._tell(told, outcome, f"It was {outcome}.", "ERROR"))
            raise

    def _tell(self, told: _Told, outcome: str, line: str, level: str) -> None:
        now, run, epoch = time.time(), told.candidate.run, told.candidate.epoch
        body = {"id": told.request, "what": told.action, "outcome": outcome}
        events = [
            Event("request", run, run, now, body, epoch),
            Event("log", run, run, now, {"lines": [[now, level, line]], "dropped": 0}, epoch),
        ]
        batch = Batch(secrets.token_hex(16), 1, [pack(event) for event in events])
        self._service.writer.call(lambda database: ingest(database, [batch])).result(WRITE_SECONDS)

    def _in_background(self, work: Callable[[], None]) -> None:
        """Do something until it succeeds or the server stops: the database may be away."""

        def insist() -> None:
            while not self._service.stopping.is_set():
                try:
                    work()
                except Exception as error:
                    logger.debug("what became of a run is told later: %s", error)
                    self._service.stopping.wait(WRITE_PAUSE)
                else:
                    return

        threading.Thread(target=insist, name="penstock-local-run", daemon=True).start()

    def _watch(self, child: _Child) -> None:
        """Say what a process left unsaid that ended before its run went on."""
        code = child.process.wait()
        told, run = child.told, child.told.candidate.run
        with self._gate:
            if self._children.get(run) is child:
                del self._children[run]
        with self._service.read() as connection:
            row = connection.execute(sa.select(flow_runs.c.epoch).where(flow_runs.c.id == run)).one_or_none()
            lease = leases.find(connection, [run]).get(run)
        if row is None or row.epoch > told.candidate.epoch:
            return  # it is forgotten; or it went on, and speaks for itself
        ended = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        last = _last_line(log_path(self._service.home, run))
        outcome = f"its process (pid {child.process.pid}) {ended} before the run went on"
        outcome += f": {last}" if last else ""
        epoch = max(row.epoch, lease.epoch if lease is not None else 1)
        present = replace(told, candidate=replace(told.candidate, epoch=epoch))
        self._tell(present, outcome, f"Not resumed: {outcome}", "ERROR")


# -- what can be started --------------------------------------------------------------------


def _candidate(connection: sa.Connection, run: str) -> _Candidate:
    row = connection.execute(sa.select(flow_runs).where(flow_runs.c.id == run)).one_or_none()
    if row is None or row.root != run:
        raise ConfigurationError(f"{run} is no root flow run; resume the run that it is part of.")
    name = str(row.name or run)
    if row.state_type in {"COMPLETED", "SKIPPED"}:
        raise ConfigurationError(f"{name} has {row.state_type.lower()}; there is nothing to resume.")
    if row.rank == 0:
        raise leases.elsewhere(run, row.host, row.pid)
    entry = entry_of(connection, run)
    place = entry.get("place")
    if "obstacle" in entry or not isinstance(place, str) or not place:
        reason = entry.get("obstacle", "nothing is known of how it was started")
        raise ConfigurationError(f"{name} cannot be resumed: {reason}.")
    if row.host != HOST:
        raise ConfigurationError(f"{name} ran on {row.host}; type `penstock resume {run}` there.")
    if not Path(place).is_file():
        raise ConfigurationError(f"{name} cannot be resumed: its code, {place}, is gone.")
    lease = leases.find(connection, [run]).get(run)
    return _Candidate(run, name, max(row.epoch, lease.epoch if lease is not None else 1), _directory(entry))


def _directory(entry: dict[str, Any]) -> Path | None:
    given = entry.get("cwd")
    return Path(given) if isinstance(given, str) and given and Path(given).is_dir() else None


# -- the process ----------------------------------------------------------------------------


def log_path(home: Path, run: str) -> Path:
    """Return where the output goes of the process that resumed a run last."""
    return home / DIRECTORY / f"{run}.log"


def _spawn(home: Path, url: str, candidate: _Candidate, log: Path) -> subprocess.Popen[bytes]:
    log.parent.mkdir(mode=0o700, exist_ok=True)
    _forget_logs(log.parent)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(log, flags, 0o600), "wb") as out:
        return subprocess.Popen(
            # No shell; -P keeps the working directory of the run from standing before our own modules.
            [sys.executable, "-P", "-c", CODE, "resume", candidate.run],
            cwd=candidate.directory or home,
            env=_environment(home, url),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _environment(home: Path, url: str) -> dict[str, str]:
    dropped = {f"PENSTOCK_{name}" for name in DROPPED}
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {"PENSTOCK_HOME": str(home), "PENSTOCK_API_URL": url, "PENSTOCK_TRACKING": "on"}


def _forget_logs(directory: Path) -> None:
    with contextlib.suppress(OSError):
        files = sorted(directory.glob("*.log"), key=lambda path: path.stat().st_mtime)
        for path in files[: max(0, len(files) - LOGS + 1)]:
            path.unlink()


def _last_line(path: Path) -> str:
    """Return the last line that a process wrote, as text that can be shown."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            lines = file.read().decode("utf-8", "replace").split("\n")
    except OSError:
        return ""
    written = [text for line in lines if (text := _printable(line).strip())]
    return written[-1].removeprefix("penstock: ")[:SAID] if written else ""


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)
