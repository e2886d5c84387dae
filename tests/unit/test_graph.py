"""Who waits for whom: on backends that know dependencies, and on those that do not."""

from typing import Any

import hypothesis
from hypothesis import strategies as st

from penstock.engine.calls import Call, Source, TaskRun
from penstock.engine.graph import Graph, sources_of
from penstock.engine.states import Position, StateType
from penstock.engine.task import task


@task
def work() -> None: ...


SESSION: Any = object()


def run(*upstreams: TaskRun, tolerant: bool = False, after: tuple[TaskRun, ...] = ()) -> TaskRun:
    made = TaskRun(work, "work")
    made.session = SESSION
    sources = tuple(Source(upstream, None, tolerant) for upstream in upstreams)
    made.call = Call(work, None, None, sources, tuple(Source(upstream) for upstream in after))
    return made


def end(
    graph: Graph, one: TaskRun, kind: StateType = StateType.COMPLETED
) -> tuple[list[TaskRun], list[TaskRun]]:
    one.position = Position(kind, "", 1)
    one.done = True
    return graph.ended(one)


def test_a_run_without_upstreams_waits_for_nothing() -> None:
    one = run()
    assert Graph(native=False).add(one) is None
    assert (one.waiting, one.depth) == (0, 0)


def test_ends_let_dependants_go() -> None:
    graph, first, second = Graph(native=False), run(), run()
    third = run(first, after=(second,))
    for one in (first, second, third):
        graph.add(one)
    assert (third.waiting, third.depth) == (2, 1)
    assert [source.run for source in sources_of(third)] == [first, second]
    assert end(graph, first) == ([], [])
    assert end(graph, second) == ([third], [])


def test_a_failure_is_passed_on_and_tolerated() -> None:
    graph, first = Graph(native=False), run()
    strict, tolerant = run(first), run(first, tolerant=True)
    for one in (first, strict, tolerant):
        graph.add(one)
    assert end(graph, first, StateType.FAILED) == ([tolerant], [strict])


def test_an_upstream_that_has_ended() -> None:
    graph, good, bad = Graph(native=False), run(), run()
    graph.add(good)
    graph.add(bad)
    end(graph, good)
    end(graph, bad, StateType.FAILED)
    after_good, after_bad, tolerant = run(good), run(bad), run(bad, tolerant=True)
    assert graph.add(after_good) is None
    assert graph.add(after_bad) is bad
    assert graph.add(tolerant) is None
    assert (after_good.waiting, tolerant.waiting) == (0, 0)


def test_a_native_backend_gets_dependants_ahead() -> None:
    graph, first = Graph(native=True), run()
    second, third = run(first), run(first, tolerant=True)
    for one in (first, second, third):
        graph.add(one)
    first.released = True
    assert list(graph.released(first)) == [second]
    late = run(first)
    graph.add(late)
    assert (late.waiting, third.waiting) == (0, 1)
    assert end(graph, first) == ([third], [])


def test_what_was_sent_ahead_is_recalled() -> None:
    graph, first = Graph(native=True), run()
    second = run(first)
    third = run(second)
    for one in (first, second, third):
        graph.add(one)
    pending = [first]
    while pending:
        one = pending.pop()
        one.released = True
        pending.extend(graph.released(one))
    assert (second.waiting, third.waiting) == (0, 0)
    assert graph.recalled(first) == [second, third]
    assert (second.waiting, third.waiting) == (1, 1)
    assert not second.released
    assert list(graph.released(first)) == [second]


@hypothesis.given(st.lists(st.sets(st.integers(0, 30), max_size=4), min_size=1, max_size=20), st.booleans())
def test_every_run_of_an_acyclic_graph_gets_its_turn_once(shape: list[set[int]], native: bool) -> None:
    graph = Graph(native=native)
    runs: list[TaskRun] = []
    ready: list[TaskRun] = []
    for position, wishes in enumerate(shape):
        made = run(*(runs[wish % position] for wish in wishes if position))
        graph.add(made)
        runs.append(made)
        if made.waiting == 0:
            ready.append(made)
    done = []
    while ready:
        one = ready.pop()
        one.released = True
        ready.extend(graph.released(one))
        done.append(one)
        ready.extend(end(graph, one)[0])
    assert sorted(map(id, done)) == sorted(map(id, runs))
