"""Results that are stored: by the worker, whole or not at all, and never loaded when damaged."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from penstock import flow, load_result, task
from penstock.engine import results
from penstock.errors import (
    ConfigurationError,
    MissingResult,
    ResultCorrupt,
    StorageRefused,
    UnserializableResult,
)
from penstock.runners.base import TaskRunner
from tests.conftest import Bench, InFlow
from tests.record import Record

SIZE = 80 << 10  # bytes; more than lies in a commit file


@task(persist_result=True)
def ramp(count: int) -> Any:
    return np.arange(count, dtype="f8")


@task
def double(x: Any) -> Any:
    return 2 * x


@task
def give(value: Any) -> Any:
    return value


def header(path: Path) -> dict[str, Any]:
    """What the first line of a commit file says."""
    line = path.read_bytes().partition(b"\n")[0]
    found: dict[str, Any] = json.loads(line.partition(b" {")[2].join([b"{", b""]))
    return found


def files(folder: Path, pattern: str = "*") -> list[Path]:
    return sorted(path for path in folder.rglob(pattern) if path.is_file())


@pytest.fixture
def home(clean_environment: Path) -> Path:
    """Where results go by default."""
    return clean_environment / "storage"


# -- written by the worker ----------------------------------------------------------------------


def test_the_worker_writes_and_no_byte_comes_here(
    runner: TaskRunner, in_flow: InFlow, record: Record, home: Path
) -> None:
    def body() -> None:
        future = ramp.submit(SIZE)
        future.wait()
        double.submit(future).wait()

    in_flow(body)
    row = record.task("ramp")
    stored = Path(row.state["stored"])
    assert stored.parent == home / row.body["flow_run"]
    assert (header(stored)["pid"] == os.getpid()) is runner.info.in_process
    assert header(stored)["run"] == row.id
    assert header(stored)["nbytes"] == SIZE * 8 + 128
    assert record.flow().state["driver_bytes"] == 0
    assert {*files(home)} == {stored, *files(home, "*.npy")}  # only the one that asked for it
    assert np.load(files(home, "*.npy")[0])[-1] == SIZE - 1  # the format's own tools read it


def test_what_is_recorded_as_completed_is_stored(in_flow: InFlow, home: Path) -> None:
    seen: list[bool] = []

    def body() -> None:
        future = ramp.submit(SIZE)
        future.wait()
        seen.append(Path(future.state.state_details["stored"]).exists())

    in_flow(body)
    assert seen == [True]


def test_a_direct_call_stores_too(in_flow: InFlow, record: Record) -> None:
    assert in_flow(lambda: float(ramp(10)[9])) == 9.0
    assert load_result(record.task("ramp").state["stored"]).shape == (10,)


def test_elements_of_a_map_are_stored_one_by_one(in_flow: InFlow, record: Record, home: Path) -> None:
    futures: list[Any] = []

    def body() -> None:
        futures.extend(ramp.map(range(5)))
        for future in futures:
            future.wait()

    in_flow(body)
    assert {header(path)["run"] for path in files(home, "*.result")} == {one.task_run_id for one in futures}
    assert [len(results.load(future._run)) for future in futures] == list(range(5))


@pytest.mark.parametrize("key", [None, "{task.name}/{index}"], ids=["own", "named"])
def test_elements_that_go_together_are_stored_and_fail_one_by_one(
    in_flow: InFlow, record: Record, home: Path, key: str | None
) -> None:
    @task(result_serializer="json", result_storage_key=key, chunk_size=5)
    def odd(x: int) -> Any:
        return (x,) if x == 7 else [x]

    def body() -> list[Any]:
        return [future.result(raise_on_failure=False) for future in odd.map(range(20))]

    found = in_flow(body)
    assert isinstance(found.pop(7), UnserializableResult)
    assert found == [[x] for x in range(20) if x != 7]
    rows = record.tasks("odd")
    assert [row.type for row in rows] == ["FAILED" if x == 7 else "COMPLETED" for x in range(20)]
    stored = [row.state.get("stored") for row in rows]
    assert stored.pop(7) is None
    assert [load_result(str(where)) for where in stored] == found
    assert len(files(home, "*.result")) == 19
    if key is not None:
        assert stored[3] == str(home / "odd" / "3.result")


def test_tasks_that_tasks_submit_are_stored_by_the_same_rules(
    runner: TaskRunner, record: Record, tmp_path: Path
) -> None:
    @task(persist_result=False)
    def parent() -> float:
        return float(double.submit(4).result())

    def body() -> float:
        return parent.submit().result()

    assert flow(task_runner=runner, result_storage=tmp_path)(body)() == 8.0
    assert load_result(record.task("double").state["stored"]) == 8
    assert "stored" not in record.task("parent").state
    assert record.task("double").state["stored"].startswith(str(tmp_path))


# -- read again -----------------------------------------------------------------------------------


def test_results_are_there_after_the_runner_has_closed(
    runner_name: str, bench: Bench, clean_environment: Path
) -> None:
    runner = bench.open(runner_name)
    kept: list[Any] = []

    def body() -> None:
        kept.extend([ramp.submit(2 * SIZE), *ramp.map([3, 4])])
        kept.append(double.submit(kept[0]))
        for future in kept:
            future.wait()
        kept.append(kept[0].state)

    flow(task_runner=runner)(body)()
    bench.close()
    *stored, unstored, state = kept
    assert [len(future.result()) for future in stored] == [2 * SIZE, 3, 4]
    assert state.result()[-1] == 2 * SIZE - 1
    if not runner.info.in_process:
        with pytest.raises(MissingResult, match=r"'double' \(.*persist_result=True") as caught:
            unstored.result()
        assert caught.value.run_id == unstored.task_run_id


def test_a_stored_copy_takes_the_place_of_a_lost_value(apart: TaskRunner, in_flow: InFlow) -> None:
    def body() -> tuple[int, float]:
        stored, kept, unstored = ramp.submit(SIZE), ramp.submit(5), double.submit(1)
        for future in (stored, kept, unstored):
            future.wait()
        apart.release([stored._run.ref, unstored._run.ref])  # type: ignore[list-item]
        assert unstored.result() == 2  # made again
        return len(stored.result()), float(kept.result()[4])

    assert in_flow(body) == (SIZE, 4.0)


def test_a_copy_that_is_gone_is_missed_by_name(in_flow: InFlow, home: Path) -> None:
    futures = []

    def body() -> None:
        futures.append(ramp.submit(3))
        futures[0].wait()

    in_flow(body)
    files(home, "*.result")[0].unlink()
    with pytest.raises(MissingResult, match=r"there is no .*storage.* on host") as caught:
        results.load(futures[0]._run)
    assert caught.value.run_id == futures[0].task_run_id


# -- formats --------------------------------------------------------------------------------------


def frame() -> pd.DataFrame:
    index = pd.date_range("2026-03-28", periods=4, freq="D", tz="Europe/Paris", name="night")
    columns = {
        "flux": [1.5, float("nan"), -0.0, 1e300],
        "band": pd.Categorical(["L", "S", "L", "X"], categories=["X", "S", "L"], ordered=True),
        "count": pd.array([1, None, 3, 4], dtype="Int64"),
        "station": ["Effelsberg", "Ørsted", "", None],
    }
    return pd.DataFrame(columns, index=index)


VALUES: dict[str, Callable[[], Any]] = {
    "number": lambda: 7,
    "fortran": lambda: np.asfortranarray(np.arange(6, dtype=">f4").reshape(2, 3)),
    "times": lambda: np.array(["2026-01-01", "NaT"], "M8[us]"),
    "arrays": lambda: {"I": np.ones((2, 2)), "Q/U": np.array(1j)},
    "frame": frame,
    "mixed": lambda: {"plane": np.zeros(SIZE, "f4"), "beam": (1, 2)},
}
FORMATS = {"number": "pickle", "fortran": "npy", "times": "npy", "arrays": "npz", "frame": "arrow"}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray):
        order = one.flags.f_contiguous == other.flags.f_contiguous
        return bool(
            one.dtype == other.dtype
            and order
            and np.array_equal(one, other, equal_nan=one.dtype.kind in "fcmM")
        )
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, pd.DataFrame):
        pd.testing.assert_frame_equal(one, other)
        return True
    return type(one) is type(other) and bool(one == other)


@pytest.mark.parametrize("name", list(VALUES))
def test_values_come_back_as_they_were(in_flow: InFlow, record: Record, name: str) -> None:
    make = VALUES[name]

    @task(persist_result=True)
    def made() -> Any:
        return make()

    in_flow(lambda: made.submit().wait())
    stored = record.task("made").state["stored"]
    assert header(Path(stored))["format"] == FORMATS.get(name, "pickle")
    assert same(make(), load_result(stored))


@pytest.mark.parametrize(
    "wish", ["pickle", "json", "compressed/json", "compressed/pickle", "parquet", "arrow", "npy", "zarr"]
)
def test_a_format_can_be_chosen(in_flow: InFlow, record: Record, home: Path, wish: str) -> None:
    value: Any = {"a": [1, 2.5, None]}
    if wish in {"parquet", "arrow"}:
        value = frame()
    elif wish in {"npy", "zarr"}:
        value = np.arange(6).reshape(2, 3)

    @task(result_serializer=wish)
    def made() -> Any:
        return value

    in_flow(lambda: made.submit().wait())
    assert same(value, load_result(record.task("made").state["stored"]))
    (data,) = [path for path in files(home) if path.suffix != ".result"]  # for other programs to read
    assert data.name.startswith(Path(record.task("made").state["stored"]).stem)


def test_a_value_that_does_not_fit_fails_with_its_reason(in_flow: InFlow, record: Record, home: Path) -> None:
    tuples = give.with_options(result_serializer="json", name="tuples")
    locks = task(result_storage=home)(lambda: {"a": [threading.Lock()]}).with_options(name="locks")

    def body() -> None:
        wrong, good = tuples.submit({"pair": [(1, 2)]}), ramp.submit(2)
        with pytest.raises(
            UnserializableResult, match=r"cannot be stored as json: .*\['pair'\]\[0\].* tuple"
        ):
            wrong.result()
        with pytest.raises(UnserializableResult, match=r"as pickle: its part \['a'\]\[0\] is of type lock"):
            locks.submit().result()
        good.result()

    in_flow(body)
    assert record.task("tuples").state["cause"] == "UnserializableResult"
    assert record.types("tuples") == record.types("locks") == ["FAILED"]
    assert record.types("ramp") == ["COMPLETED"]
    assert len(files(home)) == 1


# -- damage ---------------------------------------------------------------------------------------


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x20
    path.write_bytes(data)


@pytest.mark.parametrize("count", [5, SIZE], ids=["small", "large"])
@pytest.mark.parametrize("damage", ["head", "data", "short", "long", "empty"])
def test_a_damaged_result_is_set_aside_and_never_loaded(
    in_flow: InFlow, home: Path, damage: str, count: int
) -> None:
    futures: list[Any] = []

    def body() -> None:
        futures.append(ramp.submit(count))
        futures[0].wait()

    in_flow(body)
    (commit,) = files(home, "*.result")
    data = files(home, "*.npy")[0] if count == SIZE else commit
    if damage == "head":
        flip(commit, 60)
    elif damage == "data":
        flip(data, data.stat().st_size - 3)
    elif damage == "short":
        data.write_bytes(data.read_bytes()[:-1])
    elif damage == "long":
        data.write_bytes(data.read_bytes() + b"\0")
    else:
        data.write_bytes(b"")
    with pytest.raises(ResultCorrupt, match=r"is damaged: .*; it was set aside as \*\.corrupt") as caught:
        results.load(futures[0]._run)
    assert caught.value.run_id == futures[0].task_run_id
    assert files(home, "*.corrupt")
    assert files(home, "*.result") == []
    with pytest.raises(MissingResult):
        results.load(futures[0]._run)


# -- whole or not at all --------------------------------------------------------------------------


@task(persist_result=True, crash_retries=1)
def dies_while_it_writes(flag: str, storage: str) -> Any:
    if not os.path.exists(flag):
        Path(flag).touch()

        def strike() -> None:
            while True:
                for path in Path(storage).rglob(".*.part"):
                    if path.stat().st_size > 1 << 20:
                        os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(0.0005)  # work: it watches the file grow

        threading.Thread(target=strike, daemon=True).start()
    return np.ones(16 << 20, "u8")


@pytest.mark.timeout(90)
def test_a_writer_that_is_killed_leaves_nothing_to_be_seen(
    apart: TaskRunner, in_flow: InFlow, record: Record, home: Path, tmp_path: Path
) -> None:
    flag = str(tmp_path / "flag")

    def body() -> None:
        future = dies_while_it_writes.submit(flag, str(home))
        future.wait()
        assert future.state.is_completed()

    in_flow(body)
    row = record.task("dies_while_it_writes")
    assert row.attempt == 2
    (commit,) = files(home, "*.result")
    assert header(commit)["attempt"] == 2
    assert [path.name for path in files(home)] == sorted(
        [commit.name, header(commit)["data"].rpartition("/")[2]]
    )
    assert int(load_result(row.state["stored"]).sum()) == 16 << 20


@task(persist_result=True, retries=2)
def fails_first(folder: str) -> int:
    attempts = Path(folder)
    number = len(list(attempts.iterdir())) + 1
    (attempts / str(number)).touch()
    if number < 3:
        raise ValueError("not yet")
    return number


def test_only_the_attempt_that_completes_stores(in_flow: InFlow, record: Record, tmp_path: Path) -> None:
    assert in_flow(lambda: fails_first.submit(str(tmp_path)).result()) == 3
    stored = record.task("fails_first").state["stored"]
    assert header(Path(stored))["attempt"] == 3
    assert load_result(stored) == 3


# -- storage that refuses -------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["a file", "no such file system"])
def test_a_storage_that_refuses_fails_the_run_in_one_sentence(
    in_flow: InFlow, record: Record, tmp_path: Path, how: str
) -> None:
    storage = str(tmp_path / "file" / "below")
    if how == "a file":
        (tmp_path / "file").write_text("in the way")
    else:
        storage = "nowhere://bucket/results"
    refused = give.with_options(result_storage=storage, retries=1, name="refused")

    def body() -> list[Any]:
        bad, good = refused.submit(1), [ramp.submit(3), double.submit(4)]
        with pytest.raises(StorageRefused, match=rf"the result storage {storage} refuses: \w+: ") as caught:
            bad.result()
        assert caught.value.run_id == bad.task_run_id
        with pytest.raises(StorageRefused):
            refused.with_options(name="called")(1)
        return [future.result() for future in good]

    assert in_flow(body)[1] == 8
    row = record.task("refused")
    assert (row.type, row.state["cause"], row.attempt) == ("FAILED", "StorageRefused", 2)
    assert "\n" not in row.error["message"]


# -- options --------------------------------------------------------------------------------------


def test_large_results_only(in_flow: InFlow, record: Record, home: Path) -> None:
    some = ramp.with_options(persist_result="large")

    def body() -> None:
        for future in some.map([10, (1 << 20) // 8]):
            future.wait()

    in_flow(body)
    assert [row.state.get("stored") is not None for row in record.tasks("ramp")] == [False, True]
    assert len(files(home, "*.result")) == 1


def test_options_come_from_the_task_then_the_flow_then_the_settings(
    runner: TaskRunner, record: Record, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def body() -> None:
        double.submit(1).wait()
        double.with_options(persist_result=False, name="off").submit(1).wait()
        double.with_options(result_storage=tmp_path / "own", name="own").submit(1).wait()
        ramp.with_options(persist_result=None, name="unset").submit(1).wait()

    def stored() -> dict[str, str | None]:
        rows = record.tasks()
        found = {row.task: row.state.get("stored") for row in rows}
        record.events.clear()
        return {name: where and str(Path(where).parent.parent) for name, where in found.items()}

    own = str(tmp_path / "own")
    flow(task_runner=runner)(body)()
    assert stored() == {"double": None, "off": None, "own": own, "unset": None}
    flow(task_runner=runner, result_storage=tmp_path)(body)()
    assert stored() == {"double": str(tmp_path), "off": None, "own": own, "unset": str(tmp_path)}
    nightly = flow(task_runner=runner, result_storage=tmp_path)(body).with_options(persist_result=False)
    nightly()
    assert stored() == {"double": None, "off": None, "own": own, "unset": None}
    monkeypatch.setenv("PENSTOCK_RESULTS_PERSIST_BY_DEFAULT", "true")
    from penstock import settings

    settings.refresh()
    flow(task_runner=runner)(body)()
    assert stored() == {"double": str(home), "off": None, "own": own, "unset": str(home)}
    monkeypatch.setenv("PENSTOCK_TASKS_DEFAULT_PERSIST_RESULT", "false")  # of tasks, whatever their flow says
    settings.refresh()
    flow(task_runner=runner, persist_result=True)(body)()
    assert stored() == {"double": None, "off": None, "own": own, "unset": None}
    monkeypatch.delenv("PENSTOCK_RESULTS_PERSIST_BY_DEFAULT")
    monkeypatch.setenv("PENSTOCK_TASKS_DEFAULT_PERSIST_RESULT", "large")
    settings.refresh()
    flow(task_runner=runner, persist_result=False)(body)()
    assert stored() == {"double": None, "off": None, "own": own, "unset": None}
    flow(task_runner=runner)(lambda: ramp.submit(1 << 18).wait())()
    assert stored() == {"ramp": str(home)}


def test_a_place_can_be_named_and_the_latest_run_has_it(
    in_flow: InFlow, record: Record, tmp_path: Path
) -> None:
    named = give.with_options(
        result_storage=tmp_path, result_storage_key="{task.name}/{index}", name="latest"
    )

    def body(first: int) -> None:
        for future in named.map([first, np.full(SIZE, first)]):
            future.wait()

    in_flow(body, 1)
    old = record.tasks("latest")
    in_flow(body, 2)
    assert load_result(tmp_path / "latest" / "0.result") == 2
    assert int(load_result(tmp_path / "latest" / "1.result")[0]) == 2
    assert len(files(tmp_path)) == 3
    assert old[0].id != header(tmp_path / "latest" / "0.result")["run"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"persist_result": "some"}, "'persist_result' must be True, False, None or 'large'"),
        ({"persist_result": 1}, "'persist_result' must be True, False, None or 'large'"),
        ({"result_serializer": "yaml"}, "'result_serializer' must be one of 'auto', 'pickle'"),
        ({"result_storage": 3}, "'result_storage' must be a directory, a URL or a ResultStorage"),
        ({"result_storage_key": "{task.colour}"}, "'result_storage_key' must be a template of"),
        ({"result_storage_key": "../x"}, "'result_storage_key' must stay in the storage"),
    ],
)
def test_a_wrong_option_is_refused_at_once(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text.replace("(", r"\(")):
        task(**options)(give.fn)
    with pytest.raises(ConfigurationError, match=text.replace("(", r"\(")):
        give.with_options(**options)
