"""One run of a flow, from its row in the record to its final state."""

from __future__ import annotations

from typing import Any

from penstock import errors
from penstock.engine.flow_scope import FlowRunScope
from penstock.engine.states import State, StateType
from penstock.engine.steps import Invoke, Sleep, Steps


def steps(run: FlowRunScope, wait_for: Any, return_state: bool) -> Steps:
    """Carry out one run of a flow, with its attempts.

    Parameters
    ----------
    run : FlowRunScope
        New, or made for the background.
    wait_for : iterable or None
        Futures that have to end first.
    return_state : bool
        Answer the final state instead of the value.
    """
    try:
        if not run._made:
            run.make()
        if run.outer is not None and run.outer.session.plans:
            return (yield from run.planned_steps(wait_for, return_state))
        state = run.recalled()
        fatal: BaseException | None = None
        caught = False
        while state is None:
            try:
                if run.record.attempt == 0:
                    yield from run.arguments_steps(wait_for)
                run.start()
                options = run.flow.options
                with run.inside():
                    yield from run.hooks(State(StateType.RUNNING))
                    returned = yield Invoke(
                        run.flow.body,
                        run.arguments.args,
                        run.arguments.kwargs,
                        options.timeout_seconds,
                        name=run.flow_run.name,
                        interruption=run.interruption,
                    )
                    yield from run.leave_steps(returned)
                state = run.returned(returned)
            except BaseException as error:
                caught = True
                if isinstance(error, errors.UnfinishedRun) and run.record.attempt == 0:
                    state = run.not_ready(error)
                else:
                    state = yield from run.raised(error)
                    if run.must_go_on(error, state):
                        fatal = error
            delay = None if fatal is not None else run.retry_delay(state)
            if delay is not None:
                run.await_retry(state, delay)
                state = None
                yield Sleep(delay, run.interruption)
        yield from run.end_hooks(run.concluded(state))
        state = run.finish(state)
        if fatal is not None:
            raise fatal
        if caught:
            run.raise_if_interrupted()
        return run.give_state(state) if return_state else run.give_value(state)
    finally:
        run.close()
