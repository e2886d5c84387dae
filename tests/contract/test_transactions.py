"""Transactions: groups of task runs that succeed together, or are taken back together."""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from penstock import (
    CommitMode,
    ConfigurationError,
    FileSystemLockManager,
    IsolationLevel,
    MemoryLockManager,
    ResultStore,
    Skip,
    Transaction,
    TransactionState,
    UnserializableResult,
    flow,
    get_transaction,
    load_result,
    task,
    transaction,
)
from penstock.cache_policies import INPUTS
from penstock.progress import Board
from penstock.runners.base import TaskRunner
from tests.conftest import InFlow
from tests.record import Record

Seen = list[tuple[Any, ...]]
HOW = pytest.mark.parametrize("how", ["submit", "call"])


class Stop(Exception):
    """What a block raises."""


@pytest.fixture
def seen() -> Seen:
    """What hooks have noted, in order."""
    return []


def noting(seen: Seen, what: str) -> Callable[[Transaction], None]:
    def hook(txn: Transaction) -> None:
        seen.append((what, txn.state.value, txn.get("where", None)))

    return hook


def writer(seen: Seen, name: str, **options: Any) -> Any:
    """Make a task whose hooks note what is done with it."""

    @task(
        name=name,
        on_commit=[noting(seen, f"commit {name}")],
        on_rollback=[noting(seen, f"rollback {name}")],
        **options,
    )
    def write(x: Any = 0) -> Any:
        if x == "fail":
            raise ValueError("as asked")
        if x == "skip":
            raise Skip("as asked")
        return x

    return write


def done(written: Any, how: str, *args: Any) -> Any:
    """Call or submit a task; of the one its value, of the other its future."""
    return written.submit(*args) if how == "submit" else written(*args)


def said(seen: Seen) -> list[str]:
    return [what for what, *_ in seen]


def names(record: Record, task_name: str) -> list[str]:
    return [row.state["name"] for row in record.tasks(task_name)]


# -- commit and rollback --------------------------------------------------------------------------


@HOW
def test_a_block_that_raises_rolls_back_in_reverse(
    in_flow: InFlow, record: Record, seen: Seen, how: str
) -> None:
    first, second = writer(seen, "first"), writer(seen, "second")

    def body() -> None:
        with transaction() as txn:
            txn.set("where", "here")
            done(first, how)
            done(second, how)
            raise Stop

    with pytest.raises(Stop):
        in_flow(body)
    assert seen == [
        ("rollback second", "ROLLED_BACK", "here"),
        ("rollback first", "ROLLED_BACK", "here"),
    ]
    for name in ("first", "second"):
        (row,) = record.tasks(name)
        assert row.names == ["Pending", "Running", "Completed", "RolledBack"]
        assert row.type == "COMPLETED"


@HOW
def test_a_block_that_ends_well_commits_in_order(
    in_flow: InFlow, record: Record, seen: Seen, how: str
) -> None:
    first, second = writer(seen, "first"), writer(seen, "second")

    def body() -> Any:
        with transaction() as txn:
            done(first, how)
            done(second, how)
            before = list(seen)
        return txn, before

    txn, before = in_flow(body)
    assert before == []
    assert txn.is_committed()
    assert said(seen) == ["commit first", "commit second"]
    assert names(record, "first") == names(record, "second") == ["Completed"]


def test_the_end_of_a_block_waits_for_what_was_submitted(in_flow: InFlow, seen: Seen) -> None:
    last = writer(seen, "last")

    def body() -> Any:
        with transaction():
            future = last.submit(last.submit(last.submit(1)))
        return future.done(), said(seen)

    assert in_flow(body) == (True, ["commit last"] * 3)


def test_the_end_of_a_block_moves_no_values(runner: TaskRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[Any] = []
    fetch = type(runner).fetch

    def noted(self: Any, refs: Any) -> Any:
        fetched.append(refs)
        return fetch(self, refs)

    monkeypatch.setattr(type(runner), "fetch", noted)

    @task
    def make(n: int) -> Any:
        return np.ones(n)

    @flow(task_runner=runner)
    def body() -> bool:
        with transaction() as txn:
            make.submit(3 << 17)
            make.map([10, 20])
        return txn.is_committed()

    assert body()
    assert fetched == []


@HOW
def test_a_task_that_fails_rolls_the_block_back(
    in_flow: InFlow, record: Record, seen: Seen, how: str
) -> None:
    good, bad = writer(seen, "good"), writer(seen, "bad")

    def body() -> Any:
        with transaction() as txn:
            done(good, how)
            with contextlib.suppress(ValueError):
                done(bad, how, "fail")
        return txn

    assert in_flow(body).is_rolled_back()
    assert said(seen) == ["rollback good"]  # the other one was never staged
    assert names(record, "good") == ["RolledBack"]
    assert names(record, "bad") == ["Failed"]


def test_a_task_that_was_tried_again_does_not(in_flow: InFlow, seen: Seen, tmp_path: Path) -> None:
    @task(retries=1, on_rollback=[noting(seen, "rollback")], on_commit=[noting(seen, "commit")])
    def shaky(mark: str) -> None:
        if not Path(mark).exists():
            Path(mark).touch()
            raise ValueError("the first time")

    def body() -> Any:
        with transaction() as txn:
            shaky.submit(str(tmp_path / "submitted"))
            shaky(str(tmp_path / "called"))
        return txn

    assert in_flow(body).is_committed()
    assert said(seen) == ["commit", "commit"]


def test_a_skipped_task_neither_commits_nor_rolls_back(in_flow: InFlow, seen: Seen) -> None:
    some = writer(seen, "some")

    def body() -> Any:
        with transaction() as txn:
            some.submit("skip")
            some.submit(1)
        return txn

    assert in_flow(body).is_committed()
    assert said(seen) == ["commit some"]


def test_all_elements_of_a_map_belong_to_the_block(in_flow: InFlow, record: Record, seen: Seen) -> None:
    many = writer(seen, "many")

    def body(last: Any) -> Any:
        with transaction() as txn:
            futures = many.map([*range(20), last])
        return txn.state, futures[0].state.name

    assert in_flow(body, 20) == (TransactionState.COMMITTED, "Completed")
    assert said(seen) == ["commit many"] * 21
    seen.clear()
    assert in_flow(body, "fail") == (TransactionState.ROLLED_BACK, "RolledBack")
    assert said(seen) == ["rollback many"] * 20
    assert names(record, "many")[21:] == ["RolledBack"] * 20 + ["Failed"]
    assert all(row.state["seconds"] is not None for row in record.tasks("many")[21:])


def test_progress_counts_each_run_once(in_flow: InFlow, record: Record, marks: Path) -> None:
    make = cached(marks)

    def body(stop: bool) -> None:
        with transaction():
            make.map(range(5))
            make.submit(7)
            make(8)
            if stop:
                raise Stop

    for stop in (True, False):
        record.events.clear()
        with contextlib.suppress(Stop):
            in_flow(body, stop)
        board = Board()
        board.fold(record.events)
        group = board.groups["make", False]
        assert (group.ended, group.total) == ({"COMPLETED": 7}, 7)


def test_a_future_has_the_new_name(in_flow: InFlow, seen: Seen) -> None:
    some = writer(seen, "some")
    kept = []

    def body() -> None:
        with transaction():
            kept.append(some.submit(7))
            raise Stop

    with pytest.raises(Stop):
        in_flow(body)
    assert (kept[0].state.name, kept[0].state.is_completed()) == ("RolledBack", True)


# -- a task of its own ------------------------------------------------------------------------------


@HOW
def test_a_task_outside_of_blocks_commits_when_it_has_completed(
    in_flow: InFlow, seen: Seen, how: str
) -> None:
    alone = writer(seen, "alone")

    def body() -> Any:
        value = done(alone, how, 3)
        if how == "submit":
            value = value.result()
        with contextlib.suppress(ValueError):
            failed = done(alone, how, "fail")
            failed.result()
        return value, said(seen)

    assert in_flow(body) == (3, ["commit alone"])


@HOW
def test_a_commit_hook_that_fails_rolls_its_run_back(
    in_flow: InFlow, record: Record, seen: Seen, how: str
) -> None:
    alone = writer(seen, "alone")

    @alone.on_commit
    def break_down(txn: Transaction) -> None:
        raise ValueError("no commit")

    def body() -> Any:
        value = done(alone, how, 3)
        return value.result() if how == "submit" else value

    assert in_flow(body) == 3
    assert said(seen) == ["commit alone", "rollback alone"]
    (row,) = record.tasks("alone")
    assert row.state["name"] == "RolledBack"
    assert any("rolled back instead of committed: ValueError: no commit" in line for line in row.logs)


def test_hooks_may_be_coroutines_and_one_that_fails_stops_no_other(
    in_flow: InFlow, record: Record, seen: Seen
) -> None:
    @task
    def some() -> None:
        pass

    @some.on_rollback
    async def last(txn: Transaction) -> None:
        await asyncio.sleep(0)
        seen.append(("last",))

    @some.on_rollback
    def first(txn: Transaction) -> None:
        seen.append(("first",))
        raise ValueError("broken hook")

    def body() -> None:
        with transaction():
            some.submit()
            raise Stop

    with pytest.raises(Stop):
        in_flow(body)
    assert seen == [("first",), ("last",)]
    assert any("raised ValueError: broken hook" in line for line in record.tasks("some")[0].logs)


def test_what_hooks_call_is_no_part_of_the_transaction(in_flow: InFlow, record: Record) -> None:
    @task
    def cleanup() -> None:
        pass

    @task(on_rollback=[lambda txn: cleanup()])
    def some() -> None:
        pass

    def body() -> None:
        with transaction():
            some.submit()
            raise Stop

    with pytest.raises(Stop):
        in_flow(body)
    assert names(record, "cleanup") == ["Completed"]


@pytest.mark.parametrize("kind", ["on_commit", "on_rollback"])
def test_hooks_are_a_list_of_callables(kind: str) -> None:
    with pytest.raises(TypeError, match=f"Expected iterable for '{kind}'; got function instead"):
        task(**{kind: lambda txn: None})(lambda: None)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=f"Expected callables in '{kind}'; got str instead"):
        task(**{kind: ["hook"]})(lambda: None)  # type: ignore[call-overload]
    plain = task(lambda: None)
    assert getattr(plain, f"{kind}_hooks") == []
    options: dict[str, Any] = {kind: [print]}
    hooked = plain.with_options(**options)
    assert getattr(hooked, f"{kind}_hooks") == [print]


# -- nested blocks, modes -------------------------------------------------------------------------


def test_nested_blocks_commit_with_the_outermost(in_flow: InFlow, seen: Seen) -> None:
    some = writer(seen, "some")

    def body() -> Any:
        with transaction() as outer:
            with transaction() as inner:
                some.submit()
            between = (inner.state, list(seen))
        return between, inner.state, outer.state

    committed = TransactionState.COMMITTED
    assert in_flow(body) == ((TransactionState.ACTIVE, []), committed, committed)
    assert said(seen) == ["commit some"]


def test_nested_blocks_are_rolled_back_with_the_outermost(in_flow: InFlow, seen: Seen) -> None:
    one, two, three = (writer(seen, name) for name in ("one", "two", "three"))

    def body() -> None:
        with transaction() as outer:
            outer.stage(None, on_rollback_hooks=[noting(seen, "outer")])
            one.submit()
            with transaction() as inner:
                inner.stage(None, on_rollback_hooks=[noting(seen, "inner")])
                two.submit()
            three.submit()
            raise Stop

    with pytest.raises(Stop):
        in_flow(body)
    assert said(seen) == ["outer", "rollback three", "inner", "rollback two", "rollback one"]


def test_a_nested_block_that_raises_takes_the_outer_one_with_it(in_flow: InFlow, seen: Seen) -> None:
    some = writer(seen, "some")

    def body() -> Any:
        with transaction() as outer:
            some.submit()
            with contextlib.suppress(Stop), transaction() as inner:
                raise Stop
        return outer.is_rolled_back(), inner.is_rolled_back()

    assert in_flow(body) == (True, True)
    assert said(seen) == ["rollback some"]


@HOW
def test_eager_commits_at_its_own_end(in_flow: InFlow, record: Record, seen: Seen, how: str) -> None:
    some = writer(seen, "some")

    def body() -> None:
        with transaction():
            with transaction(commit_mode=CommitMode.EAGER):
                done(some, how)
            assert said(seen) == ["commit some"]
            raise Stop

    with pytest.raises(Stop):
        in_flow(body)
    assert said(seen) == ["commit some"]
    assert names(record, "some") == ["Completed"]


def test_the_mode_is_inherited(in_flow: InFlow) -> None:
    def body() -> Any:
        with (
            transaction(commit_mode=CommitMode.EAGER, isolation_level=IsolationLevel.SERIALIZABLE),
            transaction() as inner,
        ):
            pass
        with transaction() as top:
            pass
        return inner.commit_mode, inner.isolation_level, top.commit_mode, top.isolation_level

    serial, default = IsolationLevel.SERIALIZABLE, IsolationLevel.READ_COMMITTED
    assert in_flow(body) == (CommitMode.EAGER, serial, CommitMode.LAZY, default)


def test_off_is_committed_by_hand_or_not_at_all(in_flow: InFlow, seen: Seen) -> None:
    some = writer(seen, "some")

    def body(by_hand: bool) -> Any:
        with transaction(commit_mode=CommitMode.OFF) as txn:
            some.submit()
            if by_hand:
                assert txn.commit()
                some.submit()  # what comes later shares what was decided
        return txn.state

    assert in_flow(body, True) is TransactionState.COMMITTED
    assert said(seen) == ["commit some"] * 2
    seen.clear()
    assert in_flow(body, False) is TransactionState.ROLLED_BACK
    assert said(seen) == ["rollback some"]


def test_rollback_by_hand(in_flow: InFlow, seen: Seen) -> None:
    some = writer(seen, "some")

    def body() -> Any:
        with transaction() as txn:
            some.submit()
            assert txn.rollback()
            assert not txn.commit()
        return txn.state

    assert in_flow(body) is TransactionState.ROLLED_BACK
    assert said(seen) == ["rollback some"]


# -- values -----------------------------------------------------------------------------------------


def test_values_are_copied_to_what_is_inside(in_flow: InFlow) -> None:
    def body() -> Any:
        with transaction() as outer:
            outer.set("a", [1])
            with transaction() as inner:
                inner.get("a").append(2)
                inner.set("b", 3)
            assert outer.get("b", "nothing") == "nothing"
            with pytest.raises(ValueError, match="Could not retrieve value for unknown key: b"):
                outer.get("b")
        return outer.get("a"), inner.get("a"), inner.get("b")

    assert in_flow(body) == ([1], [1, 2], 3)


@HOW
def test_a_task_sees_the_values_and_its_hooks_what_it_sets(in_flow: InFlow, seen: Seen, how: str) -> None:
    @task
    def some(x: int) -> Any:
        txn = get_transaction()
        assert txn is not None
        txn.set("made", f"{txn.get('where')}-{x}")
        return txn.get("where")

    @some.on_rollback
    def remove(txn: Transaction) -> None:
        seen.append((txn.get("where"), txn.get("made")))

    def body() -> Any:
        with contextlib.suppress(Stop), transaction() as txn:
            txn.set("where", "before")
            first = done(some, how, 1)
            txn.set("where", "after")
            raise Stop
        return first.result() if how == "submit" else first

    assert in_flow(body) == "before"
    assert seen == [("before", "before-1")]


def test_elements_of_a_map_see_the_values(in_flow: InFlow, seen: Seen) -> None:
    @task(on_commit=[lambda txn: seen.append((txn.get("made"),))])
    def some(x: int) -> Any:
        txn = get_transaction()
        assert txn is not None
        txn.set("made", x)
        return txn.get("where")

    def body() -> Any:
        with transaction() as txn:
            txn.set("where", "here")
            futures = some.map(range(5))
        return futures.result()

    assert in_flow(body) == ["here"] * 5
    assert seen == [(x,) for x in range(5)]


def test_there_is_none_outside() -> None:
    assert get_transaction() is None
    with transaction() as txn:
        assert get_transaction() is txn
        assert Transaction.get_active() is txn
    assert get_transaction() is None


# -- inside tasks -----------------------------------------------------------------------------------


@HOW
@pytest.mark.parametrize("ending", ["well", "badly"])
def test_what_a_task_opens_is_decided_when_it_ends(
    in_flow: InFlow, tmp_path: Path, how: str, ending: str
) -> None:
    notes = tmp_path / "notes"

    def note(what: str) -> Callable[[Transaction], None]:
        def hook(txn: Transaction) -> None:
            with notes.open("a") as file:
                file.write(f"{what}\n")

        return hook

    @task(on_commit=[note("commit inner")], on_rollback=[note("rollback inner")])
    def inner() -> None:
        pass

    @task
    def outer() -> None:
        with transaction():
            inner.submit()
            inner()
        with notes.open("a") as file:
            file.write("end of block\n")
        if ending == "badly":
            raise Stop

    def body() -> None:
        with contextlib.suppress(Stop):
            value = done(outer, how)
            if how == "submit":
                value.wait()

    in_flow(body)
    word = "commit" if ending == "well" else "rollback"
    assert notes.read_text().split("\n") == ["end of block", f"{word} inner", f"{word} inner", ""]


# -- results that are stored ------------------------------------------------------------------------


def cached(marks: Path, **options: Any) -> Any:
    @task(**{"cache_policy": INPUTS, **options})
    def make(x: int) -> Any:
        (marks / f"{x}-{len(list(marks.iterdir()))}").touch()
        return np.full(20_000, x)

    return make


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    """Where tasks leave a file for each call of their function."""
    folder = tmp_path / "marks"
    folder.mkdir()
    return folder


@HOW
def test_results_are_found_by_others_after_the_commit_only(
    in_flow: InFlow, record: Record, marks: Path, how: str
) -> None:
    make = cached(marks)

    def body() -> Any:
        with transaction():
            done(make, how, 1)
            if how == "submit":
                make.submit(2).wait()
            before = make.with_options(name="make")
            with transaction(commit_mode=CommitMode.EAGER):
                pass
            inside = len(list(marks.iterdir()))
            assert before(1)[0] == 1  # not there yet: it is made once more
            assert len(list(marks.iterdir())) == inside + 1
        return make.submit(1).result()[0], make(1)[0]

    assert in_flow(body) == (1, 1)
    assert names(record, "make")[-2:] == ["Cached", "Cached"]
    assert {row.state["stored"] is not None for row in record.tasks("make")} == {True}
    value = load_result(record.tasks("make")[0].state["stored"])
    assert (value == np.full(20_000, 1)).all()


@HOW
def test_results_of_a_rollback_are_found_by_nobody(
    in_flow: InFlow, record: Record, marks: Path, clean_environment: Path, how: str
) -> None:
    make = cached(marks)

    def fails() -> None:
        with transaction():
            done(make, how, 1)
            if how == "submit":
                make.map([2, 3])
            raise Stop

    with pytest.raises(Stop):
        in_flow(fails)
    assert {row.state.get("stored") for row in record.tasks("make")} == {None}
    files = [path for path in (clean_environment / "storage").rglob("*") if path.is_file()]
    assert files == []
    ran = len(list(marks.iterdir()))
    assert in_flow(lambda: make.submit(1).result()[0]) == 1
    assert len(list(marks.iterdir())) == ran + 1


def test_a_cached_run_is_not_rolled_back(in_flow: InFlow, record: Record, seen: Seen, marks: Path) -> None:
    make = cached(marks)
    in_flow(lambda: make.submit(1).wait())
    hooked = make.with_options(on_rollback=[noting(seen, "rollback")], on_commit=[noting(seen, "commit")])

    def body() -> None:
        with transaction():
            hooked.submit(1)
            hooked(1)
            raise Stop

    with pytest.raises(Stop):
        in_flow(body)
    assert seen == []
    assert names(record, "make") == ["Completed", "Cached", "Cached"]


def test_named_results_appear_with_the_commit(in_flow: InFlow, tmp_path: Path) -> None:
    place = tmp_path / "results"

    @task(result_storage=place, result_storage_key="night-{parameters[n]}")
    def night(n: int) -> int:
        return n

    def body(stop: bool) -> Any:
        with transaction():
            night.submit(1).wait()
            night.map([2, 3]).wait()
            before = sorted(path.name for path in place.glob("night-?.result"))
            if stop:
                raise Stop
        return before

    with pytest.raises(Stop):
        in_flow(body, True)
    assert [path for path in place.rglob("*") if path.is_file()] == []
    assert in_flow(body, False) == []
    assert sorted(path.name for path in place.iterdir()) == [f"night-{n}.result" for n in (1, 2, 3)]
    assert load_result(place / "night-2") == 2


def test_a_commit_hook_that_fails_stores_nothing(in_flow: InFlow, marks: Path) -> None:
    def refuse(txn: Transaction) -> None:
        raise ValueError("no")

    make = cached(marks, on_commit=[refuse])

    def body() -> None:
        make.submit(1).wait()
        make(1)

    in_flow(body)
    assert len(list(marks.iterdir())) == 2


def test_values_are_freed_while_the_block_is_open(
    in_flow: InFlow, wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    import gc

    from penstock.engine.calls import TaskRun

    @task
    def make() -> Any:
        return np.ones(1000)

    def living() -> int:
        gc.collect()
        return sum(
            isinstance(one, TaskRun) and one.task is make and (one.ref is not None or one.value is not None)
            for one in gc.get_objects()
        )

    def body() -> None:
        with transaction():
            make.submit().wait()
            make()
            wait_until(lambda: living() == 0)

    in_flow(body)


# -- keys -------------------------------------------------------------------------------------------


def test_a_key_that_is_recorded_is_committed_at_once(in_flow: InFlow, tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "results")

    def body(value: Any, **options: Any) -> Any:
        with transaction("report", store=store, **options) as txn:
            before = txn.is_committed()
            if not before:
                txn.stage(value)
        record = txn.read()
        return before, record.result if record is not None else None

    assert in_flow(body, 1) == (False, 1)
    assert in_flow(body, 2) == (True, 1)
    assert in_flow(lambda: body(3, overwrite=True)) == (False, 3)
    assert in_flow(lambda: body(4, overwrite=True, write_on_commit=False)) == (False, 3)


def test_tasks_in_a_block_that_is_recorded_share_how_it_ends(in_flow: InFlow, seen: Seen) -> None:
    some = writer(seen, "some")
    ResultStore().write("report", 1)

    def body(stop: bool) -> Any:
        with transaction():
            with transaction("report") as txn:
                assert txn.is_committed()
                some.submit()
            assert seen == []
            if stop:
                raise Stop
        return txn.state

    with pytest.raises(Stop):
        in_flow(body, True)
    assert said(seen) == ["rollback some"]
    seen.clear()
    assert in_flow(body, False) is TransactionState.COMMITTED
    assert said(seen) == ["commit some"]


def test_a_rollback_writes_nothing_under_the_key(in_flow: InFlow, seen: Seen) -> None:
    def body() -> Any:
        with contextlib.suppress(Stop), transaction("report") as txn:
            txn.stage(
                1, on_rollback_hooks=[noting(seen, "rollback")], on_commit_hooks=[noting(seen, "commit")]
            )
            assert txn.is_staged()
            raise Stop
        with transaction("report") as again:
            return txn.is_rolled_back(), again.is_committed()

    assert in_flow(body) == (True, False)
    assert said(seen) == ["rollback"]


def test_a_value_that_cannot_be_stored_rolls_back(in_flow: InFlow, seen: Seen) -> None:
    some = writer(seen, "some")

    def body() -> Any:
        with transaction("report") as txn:
            some.submit()
            txn.stage(threading.Lock(), on_rollback_hooks=[noting(seen, "rollback")])
        return txn.is_rolled_back(), txn.read()

    assert in_flow(body) == (True, None)
    assert said(seen) == ["commit some", "rollback"]  # what had been committed stays so
    with pytest.raises(UnserializableResult):
        ResultStore().write("report", threading.Lock())


@pytest.mark.parametrize("kind", ["memory", "files"])
def test_serializable_blocks_come_one_after_the_other(in_flow: InFlow, tmp_path: Path, kind: str) -> None:
    manager = MemoryLockManager() if kind == "memory" else FileSystemLockManager(tmp_path / "locks")
    store = ResultStore(tmp_path / "results", lock_manager=manager)
    made = []

    def block() -> None:
        with transaction("report", store, isolation_level=IsolationLevel.SERIALIZABLE) as txn:
            if not txn.is_committed():
                made.append(1)
                txn.stage(1)

    threads = [threading.Thread(target=block) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]

    def raises() -> None:
        with transaction("other", store, isolation_level="SERIALIZABLE"):
            raise Stop

    for _ in range(2):  # the lock is given back
        with pytest.raises(Stop):
            in_flow(raises)


def test_serializable_needs_locks(in_flow: InFlow) -> None:
    def body() -> None:
        with transaction("report", isolation_level=IsolationLevel.SERIALIZABLE):
            pass

    message = "Isolation level SERIALIZABLE is not supported by provided configuration: transaction 'report'"
    with pytest.raises(ConfigurationError, match=message):
        in_flow(body)
    with pytest.raises(ConfigurationError, match="'commit_mode' must be one of EAGER, LAZY, OFF, got 'SOON'"):
        transaction(commit_mode="SOON")


def test_a_block_is_entered_once() -> None:
    with transaction() as txn, pytest.raises(RuntimeError, match="Context already entered"), txn:
        pass


# -- whatever else a block is in -------------------------------------------------------------------


def test_a_generator_that_is_mapped(in_flow: InFlow, seen: Seen) -> None:
    some = writer(seen, "some")

    def body() -> Any:
        with transaction() as txn:
            some.map(x for x in range(700))
        return txn.state, len(txn.children)

    assert in_flow(body) == (TransactionState.COMMITTED, 700)
    assert len(seen) == 700


def test_tasks_of_a_subflow_belong_to_the_block(runner: TaskRunner, seen: Seen) -> None:
    some = writer(seen, "some")

    @flow
    def inner() -> None:
        some.submit()
        some()

    @flow(task_runner=runner)
    def outer() -> None:
        with transaction():
            inner()
            raise Stop

    with pytest.raises(Stop):
        outer()
    assert said(seen) == ["rollback some"] * 2


def test_outside_of_a_flow(runner: TaskRunner, seen: Seen) -> None:
    some = writer(seen, "some")
    with runner, transaction() as txn:
        some.submit()
        some()
    assert txn.is_committed()
    assert said(seen) == ["commit some"] * 2


def test_a_plan_neither_waits_nor_decides(runner: TaskRunner, seen: Seen) -> None:
    some = writer(seen, "some")

    @flow(task_runner=runner)
    def body() -> None:
        with transaction():
            some.map(range(3))

    assert "some" in str(body.explain())
    assert seen == []


def test_a_flow_that_is_cancelled_rolls_back(
    parallel: TaskRunner, seen: Seen, tmp_path: Path, wait_until: Callable[[Callable[[], bool]], None]
) -> None:
    some = writer(seen, "some")

    @task
    def loop(started: Path) -> None:
        started.touch()
        end = time.monotonic() + 30
        while time.monotonic() < end:
            time.sleep(0.005)  # work:

    @flow
    def inner() -> None:
        with transaction():
            some.submit().wait()
            loop.submit(tmp_path / "started")

    @flow(task_runner=parallel)
    def outer() -> None:
        child = inner.submit()
        wait_until((tmp_path / "started").exists)
        child.cancel()
        child.wait()
        assert child.state.is_cancelled()

    outer()
    assert said(seen) == ["rollback some"]


def test_a_block_that_is_interrupted_does_not_wait_for_the_rest(
    parallel: TaskRunner, in_flow: InFlow, record: Record, seen: Seen, tmp_path: Path, wait_until: Any
) -> None:
    some = writer(seen, "some")

    @task
    def loop(started: Path) -> None:
        started.touch()
        end = time.monotonic() + 30
        while time.monotonic() < end:
            time.sleep(0.005)  # work:

    def body() -> None:
        with transaction():
            some.submit().wait()
            loop.submit(tmp_path / "started")
            wait_until((tmp_path / "started").exists)
            raise KeyboardInterrupt

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        in_flow(body)
    assert time.monotonic() - begun < 15
    assert said(seen) == ["rollback some"]
    assert names(record, "loop") == ["Cancelled"]


def test_a_failure_without_a_value_to_wait_for(in_flow: InFlow, seen: Seen) -> None:
    some = writer(seen, "some")

    def body() -> Any:
        with transaction() as txn:
            some.submit(some.submit("fail"))  # the second one never starts
            some.submit(1)
        return txn.state

    assert in_flow(body) is TransactionState.ROLLED_BACK
    assert said(seen) == ["rollback some"]


def test_nothing_is_asked_where_there_is_no_transaction(in_flow: InFlow) -> None:
    @task
    def plain(x: int) -> int:
        return x

    def body() -> Any:
        one, many = plain.submit(1), plain.map(range(3))
        return [future._run.transaction for future in (one, *many)]

    assert in_flow(body) == [None] * 4


# -- async ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["well", "badly"])
def test_async_flows_and_tasks(runner: TaskRunner, seen: Seen, ending: str) -> None:
    async def hook(txn: Transaction) -> None:
        await asyncio.sleep(0)
        seen.append((txn.state.value, txn.get("where")))

    @task(on_commit=[hook], on_rollback=[hook])
    async def some() -> Any:
        await asyncio.sleep(0)
        txn = get_transaction()
        assert txn is not None
        return txn.get("where")

    @flow(task_runner=runner)
    async def body() -> Any:
        async with transaction() as txn:
            txn.set("where", "here")
            some.submit()
            values = await asyncio.gather(some(), some())
            if ending == "badly":
                raise Stop
        return values

    if ending == "well":
        assert asyncio.run(body()) == ["here", "here"]
        assert seen == [("STAGED", "here")] * 3
    else:
        with pytest.raises(Stop):
            asyncio.run(body())
        assert seen == [("ROLLED_BACK", "here")] * 3


def test_a_plain_block_in_an_async_flow(runner: TaskRunner, seen: Seen) -> None:
    some = writer(seen, "some")

    @flow(task_runner=runner)
    async def body() -> bool:
        with transaction() as txn:
            some.submit()
            some()
        return txn.is_committed()

    assert asyncio.run(body())
    assert said(seen) == ["commit some"] * 2
