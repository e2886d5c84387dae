"""A task that is called, not submitted: it runs in the caller's thread or loop, and is recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from penstock.engine import hook_calls, invoke, locking, lookups, values
from penstock.engine.calls import Bound, Call, Source, TaskRun
from penstock.engine.graph import admits
from penstock.engine.hooks import Hook
from penstock.engine.states import State, StateType, advance
from penstock.engine.steps import Enough, Give, Invoke, Sleep, Steps, Wait
from penstock.engine.waiting import HOP
from penstock.runners.worker.attempt import Attempt
from penstock.runners.worker.call import ask, name_from
from penstock.runners.worker.commit import recall
from penstock.runners.worker.guard import Guard
from penstock.runners.worker.interruption import Cancelled, TimedOut
from penstock.runners.worker.prints import route_prints

if TYPE_CHECKING:
    from penstock.engine.context import Scope


END: Any = object()
"""What stands behind the last item of a generator."""


def steps(run: TaskRun, scope: Scope, call: Call, return_state: bool, *, lazily: bool = False) -> Steps:
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
    lazily : bool
        The task is a generator: give each item to the caller when it asks for it (`steps.Give`).
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
        yield from _attempts(run, scope, call, lazily=lazily)
    if run.transaction is not None:
        yield from run.transaction.call_ended()
    state = values.state_of(run)
    yield from _hooks(run, run.task.options.hooks.of_task(run.type), state)
    if return_state:
        return state
    error = values.exception_of(run)
    if error is not None:
        raise error
    return run.value


def _attempts(run: TaskRun, scope: Scope, call: Call, *, lazily: bool) -> Steps:
    session = scope.session
    inputs: list[Any] | None = None
    options = run.task.options
    assert isinstance(call.arguments, Bound)
    given = 0
    while not run.done:
        name, run.delay = "Retrying" if run.delay else None, None
        run.position = advance(run.position, StateType.RUNNING, name, run.next_attempt)
        if name is not None:
            session.journal.task_state(run)
        if options.hooks.on_running:
            yield from _hooks(run, options.hooks.on_running, hook_calls.running_state(run))
        order = invoke.work_order(run, call, session.luggage.prints_of(run))
        if lazily:
            order.pop("commit", None)  # its items are never together in one value
        attempt = Attempt(order, None, session.scope_of(run))
        if (yield from _is_stored(attempt)):
            session.ended_here(run, *attempt.outcome)
            continue
        if inputs is None:
            inputs = values.of_sources(session, call.sources)
        guard = Guard(options.inputs)
        args, kwargs = call.arguments(guard.values(inputs))
        if guard.copies:  # else the caller's own arguments are passed as by any call
            args, kwargs = guard.arguments(args, kwargs, private=False)
        if call.naming is not None:
            order["name"] = name_from(call.naming, run.task.fn, args, kwargs)
        if (yield from _is_stored(attempt, args, kwargs)):
            session.ended_here(run, *attempt.outcome)
            continue
        if order["prints"]:
            route_prints()
        attempt.running.called = (run.task.fn, args, kwargs)
        if lazily:
            session.journal.task_state(run)
            given = yield from _items(attempt, run, args, kwargs, given)
        else:
            with attempt:
                if options.skip_if is not None:
                    ask(options.skip_if, args, kwargs)
                deep = run.inside % HOP == HOP - 1 and not run.task.isasync
                attempt.value = yield Invoke(
                    run.task.fn, args, kwargs, options.timeout_seconds, fresh_stack=deep, name=run.name
                )
        error = attempt.error
        if isinstance(error, TimedOut):  # of the flow around it: there is no time to try again
            run.cancelling = True
        session.ended_here(run, *attempt.outcome)
        if error is not None and run.transaction is not None:
            yield from run.transaction.attempt_failed()
        if isinstance(error, (KeyboardInterrupt, SystemExit, Cancelled)):
            raise error
        asked = session.hooks.asked(run)
        if asked is not None:
            yield from _ask(run, asked)
        if run.delay:
            yield Sleep(run.delay)


def _items(attempt: Any, run: TaskRun, args: tuple[Any, ...], kwargs: dict[str, Any], given: int) -> Steps:
    """Draw the items of a generator as the caller asks for them; answer how many it has got.

    Between two items the caller's code runs, which is no part of the task. Another attempt begins
    where the one before it came to.
    """
    number, step, seconds = 0, next, run.task.options.timeout_seconds
    with attempt:
        generator = run.task.fn(*args, **kwargs)
        if hasattr(generator, "__anext__"):
            step = anext  # type: ignore[assignment]
        while (item := (yield Invoke(step, (generator, END), {}, seconds, name=run.name))) is not END:
            number += 1
            if number <= given:
                continue
            given = number
            attempt.pause()
            try:
                yield Give(item)
            except Enough:
                attempt.resume()
                close = getattr(generator, "aclose", None) or generator.close
                yield Invoke(close)
                break
            attempt.resume()
    return given


def _hooks(run: TaskRun, hooks: Sequence[Hook], state: State) -> Steps:
    """Call hooks where the task was called."""
    journal = run.carrier.journal
    yield from hook_calls.call_here(
        hooks, (run.task, run, state), lambda line: journal.lines(run, [line], 0), Invoke
    )


def _ask(run: TaskRun, asked: hook_calls.Condition) -> Steps:
    """Ask the retry condition where the task was called."""
    again, condition = False, run.task.options.retry_condition_fn
    assert condition is not None
    try:
        again = bool((yield Invoke(condition, asked.arguments)))
    except Exception as error:
        run.carrier.hooks.no_answer(run, error)
    with run.carrier.changing():
        asked.decide(again)


def _is_stored(attempt: Attempt, args: Any = None, kwargs: Any = None) -> Steps:
    """Answer whether the result of an attempt is stored already; then the attempt has ended with it.

    Before the arguments are there, the key may be known; with them, it can be made.
    """
    running = attempt.running
    commit = running.order.get("commit")
    if commit is None or ("cache" in commit) is not (args is None):
        return False
    try:
        if args is not None:
            order = lookups.with_key(commit, running, args, kwargs)
            if order is None:
                return False
            commit = running.order["commit"] = order
        while not lookups.locked(commit, running):  # nobody may block an event loop
            yield Sleep(locking.PAUSE)
        if not recall(running):
            return False
    except Exception:
        with attempt:
            raise
        return True
    with attempt:
        attempt.value = running.found
    return True


def _blocks(source: Source) -> bool:
    run = source.run
    return run is not None and not admits(run, source.tolerant)
