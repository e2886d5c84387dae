"""What a flow that is tried again remembers of its last attempt: completed runs whose results are stored."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from penstock.engine.states import State, StateType
from penstock.engine.summary import describe_all
from penstock.runners import worker_runtime

if TYPE_CHECKING:
    from penstock.engine.calls import TaskRun
    from penstock.engine.context import Scope

Key = tuple[str, str, int]


class Recollection:
    """The runs of the attempts of one flow run, by task, arguments and number.

    A call of the new attempt is that of the old one if task and description of its arguments are the
    same, and as many such calls came before it. Only what the flow's own code calls is remembered.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._runs: dict[Key, TaskRun] = {}
        self._before: dict[Key, TaskRun] = {}
        self._flows: dict[Key, State] = {}

    def begin(self) -> None:
        """Another attempt starts."""
        with self._lock:
            self._counts.clear()
            self._before.update(self._runs)
            self._runs.clear()

    def _key(self, name: str, parameters: Mapping[str, Any], number: int | None = None) -> Key:
        text = repr(sorted(describe_all(dict(parameters)).items()))
        if number is not None:
            return name, text, number
        self._counts[name, text] += 1
        return name, text, self._counts[name, text]

    def restored(self, run: TaskRun, scope: Scope, parameters: Mapping[str, Any]) -> bool:
        """Give a new run the stored result of its predecessor, if there is one; remember the run."""
        if worker_runtime.current() is not None:
            return False
        with self._lock:
            key = self._key(f"{run.task.name}", parameters)
            old = self._before.get(key)
            self._runs[key] = run
        return _restore(run, old, scope)

    def restored_elements(
        self, runs: list[TaskRun], scope: Scope, parameters: Mapping[str, Any]
    ) -> list[TaskRun]:
        """Do the same for the elements of a map; return those that have to run."""
        if worker_runtime.current() is not None or not runs:
            return runs
        with self._lock:
            name, text, number = self._key(f"map {runs[0].task.name}", parameters)
            pairs = []
            for run in runs:
                key = (f"{name} {number}", text, run.index)
                pairs.append((run, self._before.get(key)))
                self._runs[key] = run
        return [run for run, old in pairs if not _restore(run, old, scope)]

    # -- child flows ------------------------------------------------------------------------------
    def flow_key(self, name: str, parameters: Mapping[str, Any]) -> Key:
        """Return the key of the next call of a child flow."""
        with self._lock:
            return self._key(f"flow {name}", parameters)

    def keep_flow(self, key: Key, state: State) -> None:
        """A child flow whose result is to persist has completed."""
        with self._lock:
            self._flows[key] = state

    def flow(self, key: Key) -> State | None:
        """Return how a child flow completed in an earlier attempt."""
        with self._lock:
            return self._flows.get(key)


def _restore(run: TaskRun, old: TaskRun | None, scope: Scope) -> bool:
    """Let a run be over, with what another has stored."""
    if old is None or not old.completed or old.stored is None:
        return False
    session = scope.session
    session.hold([run], scope)
    with session.changing():
        run.ref, run.place, run.value = old.ref, old.place, old.value
        run.nbytes, run.stored, run.worker = old.nbytes, old.stored, old.worker
        session.settle(run, StateType.COMPLETED, "Cached", f"Restored from task run {old.id}.")
    return True
