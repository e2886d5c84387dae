"""`penstock doctor`: does this machine, its record and the runner of your choice work, and with which versions?"""

from __future__ import annotations

import contextlib
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from penstock import errors
from penstock.cli.layout import columns, duration, human_bytes, print_json
from penstock.cli.run import RunnerOption
from penstock.settings import refresh, settings

LIBRARIES = ("penstock", "cloudpickle", "msgpack", "numpy", "dask", "distributed", "ray")
PORTS = {
    8786: "Dask scheduler",
    8787: "Dask dashboard",
    8265: "Ray dashboard",
    6379: "Ray head",
    10001: "Ray client",
}
NAMES_CLUSTER = ("DASK_SCHEDULER_ADDRESS", "DASK_SCHEDULER__ADDRESS", "DASK_SCHEDULER_FILE", "RAY_ADDRESS")
SHARED = Path("/dev/shm")  # noqa: S108 - only looked at
LITTLE = 1 << 30  # bytes of free disk below which runs will soon fail
PROBES = 8  # per slot, so that every worker gets one

Versions = dict[str, str]
_COLOURS = {"ok": "COMPLETED", "note": "", "bad": "FAILED"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes
    ----------
    verdict : {"ok", "note", "bad"}
        Whether it is well, worth knowing, or in the way.
    topic, text : str
        What it is, and what was found.
    """

    verdict: str
    topic: str
    text: str


def doctor(
    runner: RunnerOption = None,
    json: Annotated[bool, typer.Option("--json", help="Write JSON.")] = False,
) -> None:
    """Look at versions, ports, disk, the record, and run a few tasks.

    The exit code is 1 if something is in the way of a run.
    """
    found: list[Finding] = []
    if not json:
        print("looking around; a cluster takes a few seconds to start …", flush=True)
    for finding in (*_machine(), *_record(), *_disks(), *_ports(), *_runner(runner)):
        found.append(finding)
        if not json:
            line = [(finding.verdict, f"{finding.topic:<10}", finding.text)]
            print(
                columns(line, states=[_COLOURS[finding.verdict]])[0].replace("ok  ", "ok    ", 1), flush=True
            )
    if json:
        print_json([asdict(finding) for finding in found])
    raise typer.Exit(int(any(finding.verdict == "bad" for finding in found)))


# -- this machine ---------------------------------------------------------------------------


def own_versions() -> Versions:
    """Return the versions of the libraries that matter, in this process."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _machine() -> Iterator[Finding]:
    own = own_versions()
    listed = ", ".join(f"{name} {number}" for name, number in own.items())
    yield Finding("ok", "driver", listed)
    import psutil

    memory = psutil.virtual_memory()
    text = f"{platform.system()} {platform.machine()}, {len(_cores())} cores for this process, "
    yield Finding(
        "ok", "machine", f"{text}{human_bytes(memory.available)} of {human_bytes(memory.total)} memory free"
    )
    for name in ("dask", "ray"):
        if name not in own:
            yield Finding("note", name, f'not installed: pip install "penstock[{name}]"')
    for name in NAMES_CLUSTER:
        if os.environ.get(name):
            yield Finding("note", "cluster", f"{name} is set to {os.environ[name]}")


def _cores() -> Sequence[int]:
    with contextlib.suppress(AttributeError):  # not on macOS
        return sorted(os.sched_getaffinity(0))
    return range(os.cpu_count() or 1)


def _record() -> Iterator[Finding]:
    from penstock.engine.home import usable_home
    from penstock.engine.spool import spools

    given = settings()
    home = usable_home(given.home)
    yield Finding("note" if home.warning else "ok", "home", home.warning or str(home.path))
    if given.tracking == "off":
        yield Finding("note", "record", "PENSTOCK_TRACKING is off: runs are not recorded")
        return
    if given.api_url:
        yield _server(given.api_url, home.path)
        return
    import sqlalchemy as sa

    from penstock.api.embedded import reading
    from penstock.api.models import flow_runs

    begun = time.perf_counter()
    try:
        with reading(home.path) as connection:
            runs = connection.execute(sa.select(sa.func.count()).select_from(flow_runs)).scalar()
            place = connection.engine.url.render_as_string()
    except (errors.PenstockError, sa.exc.SQLAlchemyError, OSError) as error:
        yield Finding("bad", "record", str(getattr(error, "orig", None) or error))
        return
    left = len(spools(home.path / "spool"))
    waiting = f", {left} processes are writing to it" if left else ""
    yield Finding(
        "ok",
        "record",
        f"{runs} flow runs in {place}, read in {duration(time.perf_counter() - begun)}{waiting}",
    )


def _server(url: str, home: Path) -> Finding:
    """Ask the server that keeps the record; a run goes on without it."""
    from penstock.api.client import Client

    try:
        with Client(url, home=home) as client:
            told, ready = client.version(), client.ready()
    except errors.PenstockError as error:
        waits = f"runs go on, and their events wait in {home / 'spool'}"
        return Finding("note", "record", f"{str(error).rstrip('.')}; {waits}")
    return Finding(
        "ok", "record", f"penstock {told['penstock']} with {told['database']} at {url}: {ready['detail']}"
    )


def _disks() -> Iterator[Finding]:
    import shutil
    import tempfile

    places = {"home": settings().home, "temporary": Path(tempfile.gettempdir()), "shared": SHARED}
    for name, path in places.items():
        there = next((one for one in (path, *path.parents) if one.exists()), None)
        if name == "shared" and not path.exists():
            continue
        if there is not None:
            free = shutil.disk_usage(there).free
            few = " – little: large results and the record need room" if free < LITTLE else ""
            yield Finding(
                "note" if few else "ok", "disk", f"{human_bytes(free)} free in {path} ({name}){few}"
            )


def _ports() -> Iterator[Finding]:
    taken = [f"{port} ({use})" for port, use in PORTS.items() if _answers(port)]
    text = (
        f"in use: {', '.join(taken)}; a cluster started here takes others"
        if taken
        else "the usual ones are free"
    )
    yield Finding("note" if taken else "ok", "ports", text)


def _answers(port: int) -> bool:
    import socket

    with socket.socket() as one:
        one.settimeout(0.2)
        return one.connect_ex(("127.0.0.1", port)) == 0


# -- the runner -----------------------------------------------------------------------------


def _runner(wish: str | None) -> Iterator[Finding]:
    """Start the runner, send tasks to all of its workers, and compare what they answer."""
    from penstock.runners import auto_runner, runner_of

    wish = wish or settings().runner or "auto"
    chosen, sentence = auto_runner() if wish == "auto" else (runner_of(wish), wish)
    begun = time.perf_counter()
    try:
        chosen.open()
    except Exception as error:  # a library that does not even import is a finding, too
        yield Finding("bad", "runner", f"{sentence} cannot be used: {_said(error)}")
        return
    try:
        info = chosen.info
        ready = duration(time.perf_counter() - begun)
        text = f"{sentence}: {info.threads} slots in {info.workers} workers, ready in {ready}"
        yield Finding("ok", "runner", text)
        if info.dashboard:
            yield Finding("ok", "dashboard", info.dashboard)
        answers, seconds = _ask(chosen, PROBES * info.threads)
        yield Finding("ok", "tasks", f"{PROBES * info.threads} tasks and back in {duration(seconds)}")
        scheduler = _scheduler_versions(info.address) if info.name == "dask" else {}
        yield from compared(own_versions(), scheduler, answers)
    except Exception as error:
        yield Finding("bad", "tasks", _said(error))
    finally:
        chosen.close()


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, errors.PenstockError) else f"{type(error).__name__}: {error}"


def _ask(runner: Any, count: int) -> tuple[list[dict[str, Any]], float]:
    """Run tasks that tell where they are; return one answer per process, and how long it took."""
    os.environ["PENSTOCK_TRACKING"] = "off"  # a look around is no run to remember
    refresh()
    from penstock import flow, task

    probe = task(name="doctor")(_probe())

    @flow(name="doctor", task_runner=runner)
    def look_around() -> list[dict[str, Any]]:
        return list(probe.map(range(count)).result())

    begun = time.perf_counter()
    answers = look_around.with_options(task_runner=runner)()
    seconds = time.perf_counter() - begun
    return list({(one["host"], one["pid"]): one for one in answers}.values()), seconds


def _probe() -> Any:
    """Make the function that a worker runs: a closure, which travels by value to workers without penstock."""
    names = LIBRARIES

    def look(_: int) -> dict[str, Any]:
        import os
        import platform
        import shutil
        import socket
        import tempfile
        from importlib.metadata import PackageNotFoundError, version

        found = {"python": platform.python_version()}
        for name in names:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                continue
        folder = tempfile.gettempdir()
        free = shutil.disk_usage(folder).free
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "versions": found,
            "folder": folder,
            "free": free,
        }

    return look


def _scheduler_versions(address: str) -> Versions:
    from distributed import Client

    try:
        with Client(address, timeout=5, set_as_default=False) as client:
            answer = client.get_versions()["scheduler"]
    except (OSError, TimeoutError):
        return {}
    packages = {name: str(number) for name, number in answer["packages"].items() if number}
    packages["python"] = packages.get("python", "").removesuffix(".final.0")
    return {name: packages[name] for name in ("python", *LIBRARIES) if packages.get(name)}


def compared(
    driver: Versions, scheduler: Versions, answers: Sequence[Mapping[str, Any]]
) -> Iterator[Finding]:
    """Say who answered, and which libraries are not the same everywhere."""
    from penstock.runners.versions import compare

    hosts = sorted({str(one["host"]) for one in answers})
    if scheduler:
        yield Finding("ok", "scheduler", ", ".join(f"{name} {number}" for name, number in scheduler.items()))
    groups: dict[tuple[tuple[str, str], ...], int] = {}
    for one in answers:
        key = tuple(sorted(one["versions"].items()))
        groups[key] = groups.get(key, 0) + 1
    for key, count in groups.items():
        listed = ", ".join(
            f"{name} {number}" for name, number in sorted(key, key=lambda one: one[0] != "python")
        )
        yield Finding("ok", "workers", f"{count} on {', '.join(hosts)}: {listed}")
    for row in compare(driver, scheduler, [one["versions"] for one in answers]):
        text = f"{row.library} is {row.driver} in the driver, {row.scheduler} in the scheduler, "
        yield Finding("bad", "versions", f"{text}{row.workers} in the workers; needed: {row.need}")
    for one in answers:
        if one["free"] < LITTLE:
            text = f"{human_bytes(one['free'])} free in {one['folder']} on {one['host']}"
            yield Finding("note", "disk", f"worker {one['pid']}: {text} – little")
            break
