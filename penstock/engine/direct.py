"""A task that is called, not submitted: it runs in the caller's thread or loop, and is recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from penstock.engine import invoke, values
from penstock.engine.calls import Bound, Call, Source, TaskRun
from penstock.engine.graph import admits
from penstock.engine.states import StateType, advance
from penstock.engine.steps import Invoke, Sleep, Steps, Wait
from penstock.engine.waiting import HOP
from penstock.runners import worker_runtime

if TYPE_CHECKING:
    from penstock.engine.context import Scope


def steps(run: TaskRun, scope: Scope, call: Call, return_state: bool) -> Steps:
    """Run a call here, with its retries.

    Parameters
    ----------
    run : TaskRun
        New.
    scope : Scope
        What surrounds the caller.
    call : Call
        With arguments for this process.
    return_state : bool
        Answer the state instead of the value.
    """
    session = scope.session
    run.call, run.direct, run.session, run.inside = call, True, session, scope.depth + 1
    session.begin_direct(run, scope)
    upstreams = [source.run for source in (*call.sources, *call.after) if source.run is not None]
    yield Wait(upstreams)
    dead = next((s.run for s in (*call.sources, *call.after) if _blocks(s)), None)
    if run.done:  # before its flow run was resumed
        values.results([run], raise_on_failure=False)
    elif dead is not None:
        session.never_direct(run, dead)
    else:
        yield from _attempts(run, scope, call, values.of_sources(session, call.sources))
    state = values.state_of(run)
    if return_state:
        return state
    error = values.exception_of(run)
    if error is not None:
        raise error
    return run.value


def _attempts(run: TaskRun, scope: Scope, call: Call, inputs: list[Any]) -> Steps:
    session = scope.session
    options = run.task.options
    assert isinstance(call.arguments, Bound)
    while not run.done:
        run.delay = None
        run.position = advance(run.position, StateType.RUNNING, None, run.next_attempt)
        order = invoke.work_order(run, call, session.prints_of(run))
        attempt = worker_runtime.Attempt(order, None, session.scope_of(run))
        guard = worker_runtime.Guard(options.inputs)
        args, kwargs = call.arguments(guard.values(inputs))
        if guard.copies:  # else the caller's own arguments are passed as by any call
            args, kwargs = guard.arguments(args, kwargs, private=False)
        if order["prints"]:
            worker_runtime.route_prints()
        with attempt:
            deep = run.inside % HOP == HOP - 1 and not run.task.isasync
            attempt.value = yield Invoke(
                run.task.fn, args, kwargs, options.timeout_seconds, fresh_stack=deep, name=run.name
            )
        session.ended_here(run, *attempt.outcome)
        error = attempt.error
        if isinstance(error, (KeyboardInterrupt, SystemExit, worker_runtime.Cancelled)):
            raise error
        if run.delay:
            yield Sleep(run.delay)


def _blocks(source: Source) -> bool:
    run = source.run
    return run is not None and not admits(run, source.tolerant)
