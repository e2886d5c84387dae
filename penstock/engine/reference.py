"""`penstock.put`: a value placed near the workers once, and the reference to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from penstock import errors
from penstock.engine import ambient, items, nested
from penstock.engine.calls import TaskRun
from penstock.engine.futures import PenstockFuture
from penstock.engine.task import Task
from penstock.runners.worker.running import current
from penstock.runners.worker.sizes import is_lazy, size_of

if TYPE_CHECKING:
    from penstock.engine.context import Scope

R = TypeVar("R")


class Reference(PenstockFuture[R]):
    """A value that `put` has placed near the workers; usable wherever a future is.

    It is freed there when the last reference to it is dropped and no task needs it any more.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        """Show kind and size."""
        kind = "" if self._run.value is None else f" {type(self._run.value).__name__}"
        return f"<Reference{kind} {self.nbytes} bytes>"


def put(value: R) -> Reference[R]:
    """Place a value near the workers once, for as many calls as you like.

    Pass the reference where you would pass the value: directly, in containers, under `unmapped`, or
    as what `.map` takes apart. The value is captured now, where tasks run in other processes; do not
    change it afterwards, because a copy that dies with a worker is placed again from yours.

    A Dask collection is computed on the cluster, into one value that does not pass this process; its
    reference can be used before it is computed.

    >>> table = put(catalogue)  # doctest: +SKIP
    >>> [match.submit(source, table) for source in sources]  # doctest: +SKIP

    Parameters
    ----------
    value : object
        Anything that can be sent to a task.

    Returns
    -------
    Reference
        Of this flow's runner. A task of another runner can use it, too: it is then placed there.

    Raises
    ------
    MissingContextError
        Outside of flows, tasks and ``with SomeTaskRunner():`` blocks.
    UnserializableArgument
        If the value cannot be sent to another process.
    TypeError
        If it is a future: that is a reference already.
    """
    if isinstance(value, PenstockFuture):
        message = f"put() takes a value, but {value!r} is a reference already: pass it as it is."
        raise TypeError(message)
    try:
        scope = ambient.scope_for_submit("put")
    except RuntimeError:
        message = (
            f"put({type(value).__name__}) has no task runner to place the value with; call it inside a flow "
            "or task, or inside a block such as 'with ThreadPoolTaskRunner():'."
        )
        raise errors.MissingContextError(message) from None
    if is_lazy(value):
        return Reference(_computing().submit(value)._run)
    return Reference(_placed(value, scope))


def _placed(value: Any, scope: Scope) -> TaskRun:
    """Place a value; its source is kept, so that `Session.reference` can place it again if it is lost."""
    session = scope.session
    running = current()
    if running is not None:  # references in what the task returns become their values
        nested.children_of(running, session)
    nbytes = size_of(value)
    session.objects.bytes_put += nbytes
    like = TaskRun(_computing(), "put", flow_run=scope.flow_run, surrounding=scope.task_run, tracked=False)
    return items.present(session, like, "put", session.objects.put(value), nbytes, value)


def compute(collection: Any) -> Any:
    """Compute a Dask collection: on the cluster of the task if that is Dask's, else in the task."""
    return collection.compute()


_made: list[Task[..., Any]] = []


def _computing() -> Task[..., Any]:
    if not _made:
        _made.append(Task(compute, name="put", inputs="shared"))
    return _made[0]
