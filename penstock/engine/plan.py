"""The plan that the compiler makes of a flow: what goes together, what is lifted, and why not.

The function of the flow runs, its tasks do not. Calls are captured, connected and compiled as in any
run, for a back end that takes everything and does nothing. Where the flow waits, what it waits for is
taken to go well; a map over a value that is not there yet has a length that only a run can tell
(`sample`). The plan ends where the flow asks for a value, which only a run can give.
"""

from __future__ import annotations

import asyncio
import html
import inspect
import itertools
import os
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.engine import context, parameters, sample
from penstock.engine.calls import FlowRun, TaskRun
from penstock.engine.chunks import Chunk
from penstock.engine.context import Scope
from penstock.engine.graph import sources_of
from penstock.engine.journal import Journal
from penstock.engine.session import Session
from penstock.engine.states import StateType, advance
from penstock.engine.summary import describe, human_bytes
from penstock.runners.base import Key, Ref, RunnerInfo, Submission, TaskRunner
from penstock.runners.worker.arguments import opened
from penstock.runners.worker.coroutines import run_coroutine
from penstock.runners.worker.sizes import size_of

if TYPE_CHECKING:
    from penstock.engine.flow import Flow

_LOOP = str(Path(asyncio.__file__).parent)
TINY = 1e-5
"""Seconds that an element is taken to last where only a pilot could tell."""
UNKNOWN = "(known at run time)"


@dataclass(frozen=True, slots=True)
class Node:
    """A task run or a map in the plan.

    Attributes
    ----------
    task : str
        Name of the task.
    count : int or None
        Elements of a map; None for a single run, and for a map whose length only a run can tell.
    mapped : bool
        Whether it is a map.
    runs : int or None
        Task runs that it stands for: 1, the elements of a map, or the nodes of a tree of `.reduce` over a
        map that is very long; None if only a run can tell.
    upstream : tuple of str
        Names of the tasks whose values it takes.
    together : str
        How its elements are packed, and why.
    fused_with : str
        The task in whose messages it travels; empty if it has its own.
    not_fused : str
        Why it does not travel with its upstream, if it could have been expected to.
    lifted : tuple of str
        Large arguments that are placed once: what they are.
    options : str
        Resources, threads, workers and priority, if they are not the usual ones.
    """

    task: str
    count: int | None = None
    mapped: bool = False
    runs: int | None = 1
    upstream: tuple[str, ...] = ()
    together: str = ""
    fused_with: str = ""
    not_fused: str = ""
    lifted: tuple[str, ...] = ()
    options: str = ""

    @property
    def notes(self) -> list[str]:
        """What there is to say of how it travels, in a user's words."""
        notes = [
            self.together,
            f"fused: travels with {self.fused_with}" if self.fused_with else "",
            f"not fused: {self.not_fused}" if self.not_fused else "",
            *(f"lifted: {one}, placed once" for one in self.lifted),
            self.options,
        ]
        return [note for note in notes if note]


@dataclass(frozen=True, slots=True)
class Plan:
    """What penstock would do with a flow.

    Attributes
    ----------
    flow : str
        Name of the flow.
    runner : str
        The runner it is planned for, and its slots.
    nodes : tuple of Node
        In the order in which they were made.
    messages : int
        Units of work that the back end would get, if every element of an automatic map were tiny.
    end : str
        Why the plan ends before the flow does, and where; empty if it does not.
    """

    flow: str
    runner: str
    nodes: tuple[Node, ...] = field(default=())
    messages: int = 0
    end: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as primitives."""
        return asdict(self)

    def __str__(self) -> str:
        """Show the plan as lines of text."""
        lines = [f"flow {self.flow} on {self.runner}"]
        for node, alike in itertools.groupby(self.nodes):
            runs = len(list(alike))
            kind = f" x {_number(node.count)}" if node.mapped else ""
            kind += f", {runs:,} times" if runs > 1 else ""
            after = f"  <- {', '.join(node.upstream)}" if node.upstream else ""
            lines.append(f"  {node.task}{kind}{after}")
            lines.extend(f"      {note}" for note in node.notes)
        lines.append(self._totals())
        if self.end:
            lines.append(f"the plan ends here: {self.end}")
        return "\n".join(lines)

    def _totals(self) -> str:
        tasks = sum(node.runs or 0 for node in self.nodes)
        more = (
            ", and those whose number only a run can tell"
            if any(node.runs is None for node in self.nodes)
            else ""
        )
        return f"{tasks:,} task runs in at least {self.messages:,} units of work{more}"

    def _repr_html_(self) -> str:
        """Show the plan as a table in a notebook."""
        rows = []
        for node, alike in itertools.groupby(self.nodes):
            times = len(list(alike))
            runs = None if node.runs is None else node.runs * times
            cells = [node.task, _number(runs), ", ".join(node.upstream), "\n".join(node.notes)]
            rows.append("<tr>" + "".join(f"<td>{_as_html(cell)}</td>" for cell in cells) + "</tr>")
        names = "".join(f"<th>{name}</th>" for name in ("task", "runs", "takes", "how it travels"))
        first = f"flow {self.flow} on {self.runner}"
        ends = f"<p>the plan ends here: {_as_html(self.end)}</p>" if self.end else ""
        body = "".join(rows)
        last = _as_html(self._totals())
        return f"<p><b>{_as_html(first)}</b></p><table><tr>{names}</tr>{body}</table><p>{last}</p>{ends}"


def _number(count: int | None) -> str:
    return UNKNOWN if count is None else f"{count:,}"


def _as_html(text: str) -> str:
    return html.escape(text).replace("\n", "<br>")


class _Nowhere(TaskRunner):
    """Takes work and never does it; `put` remembers what it was given."""

    name = "plan"

    def __init__(self, threads: int, *, in_process: bool) -> None:
        super().__init__()
        self.threads = threads
        self.in_process = in_process  # then arguments are shared: nothing is pickled, and nothing lifted
        self.max_in_flight = 1 << 40

    def start(self) -> None:
        """Nothing to start."""

    def stop(self) -> None:
        """Nothing to stop."""

    @property
    def info(self) -> RunnerInfo:
        return RunnerInfo("plan", threads=self.threads, in_process=self.in_process, dependencies=True)

    def put(self, values: Sequence[Any]) -> list[Ref]:
        return [Ref(("put", id(one)), describe(one), size_of(one)) for one in map(opened, values)]

    def send(self, submissions: Sequence[Submission]) -> list[Ref]:
        return [Ref(one.key, None) for one in submissions]

    def fetch(self, refs: Sequence[Ref]) -> list[Any]:
        raise sample.Ends("a value is needed")

    def release(self, refs: Sequence[Ref]) -> None:
        """Nothing is held."""

    def cancel(self, refs: Sequence[Ref], *, force: bool = False) -> list[Key]:
        return []


class _Planning(Session):
    """Captures calls, and lets nothing go."""

    plans = True

    def __init__(self, runner: TaskRunner) -> None:
        self.made_runs: list[TaskRun] = []
        self.taken: list[TaskRun | Chunk] = []
        self.late: set[str] = set()  # maps whose upstream has ended before they were made
        self.trees: dict[
            TaskRun, tuple[int, int, int]
        ] = {}  # runs that stand for a tree: values, nodes, fanin
        self.assumed: set[TaskRun] = set()  # runs that the flow has waited for: taken to have gone well
        super().__init__(runner, Journal(lambda _: None))

    def submit(self, runs: Sequence[TaskRun], scope: Scope) -> None:
        self.made_runs.extend(runs)
        upstream = [one.run for one in sources_of(runs[0]) if one.run is not None]
        if any(one.map_id is not None and one.key is not None for one in upstream):
            self.late.add(str(runs[0].map_id))
        super().submit(runs, scope)

    def hold(self, runs: Sequence[TaskRun], scope: Scope) -> None:
        """Take runs whose operands only a run can tell; they go when their time comes, as all do."""
        self.made_runs.extend(runs)
        super().hold(runs, scope)
        for run in runs:
            run.waiting = 0
            self.release(run)

    def flush(self) -> None:
        """Somebody waits: all that was made goes, and is taken to go well; its values nobody has."""
        self.pause()
        while waiting := [run for run in self.live if not run.done]:
            waiting = [run for run in waiting if run.key is not None] or waiting  # what is gone ends first
            for run in waiting:
                running = advance(run.position, StateType.RUNNING, None, 1)
                run.position = advance(running, StateType.COMPLETED)
                run.done = True
                self.assumed.add(run)
                self.live.pop(run, None)
                if run.flow_run is not None:
                    run.flow_run.live.pop(run, None)
            for run in waiting:
                for ready in self.graph.ended(run)[0]:
                    if not ready.done:
                        self.release(ready)
            self.pause()
            for run in waiting:
                calls, run.callbacks = run.callbacks or (), None
                for call in calls:
                    call(run)

    def begin_direct(self, run: TaskRun, scope: Scope) -> None:
        raise sample.Ends(f"task {run.task.name!r} is called, not submitted, and runs in the driver")

    def _pump(self) -> None:
        """Nothing is sent before the plan is complete."""

    def pause(self) -> None:
        """Take everything, as if all elements of automatic maps were tiny."""
        for packer in {run.mapped.packer for run in self.made_runs if run.mapped is not None}:
            if packer is not None and packer.size == "auto":
                packer.seconds = TINY
        while taken := self.dispatch.take():
            self.taken.extend(taken)
            for unit in taken:  # all of it is gone at once
                self.dispatch.landed(unit)


def explain(flow: Flow[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Plan:
    """Plan a flow; see `Flow.explain`."""
    bound = parameters.bind(flow.signature, flow.name, args, kwargs)
    if flow.options.validate_parameters:
        bound = parameters.validate(flow.fn, flow.signature, bound)
    positional, named = parameters.unbind(flow.signature, bound)
    runner = flow.runner()
    threads, known = _slots(runner)
    session = _Planning(_Nowhere(threads, in_process=runner.in_process).open())
    run = FlowRun(flow, flow.name)
    end = ""
    try:
        try:
            with context.entered(Scope(session, run)):
                value = flow.body(*positional, **named)
                if inspect.iscoroutine(value):
                    run_coroutine(value)
        except sample.Ends as reason:
            end = f"{reason}{_where(reason)}"
        session.flush()  # a flow waits for what it has made
    finally:
        session.close()
    units = session.taken
    where = f"{runner.name} with {threads} slots{'' if known else ' (assumed: it is not started)'}"
    return Plan(flow.name, where, _nodes(session, units), _messages(session, units), end)


def _slots(runner: TaskRunner) -> tuple[int, bool]:
    """Return how many tasks run at once, and whether that is known; nothing is started for it."""
    if runner.is_open or runner.in_process:
        return runner.info.threads, True
    wished = getattr(runner, "max_workers", None)
    return (int(wished), True) if wished else (os.cpu_count() or 1, False)


def _where(error: BaseException) -> str:
    frames = [
        one for one in traceback.extract_tb(error.__traceback__) if not one.filename.startswith(sample.OURS)
    ]
    frames = [one for one in frames if not one.filename.startswith(_LOOP)] or frames
    return f" ({frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line})" if frames else ""


def _nodes(session: _Planning, units: Iterable[TaskRun | Chunk]) -> tuple[Node, ...]:
    chunks = [unit for unit in units if isinstance(unit, Chunk)]
    leader: dict[str | None, str] = {}
    refusals = dict.fromkeys(session.late, "its upstream has ended before it is made")
    sizes: dict[str | None, tuple[int, int]] = {}
    for chunk in chunks:
        first = chunk.stages[0][0]
        number, largest = sizes.get(first.map_id, (0, 0))
        sizes[first.map_id] = number + 1, max(largest, chunk.count)
        refusals.update(chunk.refusals)
        for stage in chunk.stages[1:]:
            leader[stage[0].map_id] = first.task.name
    counts: dict[str | None, int] = {}
    # The flow may have cancelled others.
    made = [run for run in session.made_runs if not run.done or run in session.assumed]
    for run in made:
        if run.map_id is not None:
            counts[run.map_id] = counts.get(run.map_id, 0) + 1
    nodes, seen = [], set()
    for run in made:
        if not run.tracked or (run.map_id is not None and run.map_id in seen):
            continue
        seen.add(run.map_id)
        count = counts.get(run.map_id)
        if run.map_id in session.totals:
            count = session.totals[run.map_id]
            sizes[run.map_id] = _forecast(run, count)
        nodes.append(_node(run, count, leader, refusals, sizes, session.trees.get(run)))
    return tuple(nodes)


def _forecast(run: TaskRun, total: int) -> tuple[int, int]:
    """Return in how many units a long map goes, and the size of the largest; zeros where nobody can know."""
    packer = run.mapped.packer if run.mapped is not None else None
    if total == sample.OPEN:
        return 0, 0
    return packer.forecast(total, TINY) if packer is not None else (total, 1)


def _messages(session: _Planning, units: Iterable[TaskRun | Chunk]) -> int:
    """Count units of work; those of a map of which only some elements were planned by its length."""
    count = sum(nodes - 1 for _, nodes, _ in session.trees.values() if nodes != sample.OPEN)
    seen: set[str] = set()
    for unit in units:
        run = unit.stages[0][0] if isinstance(unit, Chunk) else unit
        if run.map_id is None or run.map_id not in session.totals:
            count += 1
        elif run.map_id not in seen:
            seen.add(run.map_id)
            count += max(_forecast(run, session.totals[run.map_id])[0], 1)
    return count


def _node(
    run: TaskRun,
    count: int | None,
    leader: dict[str | None, str],
    refusals: dict[str, str],
    sizes: dict[str | None, tuple[int, int]],
    tree: tuple[int, int, int] | None,
) -> Node:
    options = run.task.options
    sources = list(sources_of(run))
    fused = leader.get(run.map_id, "") if run.map_id is not None else ""
    lifted = [f"{one.ref.handle} ({human_bytes(one.ref.nbytes)})" for one in sources if one.ref is not None]
    wishes = [f"{name}={amount:g}" for name, amount in options.backend.resources]
    wishes += [f"threads={options.backend.threads}"] if options.backend.threads != 1 else []
    wishes += [f"workers={', '.join(options.backend.workers)}"] if options.backend.workers else []
    wishes += [f"priority={options.priority}"] if options.priority else []
    together = "" if count is None or fused else _packing(run, count, sizes.get(run.map_id, (0, 0)))
    runs = 1 if count is None else count
    if tree is not None:
        values, runs, fanin = tree
        many = "" if runs == sample.OPEN else f" of {runs:,} runs over {values:,} values"
        together = f"a tree{many}, {fanin} values at a time"
    return Node(
        task=run.task.name,
        count=None if count == sample.OPEN else count,
        mapped=count is not None,
        runs=None if runs == sample.OPEN else runs,
        upstream=tuple(dict.fromkeys(one.run.task.name for one in sources if one.run is not None)),
        together=together,
        fused_with=fused,
        not_fused="" if fused or count is None else refusals.get(str(run.map_id), ""),
        lifted=tuple(dict.fromkeys(lifted)),
        options=f"asks for {', '.join(wishes)}" if wishes else "",
    )


def _packing(run: TaskRun, count: int, sizes: tuple[int, int]) -> str:
    mapped = run.mapped
    assert mapped is not None  # it is an element
    if mapped.reason:
        return f"elements go alone: {mapped.reason}"
    number, largest = sizes
    if run.task.options.chunk_size != "auto":
        many = "in chunks" if count == sample.OPEN else f"in {number:,} chunks"
        return f"{many} of up to {run.task.options.chunk_size}"
    pilot = 2 * mapped.packer.threads if mapped.packer is not None else 0
    return f"automatic: {pilot} elements go first; if they are tiny, the others follow in chunks" + (
        f" of up to {largest:,}" if largest else ""
    )
