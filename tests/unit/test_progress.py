"""What a board makes of the events of a run, and what the display says about it in a pipe."""

import io
import time
from collections.abc import Iterator
from typing import Any

import pytest

from penstock.cli.display import Display, Lines, summary_lines
from penstock.engine.events import Bus, Event, bus, element_id, new_id
from penstock.progress import Board, Progress

ROOT = new_id()
BEGUN = 1_000.0


def event(kind: str, run: str, when: float = BEGUN, **body: Any) -> Event:
    return Event(kind, run, ROOT, when, body)


def opening() -> list[Event]:
    return [
        event("flow_run", ROOT, BEGUN - 2, name="bold-heron", flow="radio", parent_flow_run=None),
        event("state", ROOT, BEGUN - 2, of="flow", type="PENDING", name="Pending"),
        event(
            "runner",
            ROOT,
            name="dask",
            workers=2,
            threads=4,
            memory=0,
            dashboard="http://127.0.0.1:8787/status",
        ),
        event("state", ROOT, of="flow", type="RUNNING", name="Running", message=""),
    ]


def ending(when: float, kind: str = "COMPLETED", **body: Any) -> Event:
    return event("state", ROOT, when, of="flow", type=kind, name=kind.capitalize(), **body)


def task(run: str, name: str = "clean", **body: Any) -> Event:
    return event("task_run", run, task=name, name=f"{name}-{run[-4:]}", parent=None, **body)


def mapped(run: str, count: int, name: str = "image", start: int = 0, **body: Any) -> Event:
    return event("map_run", run, task=name, name=name, parent=None, start=start, count=count, **body)


def ended(run: str, when: float = BEGUN + 1, kind: str = "COMPLETED", **body: Any) -> Event:
    usual = {
        "name": kind.capitalize(),
        "seconds": 1.0,
        "nbytes": 100,
        "peak": 50,
        "started": when - 1,
        **body,
    }
    return event("state", run, when, of="task", type=kind, **usual)


def elements(run: str, index: list[int], when: float = BEGUN + 1) -> Event:
    count = len(index)
    columns = {"seconds": [1.0] * count, "nbytes": [10] * count, "peak": [70] * count}
    times = {"time": [when] * count, "started": [when - 1] * count, "attempt": [1] * count}
    return event(
        "states", run, when, of="task", type="COMPLETED", name="Completed", index=index, **columns, **times
    )


@pytest.fixture
def board() -> Board:
    found = Board()
    found.fold(opening())
    return found


def test_the_first_root_flow_run_is_followed_and_others_are_not(board: Board) -> None:
    other = new_id()
    board.fold([Event("flow_run", other, other, BEGUN, {"name": "x", "flow": "y"})])
    board.fold([Event("task_run", new_id(), other, BEGUN, {"task": "t", "name": "t"})])
    assert (board.root, board.name, board.flow) == (ROOT, "bold-heron", "radio")
    assert board.groups == {}
    assert board.slots == 4


def test_runs_of_one_name_are_one_group(board: Board) -> None:
    first, second, third = new_id(), new_id(), new_id()
    board.fold([task(first), task(second), task(third, "draw")])
    board.fold([ended(first), ended(second, kind="FAILED", message="no"), ended(third, BEGUN + 3)])
    clean, draw = board.groups.values()
    assert (clean.name, clean.total, clean.done, clean.failed, clean.nbytes) == ("clean", 2, 2, 1, 200)
    assert (clean.is_done, clean.span) == (True, 1.0)
    assert (draw.first, draw.last) == (BEGUN + 2, BEGUN + 3)


def test_the_elements_of_a_map_come_in_columns_and_one_by_one(board: Board) -> None:
    run, later = new_id(), new_id()
    board.fold([mapped(run, 10), mapped(later, 3, "reduce"), elements(run, [0, 1, 2])])
    board.fold([ended(element_id(run, 7)), ended(element_id(run, 8), kind="SKIPPED")])
    (image, reduce) = board.groups.values()
    assert (image.total, image.done, image.ended) == (10, 5, {"COMPLETED": 4, "SKIPPED": 1})
    assert image.nbytes == 3 * 10 + 2 * 100
    assert reduce.done == 0
    assert board.peak == 70


def test_maps_of_the_same_millisecond_are_told_apart(board: Board) -> None:
    stamp = new_id()
    one, two = stamp[:12] + "7" + "0" * 19, stamp[:12] + "7" + "1" * 19
    board.fold([mapped(one, 3, "one"), mapped(two, 3, "two"), ended(element_id(two, 1))])
    assert [group.done for group in board.groups.values()] == [0, 1]


def test_the_pieces_of_a_map_over_a_generator_add_up(board: Board) -> None:
    run = new_id()
    board.fold([mapped(run, 5), mapped(run, 5, start=5), ended(element_id(run, 9))])
    (group,) = board.groups.values()
    assert (group.total, group.done) == (10, 1)


def test_running_is_counted_only_where_somebody_says_so(board: Board) -> None:
    run = new_id()
    board.fold([task(run), task(new_id())])
    (group,) = board.groups.values()
    assert (group.running, board.most_running()) == (0, 2)
    running = event("state", run, of="task", type="RUNNING", name="Running")
    board.fold([running, running])
    assert group.running == 1
    board.fold([ended(run)])
    assert (group.running, board.most_running()) == (0, 1)


def test_no_more_run_at_once_than_there_are_slots(board: Board) -> None:
    board.fold([mapped(new_id(), 1000)])
    assert board.most_running() == 4


def test_another_attempt_is_counted_with_the_time_it_cost(board: Board) -> None:
    run = new_id()
    again = event("state", run, of="task", type="SCHEDULED", name="AwaitingRetry", seconds=2.0)
    board.fold([task(run), again, ended(run), ending(BEGUN + 4)])
    (group,) = board.groups.values()
    assert (group.retries, group.done, group.seconds) == (1, 1, 3.0)
    assert board.summary().overhead == 4 * 4 - 3


def test_a_run_that_never_starts_has_ended_and_is_no_task_that_ran(board: Board) -> None:
    run = new_id()
    board.fold(
        [task(run), event("state", run, of="task", type="PENDING", name="NotReady", message="upstream")]
    )
    (group,) = board.groups.values()
    assert group.is_done
    assert board.summary().tasks == 0


def test_the_figures(board: Board) -> None:
    run = new_id()
    board.fold([mapped(run, 8), elements(run, list(range(8))), ending(BEGUN + 3, driver_bytes=12)])
    figures = board.summary()
    assert (figures.state, figures.tasks, figures.failed, figures.slots) == ("Completed", 8, 0, 4)
    assert (figures.start, figures.wall) == (2.0, 3.0)
    assert figures.overhead == pytest.approx((3 * 4 - 8) / 8)
    assert (figures.worker_peak, figures.driver_bytes, figures.in_driver) == (70, 12, False)
    assert figures.driver_peak > 1 << 20


def test_time_of_a_task_that_waits_for_its_own_tasks_counts_once(board: Board) -> None:
    outer, inner, flow_row = new_id(), new_id(), new_id()
    board.fold([task(outer, "outer"), task(flow_row, "nested", child_flow_run=new_id())])
    board.fold([event("task_run", inner, task="inner", name="inner", parent=outer)])
    board.fold([ended(inner), ended(outer, seconds=5.0), ended(flow_row, seconds=7.0), ending(BEGUN + 1)])
    assert board.summary().tasks == 2
    assert board.summary().overhead == pytest.approx((4 - 1) / 2)


def test_a_failure_is_kept_with_its_name_place_and_attempt(board: Board) -> None:
    run = new_id()
    error = {"type": "ValueError", "message": "no data", "text": "…"}
    failed = ended(element_id(run, 2), kind="FAILED", error=error, worker="w1")
    board.fold([mapped(run, 3, names=["a", "b", "c"]), failed])
    (failure,) = board.failures
    assert (failure.name, failure.message, failure.worker) == ("c", "ValueError: no data", "w1")


def test_an_odd_event_is_passed_over(board: Board) -> None:
    run = new_id()
    board.fold([event("task_run", run), event("states", "nothing", index=[1]), event("news", run), task(run)])
    assert [group.total for group in board.groups.values()] == [1]


# ------------------------------------------------------------------------------------------- following a run


def test_progress_follows_the_bus_until_it_is_left() -> None:
    with Progress() as progress:
        for one in opening():
            bus.publish(one)
        assert progress.look().name == "bold-heron"
        bus.publish(ending(BEGUN + 1))
    bus.publish(ending(BEGUN + 2, "FAILED"))
    assert progress.look().state == "Completed"


def test_an_event_costs_the_publishing_thread_next_to_nothing() -> None:
    road, progress = Bus(), Progress()
    road.subscribe(progress._events.append)
    one = ended(new_id())

    def seconds() -> float:
        begun = time.perf_counter()
        for _ in range(1000):
            road.publish(one)
        return (time.perf_counter() - begun) / 1000

    assert min(seconds() for _ in range(20)) < 5e-6


def said(*parts: list[Event]) -> list[str]:
    stream = io.StringIO()
    with Display(stream) as display:
        for part in parts:
            for one in part:
                bus.publish(one)
    display.finish("penstock runs show bold-heron")
    return stream.getvalue().splitlines()


def story() -> Iterator[Event]:
    run, one = new_id(), new_id()
    yield from (
        mapped(run, 2),
        task(one),
        elements(run, [0]),
        ended(element_id(run, 1), kind="FAILED", message="no"),
    )
    yield from (ended(one), ending(BEGUN + 2, "FAILED", message="1/2 states failed."))


def test_a_pipe_gets_a_line_for_each_task_name_and_the_figures() -> None:
    lines = said(opening(), list(story()))
    assert lines[0] == f"run bold-heron  flow radio  id {ROOT[-8:]}"
    assert lines[1] == "on dask: 4 slots in 2 workers, dashboard http://127.0.0.1:8787/status"
    assert [line.split()[:2] for line in lines[2:4]] == [["image", "2/2"], ["clean", "1/1"]]
    assert "1 failed" in lines[2]
    assert lines[4] == "Failed in 2.0 s, after 2.0 s to start: 1/2 states failed."
    assert lines[-1] == "next: penstock runs show bold-heron"
    assert not any("\x1b" in line for line in lines)


def test_the_name_of_a_task_cannot_write_control_codes() -> None:
    run = new_id()
    lines = said(opening(), [task(run, "evil\x1b[31m\x07task"), ended(run), ending(BEGUN + 1)])
    assert any(line.split()[0] == "eviltask" for line in lines)


def test_nobody_reads_any_more_and_the_run_goes_on() -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with Display(Broken()) as display:
        for one in opening():
            bus.publish(one)
    display.finish()
    assert display.board.name == "bold-heron"


def test_a_quiet_display_says_nothing_and_still_counts() -> None:
    stream = io.StringIO()
    with Display(stream, quiet=True) as display:
        for one in [*opening(), *story()]:
            bus.publish(one)
    display.finish("x")
    assert stream.getvalue() == ""
    assert display.board.summary().tasks == 3


def test_a_task_name_gets_its_line_once_its_runs_have_ended(board: Board) -> None:
    stream, run = io.StringIO(), new_id()
    lines = Lines(stream)
    board.fold([task(run)])
    lines.show(board)
    assert stream.getvalue() == ""
    board.fold([ended(run)])
    lines.show(board)
    lines.show(board, last=True)
    assert stream.getvalue().split() == ["clean", "1/1", "100", "B"]


def test_tasks_in_the_driver_share_its_memory(board: Board) -> None:
    board.fold([event("runner", ROOT, name="threads", workers=1, threads=2), ending(BEGUN + 1)])
    assert any(line.endswith(", where the tasks ran") for line in summary_lines(board))
