"""Who is to blame for a lost attempt, and when suspects run."""

from typing import Any

import pytest

from penstock import errors, task
from penstock.engine.calls import TaskRun
from penstock.engine.losses import EXCUSES, ROUNDS, Verdict, judge
from penstock.engine.objects import fingerprint
from penstock.engine.quarantine import PATIENCE, Quarantine


def lost(
    began: bool | None = True, shared: int = 0, kind: type[errors.CrashedRun] = errors.WorkerLost
) -> errors.CrashedRun:
    cause = kind("gone")
    cause.began, cause.shared = began, shared
    return cause


def retired() -> errors.CrashedRun:
    cause = lost()
    cause.excused = True
    return cause


@pytest.mark.parametrize(
    ("cause", "past", "expected"),
    [
        (lost(), {}, "CHARGED"),
        (lost(), {"crashes": 1}, "CRASHED"),
        (lost(), {"budget": 0}, "CRASHED"),
        (lost(None), {}, "CHARGED"),
        (lost(False), {}, "UNTOUCHED"),
        (lost(False), {"idempotent": False}, "UNTOUCHED"),
        (lost(False, 3), {"budget": 0}, "UNTOUCHED"),
        (lost(True, 3), {"budget": 0}, "SUSPECT"),
        (lost(None, 3), {"crashes": 1}, "SUSPECT"),
        (lost(True, 3), {"suspicions": ROUNDS}, "CHARGED"),
        (lost(True, 3), {"suspicions": ROUNDS, "crashes": 1}, "CRASHED"),
        (lost(True, 3), {"idempotent": False}, "CRASHED"),
        (lost(None), {"idempotent": False}, "CRASHED"),
        (lost(kind=errors.OutOfMemory), {}, "CHARGED"),
        (lost(None, kind=errors.SchedulerLost), {"crashes": 1}, "EXCUSED"),
        (retired(), {"budget": 0}, "EXCUSED"),
        (retired(), {"idempotent": False}, "CRASHED"),
        (lost(None, kind=errors.SchedulerLost), {"idempotent": False}, "CRASHED"),
        (lost(False, kind=errors.SchedulerLost), {"idempotent": False}, "UNTOUCHED"),
        (lost(None, kind=errors.SchedulerLost), {"excuses": EXCUSES, "crashes": 1}, "CRASHED"),
        (lost(False), {"excuses": EXCUSES, "crashes": 1}, "CRASHED"),
        (RuntimeError("what a runner ought not to say"), {}, "CHARGED"),
    ],
)
def test_who_pays(cause: Exception, past: dict[str, Any], expected: str) -> None:
    known = {"idempotent": True, "budget": 1, "crashes": 0, "suspicions": 0, "excuses": 0, **past}
    assert judge(cause, **known) is Verdict[expected]


def test_a_backend_that_is_gone_for_good_is_not_tried_again() -> None:
    cause = lost(False, kind=errors.SchedulerLost)
    cause.final = True
    known: dict[str, Any] = {"idempotent": True, "budget": 9, "crashes": 0, "suspicions": 0, "excuses": 0}
    assert judge(cause, **known) is Verdict.CRASHED


@task
def job() -> None: ...


def suspect(rounds: int = 1) -> TaskRun:
    run = TaskRun(job, "job")
    run.suspicions = rounds
    return run


def workers() -> int:
    return 2


def end(cell: Quarantine, *runs: TaskRun) -> None:
    for run in runs:
        run.done = True
        cell.discard(run)


def test_suspects_wait_for_the_rest_and_go_as_many_as_there_are_workers() -> None:
    cell = Quarantine()
    runs = [suspect() for _ in range(3)]
    assert all(cell.add(run) for run in runs)
    assert not cell.add(suspect(0))
    assert cell.turn(5, workers, now=0.0) == PATIENCE
    assert cell.holds
    assert not cell.due
    assert runs[0] in cell
    assert cell.turn(0, workers, now=1.0) is None
    assert cell.take() == runs[:2]
    assert cell.turn(2, workers, now=2.0) is None
    assert not cell.due, "the first two have not ended"
    end(cell, *runs[:2])
    cell.turn(0, workers, now=3.0)
    assert cell.take() == runs[2:]
    end(cell, runs[2])
    cell.turn(0, workers, now=4.0)
    assert not cell.holds
    assert not cell.waits


def test_who_was_lost_in_company_twice_goes_alone() -> None:
    cell = Quarantine()
    runs = [suspect(1), suspect(2), suspect(2), suspect(1)]
    for run in runs:
        cell.add(run)
    order = []
    for _ in runs:
        cell.turn(0, workers, now=0.0)
        if taken := cell.take():
            order.append(taken)
            end(cell, *taken)
    assert order == [[runs[0]], [runs[1]], [runs[2]], [runs[3]]]


def test_a_neighbour_that_does_not_end_is_not_waited_for_for_ever() -> None:
    cell = Quarantine()
    run = suspect()
    cell.add(run)
    assert cell.turn(1, workers, now=0.0) == PATIENCE
    assert cell.turn(1, workers, now=PATIENCE - 1) == 1
    assert cell.turn(1, workers, now=PATIENCE) is None
    assert cell.take() == [run]


def test_a_suspect_that_is_withdrawn_lets_the_others_go_on() -> None:
    cell = Quarantine()
    first, second = suspect(), suspect()
    cell.add(first)
    cell.turn(0, workers, now=0.0)
    cell.discard(first)
    assert not cell.due
    cell.add(second)
    cell.turn(0, workers, now=0.0)
    assert cell.take() == [second]
    cell.discard(second)
    cell.turn(0, workers, now=0.0)
    assert not cell.holds


def test_a_changed_object_has_another_fingerprint() -> None:
    import numpy as np

    array = np.arange(1000.0)
    before = fingerprint(array)
    array[3] = -1
    assert before != fingerprint(array)
    assert fingerprint(b"abc") == fingerprint(b"abc")
    assert fingerprint([1, 2]) is None
    assert fingerprint(np.array([[], {}], dtype=object)) is None
    assert fingerprint(np.arange(10.0)[::2]) is None
