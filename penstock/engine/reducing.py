"""Combine the values of many runs into one by a tree of tasks, where the values lie.

In the order of their indices the tree is known at once. In the order of completion a node takes
whatever is there first, so that values are combined, and freed, as soon as they come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from penstock import errors
from penstock.engine.caller import Caller
from penstock.engine.calls import TaskRun
from penstock.engine.context import Scope, current_tags
from penstock.engine.futures import PenstockFuture

if TYPE_CHECKING:
    from penstock.engine.task import Task


def check(count: int, fanin: int, order: str) -> None:
    """Refuse what cannot be combined.

    Raises
    ------
    ConfigurationError
        Naming the parameter.
    MappingMissingIterable
        If there is nothing to combine.
    """
    if fanin < 2:
        message = f"'fanin' must be at least 2, got {fanin}."
        raise errors.ConfigurationError(message)
    if order not in {"index", "completion"}:
        message = f"'order' must be 'index' or 'completion', got {order!r}."
        raise errors.ConfigurationError(message)
    if not count:
        message = "there is nothing to reduce: the list of futures is empty."
        raise errors.MappingMissingIterable(message)


def by_index(
    combine: Task[..., Any], futures: Sequence[PenstockFuture[Any]], fanin: int
) -> PenstockFuture[Any]:
    """Combine neighbours, level by level: the association is the same in every run."""
    level = list(futures)
    while True:
        groups = [level[start : start + fanin] for start in range(0, len(level), fanin)]
        level = [combine.submit(group) for group in groups]
        if len(level) == 1:
            return level[0]


def by_completion(
    combine: Task[..., Any], futures: Sequence[PenstockFuture[Any]], fanin: int, scope: Scope
) -> PenstockFuture[Any]:
    """Combine whatever is there first; memory stays bounded by what has not been combined yet."""
    return _Tree(combine, [future._run for future in futures], fanin, scope).root


class _Tree:
    """Nodes that exist from the start and get their operands as these come to an end.

    Every node takes `fanin` values and gives one back; the last one takes what is left.
    """

    def __init__(self, combine: Task[..., Any], leaves: list[TaskRun], fanin: int, scope: Scope) -> None:
        self._scope = scope
        self._session = scope.session
        self._fanin = fanin
        self._caller = Caller(scope.session, combine, scope)
        self._there: deque[TaskRun] = deque()
        self._left = len(leaves)  # values that are still to be combined, those to come included
        count = max(-(-(len(leaves) - 1) // (fanin - 1)), 1)
        tags = combine.options.tags | current_tags()
        self._nodes = deque(
            TaskRun(
                combine,
                combine.name,
                root=scope.flow_run.root if scope.flow_run else "",
                flow_run=scope.flow_run,
                surrounding=scope.task_run,
                tags=tags | (scope.flow_run.tags if scope.flow_run else frozenset()),
            )
            for _ in range(count)
        )
        self.root: PenstockFuture[Any] = PenstockFuture(self._nodes[-1])
        self._session.hold(list(self._nodes), scope)
        if not self._session.plans:  # there nothing arrives
            for leaf in leaves:
                leaf.carrier.endings.add_callback(leaf, self._arrive)

    def _arrive(self, run: TaskRun) -> None:
        self._session.later(lambda: self._combine(run))

    def _combine(self, run: TaskRun) -> None:
        if not run.completed:  # nothing that is still to be made can be
            for node in self._nodes:
                self._session.journal.task_made(node, {}, [("0", run.id)])
                self._session.endings.never(node, run)
            self._nodes.clear()
            self._there.clear()
            return
        self._there.append(run)
        while self._nodes and len(self._there) >= min(self._fanin, self._left):
            operands = [self._there.popleft() for _ in range(min(self._fanin, self._left))]
            self._left -= len(operands) - 1
            node = self._nodes.popleft()
            call = self._caller.call(([PenstockFuture(one) for one in operands],), {})
            upstream = [("0", one.id) for one in operands if one.tracked]
            self._session.journal.task_made(node, {"0": operands}, upstream)
            self._session.bind(node, call)
            if self._nodes:
                node.carrier.endings.add_callback(node, self._arrive)
