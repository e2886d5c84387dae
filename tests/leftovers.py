"""What a runner still holds for a session: values, work and files, by the back end's own account.

Every function answers with a list of texts; empty means that nothing is left.
"""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from penstock.engine.calls import TaskRun
from penstock.engine.session import Session
from penstock.runners.base import TaskRunner
from penstock.runners.shared_memory import default_roots

OWN_FILES = ("proof",)  # of the directories themselves


def shared_files() -> set[str]:
    """Return the files that hold values of this process and of those that it has started."""
    here = psutil.Process()
    family = {str(one.pid) for one in [here, *here.children(recursive=True)]}
    found: set[str] = set()
    for root in default_roots():
        for directory in Path(root).glob("penstock-*"):
            if directory.is_dir() and directory.name.split("-")[1] in family:
                found.update(str(one) for one in directory.rglob("*") if one.is_file())
    return {one for one in found if Path(one).name not in OWN_FILES}


def of_session(session: Session) -> list[str]:
    """Say what the tables of a session hold, and which of its runs are still there."""
    tables: dict[str, Any] = {
        "live runs": session.live,
        "sent": session.dispatch.sent,
        "buffer": session.buffer._runs,
        "packers": session.buffer._packers,
        "quarantine": [*session.quarantine._waiting, *session.quarantine._apart, *session.quarantine._next],
        "inbox": session.inbox,
        "remaking": session.remaking,
        "frozen arguments": session.objects._frozen,
        "origins of arguments": list(session.objects._origins),
        "made values": [key for key in list(session.made._runs) if session.made.find(key)],
    }
    left = [f"{name}: {list(table)[:3]}" for name, table in tables.items() if len(table)]
    return left + [f"a run: {run!r}" for run in runs_of(session)]


def runs_of(session: Session) -> list[TaskRun]:
    """Return the runs of a session that are still in memory."""
    return [one for one in gc.get_objects() if type(one) is TaskRun and one.session is session]


def of_runner(runner: TaskRunner, session: Session) -> list[str]:
    """Say what a runner still holds of a session."""
    return _ACCOUNTS[runner.name](runner, session.tag)


# -- one account for each back end --------------------------------------------------------------------


def _of_sequential(runner: Any, tag: str) -> list[str]:
    del runner, tag  # it keeps nothing: a value hangs on its reference, which hangs on its run
    return []


def _of_threads(runner: Any, tag: str) -> list[str]:
    with runner._work:
        queued = [key for key in runner._queued if key[0].endswith(tag)]
        waiting = [one.key for *_, one, _ in runner._queue if one.key[0].endswith(tag)]
    return [f"queued: {one}" for one in [*queued, *waiting]]


def _of_processes(runner: Any, tag: str) -> list[str]:
    schedule = runner._pool._schedule
    works = [f"work: {key}" for key in list(schedule._works) if key[0].endswith(tag)]
    return works + [f"file: {path}" for path in sorted(schedule.files)]


def _of_dask(runner: Any, tag: str) -> list[str]:
    def tasks(dask_scheduler: Any) -> list[str]:
        own = [key for key in dask_scheduler.tasks if isinstance(key, tuple)]
        return [
            f"{key} {dask_scheduler.tasks[key].state}"
            for key in own
            if str(key[0]).endswith(tag) or str(key[0]).startswith("put-")
        ]

    def data() -> list[str]:
        from distributed import get_worker

        return [str(key) for key in get_worker().data if isinstance(key, tuple) and str(key[0]).endswith(tag)]

    client = runner.client
    left = [f"scheduler: {one}" for one in client.run_on_scheduler(tasks)]
    for worker, keys in client.run(data, on_error="ignore").items():
        left += [f"{worker}: {key}" for key in keys]
    left += [f"client: {key}" for key in list(client.futures) if tag in str(key)]
    left += [f"outstanding: {key}" for key in runner._watch.outstanding if key[0].endswith(tag)]
    if runner._placement is not None:
        left += [f"put: {key}" for key in runner._placement._in_use if key[0].endswith(tag)]
    return left


def _of_ray(runner: Any, tag: str) -> list[str]:
    pump = runner._pump
    left = [f"in flight: {flight.handle.key}" for flight in list(pump._flying.values())]
    left += [f"not started: {key}" for key in list(pump._unstarted) if key[0].endswith(tag)]
    handles = [one for one in gc.get_objects() if type(one).__name__ == "Handle" and hasattr(one, "note")]
    left += [
        f"reference: {one.key}"
        for one in handles
        if (one.key[0].endswith(tag) or one.key[0] == "put") and one.value is not None
    ]
    return left


_ACCOUNTS: dict[str, Callable[[Any, str], list[str]]] = {
    "sequential": _of_sequential,
    "threads": _of_threads,
    "processes": _of_processes,
    "dask": _of_dask,
    "ray": _of_ray,
}
