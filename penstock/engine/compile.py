"""From runs that are ready to submissions: the one place that compiles; runners only translate.

One submission per run for now. Chunks of a map and fused chains belong here too: they change how
many runs a submission stands for, and nothing that a runner sees.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from penstock.engine import invoke
from penstock.engine.calls import TaskRun
from penstock.runners.base import Submission

if TYPE_CHECKING:
    from penstock.engine.session import Session


def submissions(
    batch: Sequence[TaskRun], session: Session, refuse: Callable[[TaskRun, Exception], None]
) -> list[Submission]:
    """Compile a batch.

    Parameters
    ----------
    batch : sequence of TaskRun
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
    for run in batch:
        try:
            compiled.append(_submission(run, session))
        except Exception as error:  # an upstream's value that cannot be put, say
            refuse(run, error)
    return compiled


def _submission(run: TaskRun, session: Session) -> Submission:
    call = run.call
    assert call is not None
    assert run.key is not None
    order: Any = invoke.work_order(run, call, session.prints_of(run))
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
        refs=tuple(session.reference(source) for source in call.sources),
        after=tuple(session.reference(source) for source in call.after if session.orders(source)),
        priority=run.depth + options.priority,
        options=options.backend,
        announce=options.timeout_seconds is not None and run.tracked,
    )
