"""What the compiler makes of a flow, and why it does not make more of it."""

import asyncio
import operator
import threading
from typing import Any

import numpy as np
import pytest

from penstock import (
    ProcessPoolTaskRunner,
    allow_failure,
    as_completed,
    errors,
    first_completed,
    flow,
    task,
    unmapped,
    wait,
)
from penstock.engine import sample
from penstock.engine.plan import Node, Plan


@task
def load(x: Any) -> Any: ...


@task
def clean(x: Any, cube: Any = None) -> Any: ...


def nodes(body: Any, *args: Any) -> dict[str, Node]:
    return {node.task: node for node in plan(body, *args).nodes}


def plan(body: Any, *args: Any) -> Plan:
    found: Plan = flow(task_runner="processes")(body).explain(*args)
    return found


def test_maps_one_to_one_are_fused_and_large_arguments_lifted() -> None:
    def body(count: int) -> None:
        clean.map(load.map(range(count)), unmapped(np.zeros(200_000)))

    found = nodes(body, 500)
    assert found["load"].count == found["clean"].count == 500
    assert found["clean"].fused_with == "load"
    assert found["clean"].upstream == ("load",)
    assert found["clean"].lifted == ("ndarray(200000,) float64 1.5 MiB (1.5 MiB)",)
    assert "automatic" in found["load"].together


def test_reasons_are_given() -> None:
    def body() -> None:
        loaded = load.map(range(100))
        load.with_options(name="single", chunk_size=1).map(loaded)
        load.with_options(name="gpu", resources={"GPU": 1}).map(loaded)
        load.with_options(name="timed", timeout_seconds=3).map(loaded)
        load.with_options(name="tolerant").map(allow_failure(loaded))
        load.with_options(name="after").map(loaded, wait_for=[clean.submit(1)])

    found = nodes(body)
    assert found["single"].not_fused == "chunk_size is 1"
    assert "resources" in found["gpu"].not_fused
    assert found["gpu"].options == "asks for GPU=1"
    assert "timeout_seconds" in found["timed"].together
    assert "allow_failure" in found["tolerant"].not_fused
    assert "not there yet" in found["after"].not_fused
    assert {node.fused_with for node in found.values()} == {""}


def test_the_plan_ends_where_a_value_is_needed() -> None:
    ran: list[int] = []

    @task
    def work(x: int) -> int:
        ran.append(x)
        return x

    def body() -> Any:
        future = work.submit(1)
        work.submit(future.result())

    found = plan(body)
    assert [node.task for node in found.nodes] == ["work"]
    assert "test_plan.py" in found.end
    assert "future.result()" in found.end
    assert "the plan ends here" in str(found)
    assert found.to_dict()["nodes"][0]["task"] == "work"
    assert ran == []


def test_explicit_chunks_are_counted() -> None:
    found = plan(lambda: load.with_options(chunk_size=10).map(range(95)))
    assert found.nodes[0].together == "in 10 chunks of up to 10"
    assert found.messages == 10


def test_a_flow_within_the_flow_opens_no_runner_and_runs_nothing() -> None:
    ran: list[int] = []

    @task
    def work(x: int) -> int:
        ran.append(x)
        return x

    @flow
    def inner(count: int) -> Any:
        return work.map(range(count))

    def body() -> None:
        clean.map(inner(30))
        inner.with_options(task_runner="sequential")(4)

    found = plan(body)
    assert [(node.task, node.count) for node in found.nodes] == [("work", 30), ("clean", 30), ("work", 4)]
    assert found.nodes[1].upstream == ("work",)
    assert found.nodes[1].fused_with == "", "the tasks of a flow have ended when it returns"
    assert "ended before" in found.nodes[1].not_fused
    assert found.end == ""
    assert ran == []


def test_each_map_has_its_own_reason() -> None:
    def body() -> None:
        loaded = load.map(range(100))
        clean.map(loaded, wait_for=[load.submit(1)])
        clean.with_options(resources={"GPU": 1}).map(loaded)

    first, second = [node for node in plan(body).nodes if node.task == "clean"]
    assert "not there yet" in first.not_fused
    assert "resources" in second.not_fused


def test_nodes_of_a_tree_in_order_of_completion_are_planned() -> None:
    def body() -> None:
        clean.submit(load.map(range(20)).reduce(sum, order="completion"))

    found = plan(body)
    assert [node.task for node in found.nodes] == ["load", "sum", "sum", "sum", "clean"]
    assert found.messages == 1 + 3 + 1


def test_an_async_flow_is_planned_up_to_its_first_value() -> None:
    async def body() -> None:
        load.submit(1)
        await asyncio.sleep(0)
        await asyncio.gather(clean.submit(2))

    found = plan(body)
    assert [node.task for node in found.nodes] == ["load", "clean"]
    assert "await asyncio.gather" in found.end


def test_threads_share_what_cannot_be_pickled_and_nothing_is_lifted() -> None:
    def body() -> None:
        clean.submit(threading.Lock(), np.zeros(200_000))

    (node,) = flow(task_runner="threads")(body).explain().nodes
    assert node.lifted == ()


def test_slots_are_those_of_the_runner_or_said_to_be_assumed() -> None:
    def body() -> None:
        load.map(range(100))

    runner = ProcessPoolTaskRunner(max_workers=7)
    assert flow(task_runner=runner)(body).explain().runner == "processes with 7 slots"
    assert not runner.is_open


def test_a_method_can_be_explained() -> None:
    class Telescope:
        @flow
        def observe(self, count: int) -> None:
            load.map(range(count))

    assert Telescope().observe.explain(30).nodes[0].count == 30


def test_what_the_flow_has_cancelled_is_not_in_the_plan() -> None:
    def body() -> None:
        load.map(range(30)).cancel()
        clean.submit(1)

    assert [node.task for node in plan(body).nodes] == ["clean"]


def test_a_notebook_shows_a_table() -> None:
    @task(name="<b>load</b>", chunk_size=4)
    def load(x: int) -> int:
        return x

    @task(chunk_size=4)
    def clean(x: int) -> int:
        return x

    def body() -> None:
        clean.map(load.map(range(10))).result()

    shown = flow(task_runner="processes")(body).explain()._repr_html_()
    assert shown.count("<tr>") == 3
    assert "&lt;b&gt;load&lt;/b&gt;" in shown
    assert "<b>load" not in shown
    assert "fused: travels with" in shown
    assert "20 task runs in at least 3 units of work" in shown
    assert "the plan ends here" in shown


def test_a_plan_goes_on_after_a_wait() -> None:
    def body() -> None:
        first = load.map(range(100))
        wait(first)
        assert all(future.state.is_completed() for future in first)
        second = clean.map(allow_failure(first))
        second.wait()
        total = load.with_options(name="total").submit(second)
        asyncio.run(total.settled())
        for future in as_completed([total]):
            load.with_options(name="last").submit(future)
        second.reduce(load.with_options(name="tree"), order="completion")

    found = plan(body)
    assert found.end == ""
    names = [node.task for node in found.nodes]
    assert names[:4] == ["load", "clean", "total", "last"]
    assert set(names[4:]) == {"tree"}
    assert next(node for node in found.nodes if node.task == "clean").not_fused


def test_a_value_ends_the_plan() -> None:
    def body() -> None:
        first = load.map(range(10))
        wait(first)
        clean.map(first[0].result())

    found = plan(body)
    assert [node.task for node in found.nodes] == ["load"]
    assert found.end.startswith("a value is needed")


def test_a_map_over_a_value_has_a_length_that_only_a_run_can_tell() -> None:
    def body() -> None:
        parts = load.map(clean.submit(1))
        cleaned = clean.map(parts)
        load.with_options(name="alone", chunk_size=1).map(cleaned, unmapped(3))
        load.with_options(name="packed", chunk_size=50).map(cleaned, wait_for=[load.submit(1)])
        load.with_options(name="both").map([1, 2, 3], cube=cleaned)
        load.with_options(name="last").submit(cleaned.reduce(load.with_options(name="tree"), fanin=4))

    @task
    def load(x: Any, cube: Any = None) -> Any: ...

    found = plan(body)
    assert found.end == ""
    shown = {node.task: node for node in found.nodes}
    assert shown["alone"].together == "elements go alone: chunk_size is 1"
    assert shown["packed"].together == "in chunks of up to 50"
    assert shown["tree"].together == "a tree, 4 values at a time"
    assert shown["tree"].upstream == ("clean",)
    assert shown["last"].upstream == ("tree",)
    assert (shown["both"].count, shown["both"].runs) == (3, 3), "maps have one length"
    mapped = found.nodes[1]
    assert (mapped.task, mapped.mapped, mapped.count, mapped.runs) == ("load", True, None, None)
    assert mapped.together.endswith("the others follow in chunks")
    assert found.nodes[2].fused_with == "load"
    assert "load x (known at run time)  <- clean" in str(found)
    assert "those whose number only a run can tell" in found._repr_html_()


def test_a_map_over_a_generator_task_is_planned() -> None:
    @task
    def spectra() -> Any:
        yield 1

    def body() -> None:
        clean.map(spectra.submit())

    assert [(node.task, node.mapped, node.count) for node in plan(body).nodes] == [
        ("spectra", False, None),
        ("clean", True, None),
    ]


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (len, "the length of a map is needed"),
        (list, "whose length only a run can tell are taken one by one"),
        (bool, "the length of a map is needed"),
        (lambda futures: futures[0], "one by one"),
        (as_completed, "one by one"),
        (first_completed, "one by one"),
        (lambda futures: tuple(futures), "one by one"),
        (lambda futures: operator.add([], futures), "one by one"),
        (lambda futures: operator.add(futures, []), "one by one"),
        (lambda futures: futures.result(), "a value is needed"),
    ],
)
def test_code_that_asks_for_the_elements_ends_the_plan(use: Any, reason: str) -> None:
    def body() -> None:
        use(load.map(clean.submit(1)))
        load.submit(2)

    found = plan(body)
    assert [node.task for node in found.nodes] == ["clean", "load"]
    assert reason in found.end


def test_a_map_of_a_million_is_planned_without_a_million_runs() -> None:
    def body(count: int) -> None:
        loaded = load.map(range(count))
        assert len(loaded) == count
        clean.map(loaded, iter(range(count)))
        load.with_options(name="fifty", chunk_size=50).map(loaded)
        load.with_options(name="gpu", resources={"GPU": 1}).map(loaded)
        loaded.reduce(load.with_options(name="tree"))
        loaded.reduce(load.with_options(name="early"), order="completion")
        load.with_options(name="few").map(loaded[:10])

    found = flow(task_runner=ProcessPoolTaskRunner(max_workers=2))(body).explain(1_000_000)
    shown = {node.task: node for node in found.nodes}
    assert found.end == ""
    assert [shown[name].runs for name in ("load", "clean", "gpu")] == [1_000_000] * 3
    assert shown["clean"].fused_with == "load"
    assert shown["load"].together.endswith("in chunks of up to 10,000")
    assert shown["fifty"].together == "in 20,000 chunks of up to 50"
    assert "chunk_size of 50 is smaller" in shown["fifty"].not_fused
    assert shown["tree"].runs == 142_860
    assert shown["tree"].together == "a tree of 142,860 runs over 1,000,000 values, 8 values at a time"
    assert shown["early"].runs == 142_857
    assert shown["few"].count == 10
    assert found.messages > 20_000 + 142_860 + 142_857


def test_a_long_map_is_planned_like_one_that_is_planned_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def body() -> None:
        loaded = load.map(range(6_000))
        clean.map(loaded)
        load.with_options(name="packed", chunk_size=70).map(range(6_000))
        loaded.reduce(load.with_options(name="tree", chunk_size=1))

    whole = plan(body)
    monkeypatch.setattr(sample, "WHOLE", 100)
    part = plan(body)
    assert part.messages == whole.messages
    assert [node for node in part.nodes if node.task != "tree"] == [
        node for node in whole.nodes if node.task != "tree"
    ]
    runs = [sum(node.runs or 0 for node in one.nodes) for one in (part, whole)]
    assert runs[0] == runs[1]


def test_lengths_that_differ_are_found_without_making_the_runs() -> None:
    def body() -> None:
        clean.map(load.map(range(1_000_000)), range(999_999))

    with pytest.raises(errors.MappingLengthMismatch, match="1000000"):
        plan(body)


def test_the_elements_of_a_long_map_are_not_taken_one_by_one() -> None:
    @flow
    def inner(x: Any) -> None:
        load.submit(x)

    def body() -> None:
        for future in load.map(range(50_000)):
            clean.submit(future)

    assert "the elements of a map of 50,000 elements are taken one by one" in plan(body).end
    assert "inner.map makes a run for each" in plan(lambda: inner.map(load.map(range(50_000)))).end


def test_states_of_a_map_are_those_of_all_its_elements() -> None:
    def body() -> None:
        load.map(range(50_000), return_state=True)

    assert "taken one by one" in plan(body).end


def test_a_long_map_is_waited_for_and_cancelled_as_a_whole() -> None:
    def body() -> None:
        loaded = load.map(range(50_000))
        wait(loaded)
        loaded.wait()
        clean.submit(loaded, wait_for=loaded)
        load.map(range(50_000)).cancel()

    found = plan(body)
    assert found.end == ""
    assert [(node.task, node.count, node.upstream) for node in found.nodes] == [
        ("load", 50_000, ()),
        ("clean", None, ("load",)),
    ]


def test_what_waits_for_the_end_of_each_element_is_counted() -> None:
    def body() -> None:
        loaded = load.with_options(chunk_size=10).map(range(100))
        clean.with_options(chunk_size=1).map(allow_failure(loaded))
        clean.submit(allow_failure(loaded[0]))

    assert plan(body).messages == 10 + 100 + 1


def test_maps_that_are_alike_are_shown_once_and_counted() -> None:
    def body() -> None:
        for _ in range(3):
            load.map(range(50))

    found = plan(body)
    assert "  load x 50, 3 times\n" in str(found)
    assert "150 task runs" in str(found)
    assert "<td>150</td>" in found._repr_html_()


def test_a_long_map_keeps_its_length_through_flows_and_containers() -> None:
    @flow
    def inner() -> Any:
        return load.map(range(50_000))

    def body() -> None:
        clean.map(inner())
        clean.submit({"all": load.map(range(50_000))})

    found = plan(body)
    assert found.end == ""
    assert [node.runs for node in found.nodes] == [50_000, 50_000, 50_000, 1]


def test_the_plan_of_the_demo_is_whole() -> None:
    pytest.importorskip("ducc0")
    from penstock.demo import radio

    found = radio.with_options(task_runner="processes").explain()
    assert [found.nodes[0].task, found.nodes[-1].task] == ["read_visibilities", "draw"]
    assert {node.task for node in found.nodes} >= {"solve_gains", "merge_gains", "image_channel", "summarise"}
