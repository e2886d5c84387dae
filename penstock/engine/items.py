"""What a generator task yields, one run for each item, as it arrives.

A generator task gives a list, unless somebody asks for its items before it is sent (`ask`): then the
worker places each item by itself and tells so. Its value is then the list of its items, made when
somebody wants it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from penstock.engine import results, values
from penstock.engine.calls import TaskRun
from penstock.engine.states import StateType, advance
from penstock.runners.base import Ref, Report
from penstock.runners.worker.running import current

if TYPE_CHECKING:
    from penstock.engine.session import Session


def yields(run: TaskRun) -> bool:
    """Whether the function of a run is a generator."""
    return bool(getattr(run.task, "yields", False))


def ask(run: TaskRun) -> bool:
    """Ask for the items of a run one by one; answer whether that is still possible.

    It is not for a run that is on its way, that others depend on, or that a task has submitted; for an
    element of a map that may go with others; for a result that is to be stored, which is one list; nor
    on a runner that brings values with the end of their task only.
    """
    session = run.carrier
    with session.lock:
        possible = (
            run.items is None
            and run in session.buffer
            and not run.dependants
            and session.runner.info.streams
            and current() is None
            and yields(run)
            and (run.mapped is None or run.mapped.packer is None)
            and results.commit_order(run) is None
        )
        if possible:
            run.items = []
        return run.items is not None


def arrived(session: Session, run: TaskRun, report: Report) -> None:
    """Take an item (the caller holds the lock); one that an earlier attempt gave is there already."""
    if run.items is not None and report.number == len(run.items) and report.ref is not None:
        run.items.append(present(session, run, f"{run.name}[{report.number}]", report.ref, report.nbytes))


def present(session: Session, like: TaskRun, name: str, ref: Ref, nbytes: int, value: Any = None) -> TaskRun:
    """Make the run that stands for a value which is there already: it has ended before it is seen.

    Parameters
    ----------
    session : Session
        Whose runner has the value.
    like : TaskRun
        Gives task and surroundings.
    name : str
        Of the run.
    ref : Ref
        Where the value lies.
    nbytes : int
        Its size.
    value : object, optional
        The source, where it is to be kept: what is lost can be placed again.
    """
    run = TaskRun(like.task, name, flow_run=like.flow_run, surrounding=like.surrounding, tracked=False)
    run.session, run.ref, run.nbytes, run.value = session, ref, nbytes, value
    run.position = advance(advance(run.position, StateType.RUNNING, None, 1), StateType.COMPLETED)
    run.done, run.ended = True, time.time()
    return run


def drawn(run: TaskRun, *, raise_on_failure: bool = True) -> Iterator[TaskRun]:
    """Yield the items of a run for which `ask` was answered with yes, as they arrive.

    Parameters
    ----------
    run : TaskRun
        A generator's.
    raise_on_failure : bool
        Raise what the generator raised, after its last item.

    Raises
    ------
    Exception
        What the generator raised, after the items before it.
    """
    session, position = run.carrier, 0
    assert run.items is not None
    session.flush()
    while True:
        with session.changed:
            while position >= len(run.items) and not run.done:
                session.changed.wait()
            available = run.items[position:]
        if not available:
            break
        yield from available
        position += len(available)
    error = values.exception_of(run)
    if error is not None and raise_on_failure:
        raise error
