"""Values live as long as somebody can ask for them, and not longer: random flows against a model.

Hypothesis draws what a flow does, one step after the other: it submits, maps, chains, reduces and
puts, waits, asks, cancels and drops its futures. A model of a few lines says what each future has to
give. At the end every future is dropped; then neither session, back end nor shared memory may hold
anything of the flow.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, event, given, note, settings
from hypothesis import strategies as st

from penstock import PenstockFutureList, allow_failure, errors, flow, put, task
from penstock.cache_policies import INPUTS
from penstock.engine import context
from penstock.runners.base import TaskRunner
from tests import leftovers
from tests.conftest import wait_until

InFlow = Callable[..., Any]
LARGE = 150_000  # numbers of an array that travels by reference, and is shared by the processes of a host
SECONDS = 10.0  # after which no further flow is begun
SHRINK_SECONDS = 6.0  # after a failure, in which a smaller one is looked for


# ------------------------------------------------------------------------------------------------ the tasks


def add_up(value: Any) -> int:
    """Add up whatever is in a value; of an array its first number counts."""
    if isinstance(value, np.ndarray):
        return int(value[0])
    if isinstance(value, dict):
        return sum(map(add_up, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(add_up, value))
    return int(value)


@task
def total(*values: Any) -> int:
    return add_up(values)


@task
def combine(values: list[Any]) -> int:
    return add_up(values)


@task
def grow(value: Any) -> int:
    return add_up(value) + 1


@task
def enlarge(value: Any) -> Any:
    return np.full(LARGE, add_up(value))


@task
def count_up(number: int) -> list[int]:
    return list(range(number))


@task
def fail(value: Any) -> int:
    raise ValueError(add_up(value))


@task
def picky(value: Any) -> int:
    if add_up(value) % 3 == 1:
        raise ValueError(add_up(value))
    return add_up(value)


@task(retries=1)
def name_of(value: Any) -> int:
    return -1 if isinstance(value, Exception) else add_up(value)


@task
def parent(value: Any) -> int:
    """Submit tasks, and keep their values in this one."""
    larger = enlarge.submit(value)
    others = grow.map([1, 2, 3])
    return total.submit(larger, others).result()


@task
def yields(number: int) -> Iterator[Any]:
    for one in range(number):
        yield np.full(LARGE, one) if one % 2 else one


def notice(_task: Any, _run: Any, _state: Any) -> None:
    """Stand for a user's hook."""


hooked = grow.with_options(on_completion=[notice], on_failure=[notice])
cached = total.with_options(persist_result=True, cache_policy=INPUTS)


@flow
def beside(value: Any) -> Any:
    """Run in the background, with a task of its own."""
    return grow.submit(value)


# ------------------------------------------------------------------------------------------------ the model


@dataclass(eq=False)
class Node:
    """What a future has to give: a value, or nothing (None) where its task or one before it fails.

    Attributes
    ----------
    value : int or None
        What `add_up` makes of the value.
    upstream : list of Node
        What it is made of.
    cancelled : bool
        It was asked to stop, perhaps in time.
    tolerates : bool
        It makes something else of an upstream that has failed.
    """

    value: int | None
    upstream: list[Node] = field(default_factory=list)
    cancelled: bool = False
    tolerates: bool = False

    @property
    def is_certain(self) -> bool:
        return not self.cancelled and all(one.is_certain for one in self.upstream)

    @property
    def has_another(self) -> bool:
        """Whether it may give another value, since something before it was asked to stop and is tolerated."""
        open_before = self.tolerates and not all(one.is_certain for one in self.upstream)
        return open_before or any(one.has_another for one in self.upstream)


@dataclass
class Held:
    """Futures that a flow holds under one name: a map's, or a single one."""

    futures: list[Any]
    nodes: list[Node]
    is_map: bool = False

    @property
    def argument(self) -> Any:
        return self.futures if self.is_map else self.futures[0]


def summed(nodes: list[Node], more: int = 0) -> Node:
    values = [node.value for node in nodes]
    known = [value for value in values if value is not None]
    return Node(sum(known) + more if len(known) == len(values) else None, list(nodes))


class Program:
    """A flow as it is drawn: what it does, and what has to come of it."""

    def __init__(self) -> None:
        self.held: list[Held] = []
        self.done: list[str] = []

    def pick(self, number: int) -> Held:
        return self.held[number % len(self.held)]

    def pick_map(self, number: int) -> Held:
        maps = [one for one in self.held if one.is_map]
        if not maps:
            self.map(number, 3, 4)
            maps = self.held[-1:]
        return maps[number % len(maps)]

    def run(self, steps: Steps) -> None:
        """Take all steps, then ask for all that is held."""
        for step in steps:
            self.step(*step)
        for one in self.held:
            self.check(one)

    def step(self, name: str, *numbers: int) -> None:
        self.done.append(f"{name}{numbers}")
        if not self.held:
            self.submit(1, 2, 3)
        getattr(self, name)(*numbers)

    def _keep(self, futures: Any, nodes: list[Node], *, is_map: bool = False) -> None:
        self.held.append(Held(futures if is_map else [futures], nodes, is_map))

    # -- what makes runs ----------------------------------------------------------------------
    def submit(self, i: int, j: int, k: int) -> None:
        if not self.held:
            self._keep(total.submit(i, j, k), [Node(i + j + k)])
            return
        one, other = self.pick(i), self.pick(j)
        node = summed(one.nodes + other.nodes, k)
        self._keep(total.submit(one.argument, {"x": [other.argument, (k,)]}), [node])

    def enlarge(self, i: int, j: int, k: int) -> None:
        one = self.pick(i)
        self._keep(enlarge.submit(one.argument), [summed(one.nodes)])

    def map(self, i: int, j: int, k: int) -> None:
        size: Any = (1, 4, "auto")[i % 3]
        mapped = (grow, enlarge, picky)[j % 3]
        count = 2 + k if mapped is enlarge else 2 + 2 * k
        futures = mapped.with_options(chunk_size=size).map(range(count))
        found: list[int | None] = [x + (mapped is grow) for x in range(count)]
        if mapped is picky:
            found = [None if x % 3 == 1 else x for x in range(count)]
        self._keep(futures, [Node(value) for value in found], is_map=True)

    def chain(self, i: int, j: int, k: int) -> None:
        """Map over a map, one to one; the one in between may be held by nobody."""
        size: Any = (1, 4, "auto")[j % 3]
        one = self.pick_map(i)
        futures, nodes = one.futures, one.nodes
        for _ in range(1 + k % 3):
            futures = grow.with_options(chunk_size=size).map(futures)
            nodes = [summed([node], 1) for node in nodes]
        self._keep(futures, nodes, is_map=True)

    def spread(self, i: int, j: int, k: int) -> None:
        """Map over a value that does not exist yet."""
        futures = grow.map(count_up.submit(1 + k))
        self._keep(futures, [Node(x + 1) for x in range(1 + k)], is_map=True)

    def reduce(self, i: int, j: int, k: int) -> None:
        one = self.pick_map(i)
        order = "completion" if k % 2 else "index"
        future = PenstockFutureList(one.futures).reduce(combine, fanin=2 + j % 3, order=order)
        self._keep(future, [summed(one.nodes)])

    def put(self, i: int, j: int, k: int) -> None:
        value = np.full(LARGE, k) if i % 2 else [k, {"x": j}]
        self._keep(put(value), [Node(add_up(value))])

    def large_argument(self, i: int, j: int, k: int) -> None:
        """An array of the flow's own, for one call or for all elements of a map."""
        array, one = np.full(LARGE, k), self.pick(i)
        if j % 2:
            array.setflags(write=False)
        self._keep(total.submit(array, array, one.argument), [summed(one.nodes, 2 * k)])

    def fail(self, i: int, j: int, k: int) -> None:
        one = self.pick(i)
        self._keep(fail.submit(one.argument), [Node(None, list(one.nodes))])

    def tolerate(self, i: int, j: int, k: int) -> None:
        one = self.pick(i)
        futures = name_of.map(allow_failure(one.futures))
        nodes = [Node(-1 if node.value is None else node.value, [node], tolerates=True) for node in one.nodes]
        self._keep(futures, nodes, is_map=True)

    def nest(self, i: int, j: int, k: int) -> None:
        one = self.pick(i)
        self._keep(parent.submit(one.argument), [summed(one.nodes, 9)])

    def generate(self, i: int, j: int, k: int) -> None:
        items = list(yields.submit(1 + k).items())
        self._keep(items, [Node(x) for x in range(1 + k)], is_map=True)

    def hook(self, i: int, j: int, k: int) -> None:
        one = self.pick(i)
        self._keep(hooked.submit(one.argument), [summed(one.nodes, 1)])

    def cache(self, i: int, j: int, k: int) -> None:
        one = self.pick(i)
        self._keep(cached.submit(one.argument, k), [summed(one.nodes, k)])

    def background(self, i: int, j: int, k: int) -> None:
        one = self.pick(i)
        self._keep(beside.submit(one.argument), [summed(one.nodes, 1)])

    # -- what ends them -----------------------------------------------------------------------
    def drop(self, i: int, j: int, k: int) -> None:
        self.held.remove(self.pick(i))

    def drop_elements(self, i: int, j: int, k: int) -> None:
        one = self.pick_map(i)
        keep = slice(j % 2, None, 2)
        one.futures, one.nodes = list(one.futures[keep]), one.nodes[keep]
        if not one.nodes:
            self.held.remove(one)

    def wait(self, i: int, j: int, k: int) -> None:
        for future in self.pick(i).futures:
            future.wait(15)

    def ask(self, i: int, j: int, k: int) -> None:
        self.check(self.pick(i))

    def cancel(self, i: int, j: int, k: int) -> None:
        one = self.pick(i)
        place = j % len(one.nodes)
        one.nodes[place].cancelled = True
        one.futures[place].cancel()

    def check(self, one: Held) -> None:
        for future, node in zip(one.futures, one.nodes, strict=True):
            value = future.result(timeout=15, raise_on_failure=False)
            name = future.state.name
            if isinstance(value, BaseException) or name == "Cancelled":
                assert not isinstance(value, errors.CrashedRun), (name, value)
                assert node.value is None or not node.is_certain, (future, name, value)
            elif (node.value is not None or node.is_certain) and not node.has_another:
                assert node.value == add_up(value), (future, name)


MAKES = [
    *("submit", "enlarge", "map", "map", "chain", "chain", "spread", "reduce"),
    *("put", "large_argument", "fail", "tolerate", "nest", "generate"),
    *("hook", "cache", "background"),
]
ENDS = ["drop", "drop", "drop_elements", "wait", "ask", "cancel"]
numbers = st.integers(0, 5)
programs = st.lists(
    st.tuples(st.sampled_from(MAKES + ENDS), numbers, numbers, numbers), min_size=1, max_size=14
)
Steps = list[tuple[str, int, int, int]]


# ------------------------------------------------------------------------------------------------- the test


def lives_and_ends(runner: TaskRunner, in_flow: InFlow, steps: Steps, patience: float) -> None:
    """Run one program; then nothing of it may be left after a time (seconds)."""
    before = leftovers.shared_files()

    def body() -> None:
        scope = context.current()
        assert scope is not None
        session = scope.session
        program = Program()
        try:
            program.run(steps)
        finally:
            note(" ".join(program.done))
            program.held.clear()
        expect_nothing(lambda: leftovers.of_session(session) + leftovers.of_runner(runner, session), patience)

    in_flow(body)
    expect_nothing(lambda: sorted(leftovers.shared_files() - before), patience)


def expect_nothing(left: Callable[[], list[str]], seconds: float) -> None:
    """Look again until nothing is left; say what it is."""
    found: list[str] = []

    def nothing() -> bool:
        gc.collect()
        found[:] = left()
        return not found

    try:
        wait_until(nothing, seconds)
    except AssertionError:
        pytest.fail(f"left behind: {found}")


class Examiner:
    """Runs programs as long as there is time, and makes one that fails smaller for a while.

    A program that has failed is not run again: its failure is told again. So even a run that finds
    something has its time.
    """

    def __init__(self, runner: TaskRunner, in_flow: InFlow, seconds: float) -> None:
        self.runner, self.in_flow, self.seconds = runner, in_flow, seconds
        self.begun = time.monotonic()
        self.failed: dict[str, str] = {}
        self.failed_at = 0.0

    def examine(self, steps: Steps) -> None:
        if repr(steps) not in self.failed:
            self._run(steps)
        if repr(steps) in self.failed:
            pytest.fail(self.failed[repr(steps)])

    def _run(self, steps: Steps) -> None:
        now = time.monotonic()
        if self.failed and now - self.failed_at > SHRINK_SECONDS:
            return
        if not self.failed and now - self.begun > self.seconds:
            event("no time left")
            return
        patience = 1.0 if self.failed else 4.0
        try:
            lives_and_ends(self.runner, self.in_flow, steps, patience)
        except (Exception, pytest.fail.Exception) as error:  # the text only: a traceback keeps what it saw
            if not self.failed:
                self.failed_at = time.monotonic()
            self.failed[repr(steps)] = "".join(traceback.format_exception(error))


def checked(runner: TaskRunner, in_flow: InFlow, examples: int, seconds: float) -> None:
    """Draw programs and run them, as many as there is time for."""
    examiner = Examiner(runner, in_flow, seconds)

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],  # to explain takes a tracer, which takes minutes
        suppress_health_check=list(HealthCheck),
    )
    @given(programs)
    def property_(steps: Steps) -> None:
        examiner.examine(steps)

    property_()


@pytest.mark.timeout(60, func_only=True)
def test_no_value_is_lost_and_none_is_left(runner: TaskRunner, in_flow: InFlow) -> None:
    checked(runner, in_flow, 60, SECONDS)


@pytest.mark.soak
@pytest.mark.timeout(900, func_only=True)
def test_no_value_is_lost_and_none_is_left_in_many_flows(runner: TaskRunner, in_flow: InFlow) -> None:
    checked(runner, in_flow, 2_000, 600.0)
