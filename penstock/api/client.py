"""The client of a server: runs as records, streams as iterators, wishes as calls.

>>> client = penstock.get_client()
>>> pandas.DataFrame(client.task_runs(state="FAILED", limit=1000))
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from penstock.api.connection import Connection, ServerError, Unreachable
from penstock.api.note import is_alive, read_note
from penstock.api.records import FlowRecord, FlowRunRecord, LineRecord, MapRunRecord, TaskRunRecord
from penstock.api.remote import HttpStore, open_store
from penstock.engine.home import usable_home
from penstock.errors import ConfigurationError
from penstock.settings import settings

__all__ = ["Client", "HttpStore", "ServerError", "Unreachable", "get_client", "open_store"]

PAGE = 1000
MAPS_PAGE = 200

States = str | Sequence[str] | None
_Row = TypeVar("_Row")


class Client:
    """Asks a penstock server.

    Methods that list return records of `penstock.api.records`; ``limit=None`` returns all there
    are, page by page. Times are seconds since 1970.

    Parameters
    ----------
    url : str
        Address of the server.
    token : str, optional
        By default the one in the settings, or the one in the home.
    home : Path, optional
        Instead of the one in the settings.
    timeout : float
        Seconds to wait for an answer.

    Raises
    ------
    ConfigurationError
        If the URL is none.
    """

    def __init__(
        self, url: str, token: str | None = None, *, home: Path | None = None, timeout: float = 35.0
    ) -> None:
        self._connection = Connection(url, token, home, timeout)
        self.url = self._connection.url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    # -- lists ------------------------------------------------------------------------------
    def flows(
        self,
        *,
        name: str | None = None,
        sort: Literal["latest", "name", "runs"] = "latest",
        limit: int | None = 200,
    ) -> list[FlowRecord]:
        """List flows, those with `name` in their name."""
        return self._list("/flows", FlowRecord.read, limit, {"name": name, "sort": sort})

    def flow_runs(
        self,
        *,
        flow: str | None = None,
        name: str | None = None,
        state: States = None,
        tag: str | None = None,
        root: str | None = None,
        parent: str | None = None,
        nested: bool = False,
        created_after: float | None = None,
        created_before: float | None = None,
        sort: Literal["newest", "oldest", "name", "longest", "latest_end"] = "newest",
        limit: int | None = 200,
    ) -> list[FlowRunRecord]:
        """List flow runs: of a flow, with a part of a name, in states such as "FAILED", with a tag, in a time."""
        query: dict[str, Any] = {
            "flow": flow,
            "name": name,
            "state": _states(state),
            "tag": tag,
            "root": root,
            "parent": parent,
        }
        query |= {
            "nested": nested,
            "created_after": created_after,
            "created_before": created_before,
            "sort": sort,
        }
        return self._list("/flow-runs", FlowRunRecord.read, limit, query)

    def task_runs(
        self,
        flow_run: str | None = None,
        *,
        root: str | None = None,
        parent: str | None = None,
        map_run: str | None = None,
        task: str | None = None,
        name: str | None = None,
        state: States = None,
        tag: str | None = None,
        worker: str | None = None,
        created_after: float | None = None,
        created_before: float | None = None,
        sort: Literal["newest", "oldest", "name", "longest", "largest", "latest_end"] = "oldest",
        limit: int | None = 200,
    ) -> list[TaskRunRecord]:
        """List task runs: of a flow run, of everything under a root, of a task, of a map, in states."""
        query: dict[str, Any] = {
            "flow_run": flow_run,
            "root": root,
            "parent": parent,
            "map_run": map_run,
            "task": task,
        }
        query |= {"name": name, "state": _states(state), "tag": tag, "worker": worker, "sort": sort}
        query |= {"created_after": created_after, "created_before": created_before}
        return self._list("/task-runs", TaskRunRecord.read, limit, query)

    def map_runs(
        self,
        flow_run: str | None = None,
        *,
        task: str | None = None,
        sort: Literal["oldest", "newest"] = "oldest",
        limit: int | None = 200,
    ) -> list[MapRunRecord]:
        """List maps with how many elements are in which state, and which."""
        query: dict[str, Any] = {"flow_run": flow_run, "task": task, "sort": sort}
        return self._list("/map-runs", MapRunRecord.read, limit, query, MAPS_PAGE)

    def _list(
        self,
        path: str,
        read: Callable[[Any], _Row],
        limit: int | None,
        query: dict[str, Any],
        page: int = PAGE,
    ) -> list[_Row]:
        found: list[_Row] = []
        cursor: str | None = None
        while limit is None or len(found) < limit:
            size = page if limit is None else min(page, limit - len(found))
            answer = self._get(path, {**query, "cursor": cursor, "limit": size})
            found += map(read, answer["items"])
            cursor = answer["following"]
            if cursor is None:
                break
        return found

    # -- one run ----------------------------------------------------------------------------
    def flow_run(self, run: str) -> FlowRunRecord:
        """Return one flow run."""
        return FlowRunRecord.read(self._get(f"/flow-runs/{_id(run)}"))

    def task_run(self, run: str) -> TaskRunRecord:
        """Return one task run."""
        return TaskRunRecord.read(self._get(f"/task-runs/{_id(run)}"))

    def map_run(self, run: str) -> MapRunRecord:
        """Return one map."""
        return MapRunRecord.read(self._get(f"/map-runs/{_id(run)}"))

    def find(self, text: str, *, limit: int = 20) -> list[FlowRunRecord | TaskRunRecord]:
        """Find runs by an id, its first or last digits, or a name."""
        rows = self._get("/find", {"text": text, "limit": limit})
        return [FlowRunRecord.read(row) if row["kind"] == "flow" else TaskRunRecord.read(row) for row in rows]

    def graph(self, flow_run: str) -> dict[str, Any]:
        """Return ``nodes`` and ``edges`` of a flow run; a map is one node."""
        return dict(self._get(f"/flow-runs/{_id(flow_run)}/graph"))

    def tree(self, flow_run: str, *, elements: int = 10) -> dict[str, Any]:
        """Return a flow run with everything in it, arranged by who submitted what."""
        return dict(self._get(f"/flow-runs/{_id(flow_run)}/tree", {"elements": elements}))

    def history(self, run: str) -> list[dict[str, Any]]:
        """Return the states of a run in their order."""
        return list(self._get(f"/runs/{_id(run)}/history"))

    # -- logs and events --------------------------------------------------------------------
    def logs(
        self, run: str, *, level: str | None = None, search: str | None = None, limit: int = 1000
    ) -> list[LineRecord]:
        """Return the latest log lines of a run, of a flow run with those of everything in it."""
        query: dict[str, Any] = {"level": level.upper() if level else None, "search": search, "limit": limit}
        return [LineRecord.read(line) for line in self._get(f"/runs/{_id(run)}/logs", query)["lines"]]

    def follow_logs(
        self, run: str, *, level: str | None = None, search: str | None = None
    ) -> Iterator[LineRecord]:
        """Yield the log lines of a run as they come, after the latest ones; over lost connections, too."""
        query: dict[str, Any] = {"level": level.upper() if level else None, "search": search}
        for kind, data in self._stream(f"/runs/{_id(run)}/logs/stream", query):
            if kind == "line":
                yield LineRecord.read(data)

    def events(self, *, root: str | None = None, logs: bool = False) -> Iterator[dict[str, Any]]:
        """Yield events as they are committed, of one root flow run or of all; none is missed or comes twice.

        A connection that breaks is made anew; only a server that refuses, or does not come back
        for a minute, ends it with an error.
        """
        seen: dict[int, int] = {}
        for kind, event in self._stream("/events", {"root": root, "logs": logs}):
            if kind != "position" and event["seq"] > seen.get(event["writer"], 0):
                seen[event["writer"]] = event["seq"]
                yield event

    def _stream(self, path: str, query: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        from penstock.api.sse import follow

        def opened(last: str | None) -> Iterator[str]:
            headers = {"Last-Event-ID": last} if last is not None else {}
            return self._connection.stream(path, headers, query)

        for kind, data in follow(opened):
            with contextlib.suppress(ValueError):
                yield kind, json.loads(data)

    # -- plots ------------------------------------------------------------------------------
    def activity(
        self,
        *,
        flow_run: str | None = None,
        root: str | None = None,
        task: str | None = None,
        after: float | None = None,
        before: float | None = None,
        bins: int = 60,
    ) -> dict[str, Any]:
        """Return how many task runs started, ended, failed and were running in equal stretches of time."""
        query: dict[str, Any] = {
            "flow_run": flow_run,
            "root": root,
            "task": task,
            "after": after,
            "before": before,
            "bins": bins,
        }
        return dict(self._get("/plots/activity", query))

    def durations(
        self,
        *,
        flow_run: str | None = None,
        root: str | None = None,
        task: str | None = None,
        after: float | None = None,
        before: float | None = None,
    ) -> list[dict[str, Any]]:
        """Return for each task how long its completed runs took, as a histogram."""
        query: dict[str, Any] = {
            "flow_run": flow_run,
            "root": root,
            "task": task,
            "after": after,
            "before": before,
        }
        return list(self._get("/plots/durations", query))

    def states(self) -> dict[str, dict[str, int]]:
        """Return how many flow runs and task runs there are in each state."""
        return dict(self._get("/plots/states"))

    # -- wishes -----------------------------------------------------------------------------
    def set_state(
        self, run: str, action: Literal["cancel", "resume", "retry", "pause"], *, by: str = "client"
    ) -> str:
        """Ask for something to happen to a run; return the id of the request.

        Raises
        ------
        ServerError
            With status 404 if there is no such run, 403 if this server starts no runs, 501 for what cannot
            be done yet.
        RunOwnedElsewhere, ConfigurationError
            If the run is not in a state for it: its driver lives, it has completed, its code is gone.
        """
        body = {"action": action, "by": by}
        return str(self._connection.ask("POST", f"/runs/{_id(run)}/state", body)["request"])

    def cancel(self, run: str) -> str:
        """Ask a flow run, a task run or a map to stop."""
        return self.set_state(run, "cancel")

    def resume(self, run: str, *, by: str = "client") -> str:
        """Let the server go on with a flow run that crashed, failed or was cancelled, in a process of its own.

        Only a server that was started with ``--allow-local-runs`` does so; see `set_state`.
        """
        return self.set_state(run, "resume", by=by)

    # -- the server -------------------------------------------------------------------------
    def version(self) -> dict[str, Any]:
        """Return what answers."""
        return dict(self._get("/version"))

    def ready(self) -> dict[str, Any]:
        """Return whether events are taken now."""
        answer = self._connection.request("GET", "/ready")
        try:
            return dict(answer.json())
        except ValueError:
            raise Unreachable(f"what answers at {self.url} is no penstock server") from None

    def ask(self, what: str, **details: Any) -> Any:
        """Answer a question of `penstock.api.queries` by its name."""
        return self._connection.ask("POST", "/ask", {"what": what, **details})["answer"]

    def login_path(self) -> str:
        """Return the path of a link that logs a browser in, once."""
        return str(self._connection.ask("POST", "/login-link")["path"])

    def _get(self, path: str, query: dict[str, Any] | None = None) -> Any:
        return self._connection.ask("GET", path, None, query)


def get_client(url: str | None = None, token: str | None = None) -> Client:
    """Return a client of a penstock server.

    Parameters
    ----------
    url : str, optional
        By default ``PENSTOCK_API_URL``, or the server that runs on this machine.
    token : str, optional
        By default ``PENSTOCK_API_TOKEN``, or the one in the home.

    Raises
    ------
    ConfigurationError
        If there is no address.
    """
    found = url or settings().api_url
    if not found:
        note = read_note(usable_home(settings().home).path)
        if note is None or not is_alive(note["pid"]):
            raise ConfigurationError(
                "No server is known: start one with `penstock server start`, or set PENSTOCK_API_URL to the address "
                "of one."
            )
        found = note["url"]
    return Client(found, token)


def _states(state: States) -> list[str] | None:
    if state is None:
        return None
    return [one.upper() for one in ([state] if isinstance(state, str) else state)]


def _id(run: str) -> str:
    wanted = str(run).replace("-", "").lower()
    if len(wanted) != 32 or not set(wanted) <= set("0123456789abcdef"):
        raise ConfigurationError(f"{run!r} is no id of a run: 32 hexadecimal digits; `find` takes less.")
    return wanted
