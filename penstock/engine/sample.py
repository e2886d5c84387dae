"""A map of which a plan holds only some elements: it is very long, or only a run can tell its length.

The elements of a map are alike, so a few of them show how all of them travel. What a flow does with
such a map as a whole (map over it, reduce it, pass it on, wait for it) is planned; where its code
takes the elements one by one, the plan ends and says so.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from penstock.engine.futures import PenstockFuture, PenstockFutureList

OPEN: Final = -1
"""Stands for a length that only a run can tell."""
WHOLE: Final = 20_000
"""Elements up to which a map is planned whole."""
SAMPLE: Final = 2_500
"""Elements of a longer map that are planned: more than go together in most chunks."""
OURS: Final = tuple(str(Path(__file__).parent.parent / room) for room in ("engine", "runners", "cli"))

TAKERS: Final = frozenset({"as_completed.__init__", "first_completed", "Task.map"})
"""Functions of the engine that take elements on behalf of the user (the last one their states)."""


class Ends(BaseException):
    """The flow asks for what only a run can give; no code of the user shall catch it."""


def drawn(items: Iterator[Any]) -> tuple[Sequence[Any], int]:
    """Draw a generator that is mapped over: as many items as a plan holds, and how many there were."""
    first = list(itertools.islice(items, WHOLE + 1))
    return first, len(first) + sum(1 for _ in items)


def held(total: int, lengths: Sequence[int]) -> int:
    """Return how many elements of a map are planned.

    Parameters
    ----------
    total : int
        Elements that it has, or `OPEN`.
    lengths : sequence of int
        Items that are there for each of its arguments.
    """
    return min(*lengths, SAMPLE) if total == OPEN or total > WHOLE else min(*lengths, total)


class Sampled(PenstockFutureList[Any]):
    """Futures of some elements of a map.

    Attributes
    ----------
    total : int
        Elements of the map, or `OPEN`.
    """

    def __init__(self, futures: Sequence[PenstockFuture[Any]], total: int, session: Any) -> None:
        super().__init__(futures)
        self.total = total
        self._session = session

    def reduce(
        self, op: Callable[[list[Any]], Any], fanin: int = 8, order: str = "index"
    ) -> PenstockFuture[Any]:
        """Plan the tree as one run that knows how many it stands for."""
        root = PenstockFutureList(list(self)[:fanin]).reduce(op, fanin, order)
        self._session.trees[root._run] = (self.total, nodes_of_tree(self.total, fanin, order), fanin)
        return root

    # The engine walks over what is held. Code of the user must not take it for the whole.
    def __len__(self) -> int:
        """Return the length of the map, if it is known."""
        if not _asked_by_user():
            return super().__len__()
        if self.total == OPEN:
            self._end("the length of a map is needed that only a run can tell")
        return self.total

    def __iter__(self) -> Iterator[PenstockFuture[Any]]:
        """Iterate in the engine only."""
        if _asked_by_user():
            self._end()
        return super().__iter__()

    def __getitem__(self, index: Any) -> Any:
        """Answer one of the first elements, or some of them."""
        if _asked_by_user():
            first, last = index, index
            if isinstance(index, slice):
                first, last = index.start or 0, (sys.maxsize if index.stop is None else index.stop) - 1
            if self.total == OPEN or first < 0 or not 0 <= last < super().__len__():
                self._end()
        return super().__getitem__(index)

    def __add__(self, other: Any) -> Any:
        """End the plan: a list of both would have the wrong length."""
        self._end()

    __radd__ = __iadd__ = __add__

    def __reversed__(self) -> Iterator[PenstockFuture[Any]]:
        """End the plan."""
        self._end()

    def _end(self, reason: str = "") -> NoReturn:
        length = "whose length only a run can tell" if self.total == OPEN else f"of {self.total:,} elements"
        raise Ends(reason or f"the elements of a map {length} are taken one by one")


def of_map(futures: PenstockFutureList[Any], session: Any) -> PenstockFutureList[Any]:
    """Return the futures of a map in a plan, knowing of how many they are."""
    total = session.totals.get(futures[0]._run.map_id) if futures else None
    return futures if total is None else Sampled(futures, total, session)


def nodes_of_tree(count: int, fanin: int, order: str) -> int:
    """Return how many runs combine so many values, or `OPEN`."""
    if count == OPEN:
        return OPEN
    if order == "completion":
        return max(-(-(count - 1) // (fanin - 1)), 1)
    nodes, level = 0, count
    while True:
        level = -(-level // fanin)
        nodes += level
        if level == 1:
            return nodes


def _asked_by_user() -> bool:
    """Whether the method that calls this was called by code of the user, or on its behalf."""
    code = sys._getframe(2).f_code
    return not code.co_filename.startswith(OURS) or code.co_qualname in TAKERS
