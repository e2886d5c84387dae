"""What travels with the work orders of a session, packed once: functions, and what code finds around itself."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

from penstock.engine import lookups, payload, run_context, seeds
from penstock.engine.calls import ByFlow, FlowRun, TaskRun
from penstock.engine.context import Scope
from penstock.engine.results import ResultOptions
from penstock.runners.base import TaskRunner


class Luggage:
    """Packs for one session what its work orders need.

    Parameters
    ----------
    runner : TaskRunner
        What it travels with.
    """

    def __init__(self, runner: TaskRunner) -> None:
        self._runner = runner
        # A nested flow run that has ended is gone with its runs: its row holds what it returned.
        self._prints: ByFlow[bool] = ByFlow()
        self._results: ByFlow[tuple[Any, ...]] = ByFlow()
        self._abouts: ByFlow[tuple[int, bytes]] = ByFlow()
        self._parameters: ByFlow[str | None] = ByFlow()
        # The function is kept, so that its id stays its own.
        self._functions: dict[int, tuple[Any, bytes]] = {}
        self._chains: dict[tuple[int, ...], tuple[list[bytes], bytes]] = {}

    def context_of(self, scope: Scope) -> dict[str, Any]:
        """Return the primitives that travel with a work order, for nested code."""
        flow = scope.flow_run
        return {
            "root": flow.root if flow else "",
            "flow_run": flow.id if flow else "",
            "flow_run_name": flow.name if flow else "",
            "flow": flow.flow.name if flow else "",
            "depth": scope.depth + 1,
            "seed": seeds.seed_around(scope),
            "prints": scope.log_prints,
            "runner": self._runner.inside(),
            "results": self._results_of(flow),
            "about": self._about(flow),
            "parameters": self._parameters_of(flow),
        }

    def _about(self, flow: FlowRun | None) -> bytes:
        """Return what `run_context` tells of a flow run in another process; packed once per attempt."""
        if flow is None or self._runner.in_process:
            return b""
        found = self._abouts.get(flow)
        if found is None or found[0] != flow.position.attempt:
            found = self._abouts[flow] = (flow.position.attempt, run_context.pack_flow(flow))
        return found[1]

    def _parameters_of(self, flow: FlowRun | None) -> str | None:
        if flow not in self._parameters:
            self._parameters[flow] = lookups.parameters_digest(flow) if flow is not None else None
        return self._parameters[flow]

    def _results_of(self, flow: FlowRun | None) -> tuple[Any, ...]:
        packed = self._results.get(flow)
        if packed is None:
            packed = self._results[flow] = (flow.results if flow else ResultOptions()).pack()
        return packed

    def function(self, task: Any) -> Any:
        """Return a task's function as the runner needs it; pickled once per session."""
        if self._runner.in_process:
            return task.fn
        found = self._functions.get(id(task.fn))
        if found is None:
            found = self._functions[id(task.fn)] = (task.fn, payload.pack_function(task.fn))
        return found[1]

    def predicate(self, task: Any) -> Any:
        """Return what asks whether a run of a task is to be skipped, as the runner needs it."""
        ask = task.options.skip_if
        if ask is None or self._runner.in_process:
            return ask
        found = self._functions.get(id(ask))
        if found is None:
            found = self._functions[id(ask)] = (ask, payload.pack_function(ask))
        return found[1]

    def functions(self, packed: Sequence[bytes]) -> bytes:
        """Return the functions of a chunk as one; the same bytes for the same functions."""
        if len(packed) == 1:
            return packed[0]
        names = tuple(map(id, packed))
        found = self._chains.get(names)
        if found is None:
            found = self._chains[names] = (list(packed), pickle.dumps(list(packed), 4))
        return found[1]

    def prints_of(self, run: TaskRun) -> bool:
        """Whether the prints of a run go to its log."""
        wished = run.task.options.log_prints
        return bool(wished if wished is not None else self._prints[run.flow_run])

    def note(self, scope: Scope) -> None:
        """Remember of a flow run what its runs need to know when it is gone."""
        if scope.flow_run not in self._prints:
            self._prints[scope.flow_run] = scope.log_prints
