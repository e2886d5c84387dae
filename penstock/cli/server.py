"""`penstock server`: start, stop and look at the server of this machine's record."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from penstock.cli.layout import duration, print_json, stop

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

START_SECONDS = 30.0
STOP_SECONDS = 30.0
POLL = 0.05
LIBRARIES = ("fastapi", "uvicorn")

HostOption = Annotated[str, typer.Option("--host", help="Address to listen at.")]
PortOption = Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")]
AllowedOption = Annotated[
    list[str] | None,
    typer.Option("--allowed-host", help="A name by which other machines address this one. Repeat it."),
]
LocalRunsOption = Annotated[
    bool | None,
    typer.Option(
        "--allow-local-runs/--no-local-runs",
        help="Let the API start `penstock resume` on this machine; PENSTOCK_SERVER_ALLOW_LOCAL_RUNS by default, off.",
        show_default=False,
    ),
]
BackgroundOption = Annotated[bool, typer.Option("--background", help="Return once the server answers.")]


def _running(home: Path) -> Any:
    """Return the note of the server that holds a home; None if none does."""
    import contextlib

    from penstock.api.embedded import EmbeddedStore
    from penstock.api.note import running

    with contextlib.closing(EmbeddedStore(home)) as store:
        return running(home, store._lock_path)


def _home() -> Path:
    from penstock.engine.home import network_type, usable_home
    from penstock.settings import settings

    given = settings()
    if not given.database_url and (kind := network_type(given.home)):
        stop(
            f"PENSTOCK_HOME {given.home} is on a network file system ({kind}), where a SQLite store is not safe: set "
            "PENSTOCK_HOME to a local directory, or PENSTOCK_DATABASE_URL to a PostgreSQL database.",
            2,
        )
    return usable_home(given.home).path


@app.command("start")
def start(
    host: HostOption = "127.0.0.1",
    port: PortOption = 4270,
    allowed_host: AllowedOption = None,
    background: BackgroundOption = False,
    local_runs: LocalRunsOption = None,
) -> None:
    """Serve the record of this machine to drivers, commands and browsers."""
    import importlib.util

    from penstock.errors import MissingExtra
    from penstock.settings import settings

    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtra(f"The server needs {' and '.join(missing)}: pip install 'penstock[server]'.")
    allowed = settings().server_allow_local_runs if local_runs is None else local_runs
    if background:
        switch = "--allow-local-runs" if allowed else "--no-local-runs"
        _start_in_background(["--host", host, "--port", str(port), switch], allowed_host or [])
        return
    from penstock.api.server import log_to_stderr, serve

    log_to_stderr()
    serve(
        _home(),
        host,
        port,
        allowed_host or [],
        lambda text: print(text, flush=True),
        local_runs=allowed,
    )


def _start_in_background(arguments: list[str], allowed: list[str]) -> None:
    home = _home()
    if (note := _running(home)) is not None:
        stop(f"a server with pid {note['pid']} serves {home} at {note['url']} already.")
    for name in allowed:
        arguments += ["--allowed-host", name]
    log = home / "server.log"
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "wb") as out:
        code = "from penstock.cli import main; main()"
        process = subprocess.Popen(
            [sys.executable, "-c", code, "server", "start", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            lines = log.read_text(errors="replace").strip().splitlines()
            stop(lines[-1].removeprefix("penstock: ") if lines else f"the server ended; see {log}.")
        text = log.read_text(errors="replace")
        if "/login?key=" in text:
            print(text.rstrip())
            return
        time.sleep(POLL)
    stop(f"the server with pid {process.pid} does not answer yet; see {log}.")


@app.command("stop")
def stop_server() -> None:
    """Stop the server of this machine; it commits first what it has taken."""
    home = _home()
    note = _running(home)
    if note is None:
        print(f"no server serves {home}")
        return
    os.kill(note["pid"], signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline:
        if _running(home) is None:
            print(f"stopped the server with pid {note['pid']}")
            return
        time.sleep(POLL)
    stop(f"the server with pid {note['pid']} is still at work after {STOP_SECONDS:.0f} s.")


@app.command("status")
def status(json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False) -> None:
    """Say whether a server serves this machine's record, and where; exit code 3 if none does."""
    home = _home()
    note = _running(home)
    if note is None:
        if json:
            print_json({"running": False, "home": str(home)})
        else:
            print(f"no server serves {home}")
        raise typer.Exit(3)
    found: dict[str, Any] = {"running": True, "home": str(home), **note, "health": _health(note["url"], home)}
    if json:
        print_json(found)
        return
    print(
        f"pid {note['pid']} serves {home} at {note['url']}, since {duration(time.time() - note['started'])}"
    )
    print(f"  {found['health']}")


def _health(url: str, home: Path) -> str:
    from penstock.api.client import Client
    from penstock.errors import PenstockError

    try:
        return str(Client(url, home=home).ready()["detail"])
    except PenstockError as error:
        return str(error)


@app.command("token")
def token(
    scope: Annotated[str, typer.Option("--scope", help="view, run or admin.")] = "view",
) -> None:
    """Make another token and print it, once; a server that runs takes it at once."""
    from penstock.api.auth import Keyring, Scope

    if scope.upper() not in {"VIEW", "RUN", "ADMIN"}:
        stop(f"--scope {scope!r} must be view, run or admin.", 2)
    print(Keyring(_home()).add(Scope[scope.upper()]))


@app.command("login")
def login() -> None:
    """Print a link that logs a browser in, once."""
    from penstock.api.client import Client

    home = _home()
    note = _running(home)
    if note is None:
        stop(f"no server serves {home}; start one with `penstock server start`.")
    print(f"{note['url']}{Client(note['url'], home=home).login_path()}")
