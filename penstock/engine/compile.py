"""From units that are ready to submissions: the one place that compiles; runners only translate.

A unit is a run that goes alone, or a chunk: many elements of a map, perhaps through several tasks.
A runner sees no difference: one key, one function, arguments, references, one value and one record.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from penstock.engine import invoke, lookups, values
from penstock.engine.calls import Source, TaskRun
from penstock.engine.chunks import BOX, Chunk
from penstock.runners.base import Ref, Submission

if TYPE_CHECKING:
    from penstock.engine.session import Session

Unit = TaskRun | Chunk


def submissions(
    batch: Sequence[Unit], session: Session, refuse: Callable[[TaskRun, Exception], None]
) -> list[Submission]:
    """Compile a batch.

    Parameters
    ----------
    batch : sequence of TaskRun or Chunk
        Ready, each after its upstreams, with the key of its next attempt.
    session : Session
        Knows where upstream values lie.
    refuse : callable
        Takes a run that cannot be sent, and why.

    Returns
    -------
    list of Submission
        In the order of the batch, which is topological; the deeper a run stands in the graph, the
        higher is its priority, so that consumers run before new producers.
    """
    compiled = []
    for unit in batch:
        try:
            compiled.append(_of_chunk(unit, session) if isinstance(unit, Chunk) else _of_run(unit, session))
        except Exception as error:  # an upstream's value that cannot be put, say
            for run in list(unit.runs) if isinstance(unit, Chunk) else [unit]:
                refuse(run, error)
    return compiled


def _of_run(run: TaskRun, session: Session) -> Submission:
    call = run.invocation()
    assert call is not None
    assert run.key is not None
    refs: list[Ref] = []
    picks: dict[int, int] = {}
    loads: dict[int, Any] = {}
    for position, source in enumerate(call.sources):
        if source.run is not None and lookups.is_stored(source.run):
            loads[position] = _stored(source.run, session)
            continue
        ref, place = session.locations.find(source)
        refs.append(ref)
        if place is not None:
            picks[position] = place
    order: Any = invoke.work_order(run, call, session.luggage.prints_of(run))
    if picks:
        order["picks"] = picks
    if loads:
        order["loads"] = loads
    if session.in_process:
        order["scope"] = session.scope_of(run)
        order["interrupt_after"] = call.task.options.timeout_seconds
    else:
        order = pickle.dumps(order, 4)
    options = call.task.options
    return Submission(
        key=run.key,
        order=order,
        function=call.function,
        arguments=call.arguments,
        refs=tuple(refs),
        after=tuple(
            session.locations.reference(source) for source in call.after if session.locations.orders(source)
        ),
        priority=run.depth + options.priority,
        options=options.backend,
        announce=(options.timeout_seconds is not None or bool(options.hooks.on_running)) and run.tracked,
        streams=run.items is not None,
    )


def _stored(run: TaskRun, session: Session) -> Any:
    """Say how a value that lies in a storage comes to where it is needed: read there, not here."""
    if not session.in_process:
        return lookups.where(run)
    return lambda: values.results([run])[0]  # read once for all that need it


def _of_chunk(chunk: Chunk, session: Session) -> Submission:
    refs: list[Ref] = []
    loads: dict[int, Any] = {}
    positions: dict[Any, int] = {}
    stage_of = {id(run): number for number, stage in enumerate(chunk.stages) for run in stage}

    def locate(source: Source) -> tuple[Any, ...]:
        run = source.run
        if run is not None and run.key is chunk.key:
            return "stage", stage_of[id(run)]
        if run is not None and lookups.is_stored(run):
            if run not in positions:
                positions[run] = len(positions)
                loads[positions[run]] = _stored(run, session)
            return "value", positions[run], None
        ref, place = session.locations.find(source)
        if ref.key not in positions:
            positions[ref.key] = len(positions)
            refs.append(ref)
        return "value", positions[ref.key], place

    stages, arguments, functions, after = [], [], [], {}
    for runs in chunk.stages:
        mapped = runs[0].mapped
        assert mapped is not None  # only elements of maps go together
        stages.append(invoke.stage_order(runs, mapped, session))
        arguments.append(mapped.columns([run.index for run in runs], locate))
        functions.append(mapped.function)
        for source in mapped.after:
            if session.locations.orders(source):
                ref = session.locations.reference(source)
                after[ref.key] = ref
    first = chunk.stages[0][0]
    options = first.task.options
    order: Any = {
        "stages": stages,
        "count": chunk.count,
        "box": BOX if options.chunk_size == "auto" else None,
    }
    if loads:
        order["loads"] = loads
    together = session.in_process
    return Submission(
        key=chunk.key,
        order=order if together else pickle.dumps(order, 4),
        function=functions if together else session.luggage.functions(functions),
        arguments=arguments if together else pickle.dumps(arguments, 5),
        refs=tuple(refs),
        after=tuple(after.values()),
        priority=first.depth + options.priority,
        options=options.backend,
    )
