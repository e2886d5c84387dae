"""Stored results: one commit per run, damage of every kind, what killed writers leave behind."""

import errno
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import xarray as xr

from penstock import settings
from penstock.runners.worker import result_formats, result_store
from penstock.runners.worker.commit import commit
from penstock.runners.worker.execution import execute

RUN = "01" * 16


def order(folder: Path, wish: str = "auto", key: str = "flow/{run}") -> dict[str, Any]:
    return {"storage": str(folder), "options": {}, "key": key, "format": wish, "over": 0}


def where(folder: Path, run: str = RUN) -> dict[str, Any]:
    return {"storage": str(folder), "key": f"flow/{run}"}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def round_trip(tmp_path: Path, value: Any, wish: str = "auto") -> tuple[str, Any]:
    _, said = result_store.commit(value, order(tmp_path, wish), os.urandom(4).hex(), 1)
    return said["format"], result_store.load(said)


# -- formats --------------------------------------------------------------------------------------

ARRAYS = [
    np.asfortranarray(np.arange(12.0).reshape(3, 4)),
    np.arange(12.0).reshape(3, 4)[::2, ::2],
    np.array(3),
    np.zeros((0, 3)),
    np.array(["2020", "NaT"], "M8[ns]"),
    np.array(["a", "Ørsted"]),
    np.zeros(3, [("a", "i4"), ("b", "f8", (2,))]),
    np.array([1 + 2j], ">c8"),
    np.array([True, False]),
    np.arange(100_000),
]


@pytest.mark.parametrize("value", ARRAYS, ids=[f"{one.dtype.str}-{one.shape}" for one in ARRAYS])
@pytest.mark.parametrize("wish", ["auto", "zarr"])
def test_arrays(tmp_path: Path, value: Any, wish: str) -> None:
    if wish == "zarr" and value.dtype.names:  # its nested records are beyond zarr
        with pytest.raises(result_formats.Unserializable, match="cannot be stored as zarr"):
            round_trip(tmp_path, value, wish)
        return
    format, back = round_trip(tmp_path, value, wish)
    assert format == ("npy" if wish == "auto" else "zarr")
    assert (back.dtype, back.shape) == (value.dtype, value.shape)
    assert back.flags.f_contiguous == value.flags.f_contiguous or not value.flags.c_contiguous
    assert back.tobytes() == value.tobytes()
    back[...] = back  # it can be written to


@pytest.mark.parametrize(
    ("value", "format"),
    [
        ([np.ones(2), np.zeros((2, 2), "i1")], "npz"),
        ((np.ones(2),), "npz"),
        ({"b": np.ones(2), "a/c": np.zeros(1)}, "npz"),
        ({1: np.ones(2)}, "pickle"),
        ([np.array([{}])], "pickle"),
        (np.ma.masked_array([1, 2], [True, False]), "pickle"),
        (np.float32(1), "pickle"),
        ([], "pickle"),
    ],
)
def test_collections_of_arrays(tmp_path: Path, value: Any, format: str) -> None:
    found, back = round_trip(tmp_path, value)
    assert found == format
    assert type(back) is type(value)
    assert repr(back) == repr(value)


def test_an_array_that_stands_twice_in_a_list_still_does(tmp_path: Path) -> None:
    array = np.ones(3)
    _, back = round_trip(tmp_path, [array, array])
    assert back[0] is back[1]


DAYS = pd.date_range("2020-03-28", periods=3, freq="D", tz="Europe/Paris")
FRAMES = {
    "all": pd.DataFrame(
        {
            "a": [1, 2, 3],
            "s": ["x", "y", None],
            "c": pd.Categorical(["u", "v", "u"]),
            "n": pd.array([1, None, 3], "Int64"),
        },
        index=DAYS,
    ),
    "range": pd.DataFrame({"a": [1.0, np.nan]}, index=pd.RangeIndex(4, 8, 2)),
    "numbers": pd.DataFrame({0: [1], 1: [2]}),
    "lists": pd.DataFrame({"o": [[1], (2,)]}),
    "seconds": pd.DataFrame({"t": pd.to_datetime(["2020-01-01"]).astype("M8[s]")}),
    "levels": pd.DataFrame(
        {"a": [1, 2]}, index=pd.MultiIndex.from_tuples([(1, "x"), (2, "y")], names=["i", None])
    ),
    "periods": pd.DataFrame({"p": pd.period_range("2020", periods=2, freq="M")}),
    "empty": pd.DataFrame(),
}


@pytest.mark.parametrize("name", list(FRAMES))
@pytest.mark.parametrize("wish", ["auto", "arrow", "parquet"])
def test_frames(tmp_path: Path, name: str, wish: str) -> None:
    frame = FRAMES[name]
    beyond = {"numbers", "empty"} | ({"seconds"} if wish == "parquet" else set())
    if wish != "auto" and (name in beyond or name == "lists"):
        if name == "lists":
            pytest.skip("columns of objects are up to whoever asks for Arrow")
        with pytest.raises(result_formats.Unserializable, match=f"cannot be stored as {wish}"):
            round_trip(tmp_path, frame, wish)
        return
    format, back = round_trip(tmp_path, frame, wish)
    if wish == "auto":
        assert (format == "pickle") is (name in {"numbers", "empty", "lists"})
    pd.testing.assert_frame_equal(back, frame)


def test_attributes_of_a_frame_are_kept(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": [1]})
    frame.attrs["unit"] = ("Jy", 1)
    assert round_trip(tmp_path, frame)[1].attrs == {"unit": ("Jy", 1)}


@pytest.mark.parametrize("wish", ["auto", "arrow", "parquet"])
def test_frames_of_polars_and_tables_of_arrow(tmp_path: Path, wish: str) -> None:
    frame = pl.DataFrame({"a": [1, None], "c": pl.Series(["x", "y"], dtype=pl.Categorical)})
    _, back = round_trip(tmp_path, frame, wish)
    assert back.equals(frame)
    assert back.schema == frame.schema
    table = pa.table({"x": [1, 2], "y": [["a"], None]})
    assert round_trip(tmp_path, table, wish)[1].equals(table)


def test_objects_of_xarray(tmp_path: Path) -> None:
    data = xr.Dataset(
        {"v": (("t", "x"), np.random.rand(3, 2), {"unit": "Jy"}), "i": ("x", [1, 2])},
        coords={"t": pd.date_range("2020", periods=3), "x": ["a", "b"]},
        attrs={"station": 1},
    )
    for value in (data, data.v, data.v.rename(None), data.t):
        format, back = round_trip(tmp_path, value)
        assert format == "zarr"
        xr.testing.assert_identical(back, value)
        assert {n: c.dtype for n, c in back.coords.items()} == {n: c.dtype for n, c in value.coords.items()}
    odd = data.assign_attrs(pair=(1, 2))  # zarr would give a list back
    format, back = round_trip(tmp_path, odd)
    assert format == "pickle"
    xr.testing.assert_identical(back, odd)


def test_the_settings_know_the_formats() -> None:
    assert settings.FORMATS == result_formats.NAMES


def test_a_missing_library_is_named_with_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(result_formats.Missing, match=r"needs zarr where the task runs.*: pip install zarr"):
        round_trip(tmp_path, np.ones(3), "zarr")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(result_formats.Missing, match=r"not installed here: pip install 'penstock\[s3\]'"):
        result_store.commit(1, {**order(tmp_path), "storage": "s3://bucket/without-s3fs"}, RUN, 1)


# -- one commit per run ---------------------------------------------------------------------------


def test_the_first_commit_wins_and_its_value_is_the_runs(tmp_path: Path) -> None:
    first, said = result_store.commit("first", order(tmp_path), RUN, 1)
    again, noted = result_store.commit(np.ones(100_000), order(tmp_path), RUN, 2)
    assert (first, again) == ("first", "first")
    assert noted == {**said, "duplicate": True}
    assert names(tmp_path) == [f"{RUN}.result"]


def test_of_many_writers_at_once_one_commits(tmp_path: Path) -> None:
    start = threading.Barrier(8)
    found: list[Any] = []

    def write(number: int) -> None:
        value = np.full(100_000, number)
        start.wait()
        back, said = result_store.commit(value, order(tmp_path), RUN, 1)
        found.append((int(back[0]), said.get("duplicate", False)))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(duplicate for _, duplicate in found) == [False] + [True] * 7
    assert len({value for value, _ in found}) == 1
    assert len(names(tmp_path)) == 2


def test_a_commit_whose_answer_got_lost_is_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = result_store.Folder.commit

    def deaf(*args: Any, **options: Any) -> bool:
        commit(*args, **options)
        return False

    monkeypatch.setattr(result_store.Folder, "commit", deaf)
    value = np.ones(100_000)
    back, said = result_store.commit(value, order(tmp_path), RUN, 1)
    assert back is value
    assert "duplicate" not in said
    assert result_store.load(said).sum() == 100_000


def test_a_duplicate_of_a_damaged_result_takes_its_place(tmp_path: Path) -> None:
    result_store.commit(np.ones(100_000), order(tmp_path), RUN, 1)
    data = next((tmp_path / "flow").glob("*.npy"))
    data.write_bytes(bytes(data.stat().st_size))
    value, said = result_store.commit("second", order(tmp_path), RUN, 1)
    assert value == "second"
    assert result_store.load(said) == "second"


def test_without_hard_links_a_result_is_stored_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    result_store.commit(5, order(tmp_path), RUN, 1)
    assert result_store.commit(6, order(tmp_path), RUN, 1)[0] == 5
    assert names(tmp_path) == [f"{RUN}.result"]


def test_an_attempt_after_a_commit_does_not_run_again(tmp_path: Path) -> None:
    """The worker died right after it had stored, so nobody had heard of it."""
    work = {"run": RUN, "attempt": 1, "commit": order(tmp_path), "context": {}}
    value, _ = execute(work, lambda: 7, lambda values: ((), {}))
    again, record = execute({**work, "attempt": 2}, lambda: 1 / 0, lambda values: ((), {}))
    assert (value, again) == (7, 7)
    assert pickle.loads(record)["stored"]["key"] == f"flow/{RUN}"


def test_the_commit_hook_works_per_element(tmp_path: Path) -> None:
    shared = order(tmp_path)
    for index in range(3):
        value, said = commit(index, shared, f"{index}" * 4, 1)
        assert value == index
        assert said["key"] == f"flow/{index}{index}{index}{index}"
    assert commit(1, None, RUN, 1) == (1, None)
    assert commit(1, {**shared, "over": 1 << 20}, RUN, 1) == (1, None)


# -- damage ---------------------------------------------------------------------------------------


def test_every_flipped_byte_and_every_cut_is_noticed(tmp_path: Path) -> None:
    result_store.commit({"a": 1}, order(tmp_path), RUN, 1)
    path = tmp_path / "flow" / f"{RUN}.result"
    whole = path.read_bytes()
    damaged = [whole[:cut] for cut in range(len(whole))]
    damaged += [whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in range(len(whole))]
    damaged.append(whole + b"\0")
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(result_store.Damaged, match="set aside"):
            result_store.load(where(tmp_path), RUN)
        assert not path.exists()
    path.write_bytes(whole)
    assert result_store.load(where(tmp_path), RUN) == {"a": 1}


def test_a_damaged_result_is_written_anew_by_the_next_attempt(tmp_path: Path) -> None:
    result_store.commit(np.ones(100_000), order(tmp_path), RUN, 1)
    data = next((tmp_path / "flow").glob("*.npy"))
    data.write_bytes(data.read_bytes()[:-1])
    assert result_store.find(order(tmp_path), RUN) is None
    value, said = result_store.commit(5, order(tmp_path), RUN, 2)
    assert value == 5
    assert "duplicate" not in said
    assert result_store.load(where(tmp_path), RUN) == 5


def test_a_result_of_another_run_is_not_taken_for_ones_own(tmp_path: Path) -> None:
    chosen = order(tmp_path, key="flow/latest")
    result_store.commit(1, chosen, "aa", 1)
    result_store.commit(2, chosen, "bb", 1)
    assert result_store.load(where(tmp_path, "latest"), "bb") == 2
    with pytest.raises(result_store.Absent, match="holds the result of a later run, bb"):
        result_store.load(where(tmp_path, "latest"), "aa")


def test_a_result_of_a_newer_penstock_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result_store.commit(1, order(tmp_path), RUN, 1)
    path = tmp_path / "flow" / f"{RUN}.result"
    monkeypatch.setattr(result_store, "VERSION", b"0")  # then this one is newer
    with pytest.raises(result_formats.CommitError, match="written by a newer penstock"):
        result_store.load(where(tmp_path), RUN)
    assert path.exists()


# -- killed writers -------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
import numpy as np
from penstock.runners.worker import result_store

def strike(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

place, moment = result_store.Folder, sys.argv[2]
if moment == "writing":
    create = place.create
    def create_and_strike(self, name):
        file = create(self, name)
        class Struck:
            name = file.name
            def write(self, data):
                file.write(data)
                file.flush()
                strike()
        return Struck()
    place.create = create_and_strike
else:
    setattr(place, "commit", strike)
order = {"storage": sys.argv[1], "key": "flow/{run}", "format": "auto", "over": 0}
result_store.commit(np.ones(300_000), order, sys.argv[3], 1)
"""


@pytest.mark.parametrize("moment", ["writing", "committing"])
def test_a_killed_writer_leaves_no_result_and_the_next_one_cleans_up(tmp_path: Path, moment: str) -> None:
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), moment, RUN]
    killed = subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert killed.returncode == -signal.SIGKILL
    (left,) = names(tmp_path)
    assert left.endswith(".part" if moment == "writing" else ".npy")
    with pytest.raises(result_store.Absent):
        result_store.load(where(tmp_path), RUN)
    if moment == "writing":  # the reader has removed it
        assert names(tmp_path) == []
    result_store.commit(np.zeros(300_000), order(tmp_path), RUN, 2)
    assert len(names(tmp_path)) == 2
    assert result_store.load(where(tmp_path), RUN).sum() == 0


def test_a_writer_that_is_still_at_it_is_left_alone(tmp_path: Path) -> None:
    place = result_store.Folder(str(tmp_path))
    file = place.create(f"flow/{RUN}-1-x.npy")
    result_store.commit(1, order(tmp_path), "02" * 16, 2)
    assert os.path.exists(file.name)
    place.discard(file, f"flow/{RUN}-1-x.npy")
    assert names(tmp_path) == [f"{'02' * 16}.result"]


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(result_formats.CommitError, match=r"refuses: OSError: \[Errno 28\] No space left"):
        result_store.commit(np.ones(100_000), order(tmp_path), RUN, 1)
    assert names(tmp_path) == []


def test_a_full_device_is_told_in_one_sentence() -> None:
    """A directory in /proc takes nothing, whoever asks."""
    with pytest.raises(
        result_formats.CommitError, match="the result storage /proc/penstock refuses: "
    ) as caught:
        result_store.commit(1, order(Path("/proc/penstock")), RUN, 1)
    assert "\n" not in str(caught.value)


# -- results of transactions ----------------------------------------------------------------------


def staged(folder: Path, value: Any, run: str = RUN, **more: Any) -> dict[str, Any]:
    wanted = {**order(folder, key="cache/ab/abc"), "cache": "abc", "staged": True, **more}
    _, said = result_store.commit(value, wanted, run, 1)
    return {**said, "options": {}}


def looked_up(folder: Path, run: str = "02" * 16, **more: Any) -> Any:
    found = result_store.recall({**order(folder, key="cache/ab/abc"), "cache": "abc", **more}, run)
    return None if found is None else found[0]


VALUES = [b"small", b"x" * (1 << 18)]


@pytest.mark.parametrize("value", VALUES, ids=["inline", "beside"])
def test_a_staged_result_is_found_once_it_is_published(tmp_path: Path, value: bytes) -> None:
    said = staged(tmp_path, value)
    assert looked_up(tmp_path) is None
    assert result_store.load(said, RUN) == value  # whoever knows where it is can read it
    assert looked_up(tmp_path, RUN, staged=True) == value  # as another attempt of the run does
    published = result_store.publish(said)
    assert (published["key"], published["run"], "staged" in published) == ("cache/ab/abc", RUN, False)
    assert looked_up(tmp_path) == value
    assert [
        name for name in names(tmp_path) if result_store.STAGED in name and name.endswith(".result")
    ] == []
    assert result_store.load(published, RUN) == value


@pytest.mark.parametrize("value", VALUES, ids=["inline", "beside"])
def test_a_withdrawn_result_leaves_nothing(tmp_path: Path, value: bytes) -> None:
    result_store.withdraw(staged(tmp_path, value))
    assert names(tmp_path) == []
    result_store.withdraw(staged(tmp_path, value) | {"key": "cache/ab/other"})  # there is none
    published = result_store.publish(staged(tmp_path, value))
    result_store.withdraw({**published, "run": "03" * 16})  # that of another run stays
    assert looked_up(tmp_path) == value
    result_store.withdraw(published)
    assert names(tmp_path) == []


@pytest.mark.parametrize("value", VALUES, ids=["inline", "beside"])
def test_the_first_to_publish_wins_unless_it_refreshes(tmp_path: Path, value: bytes) -> None:
    first, second = staged(tmp_path, value), staged(tmp_path, value + b"2", "03" * 16)
    result_store.publish(first)
    published = result_store.publish(second)
    assert (published["run"], published["cached"]) == (RUN, True)
    assert looked_up(tmp_path) == value
    third = result_store.publish(staged(tmp_path, value + b"3", "04" * 16), refresh=True)
    assert third["run"] == "04" * 16
    assert looked_up(tmp_path) == value + b"3"
    assert len(names(tmp_path)) == (1 if len(value) < 100 else 2)


def test_a_staged_result_that_is_gone_is_not_published(tmp_path: Path) -> None:
    said = staged(tmp_path, b"x")
    result_store.withdraw(said)
    with pytest.raises(result_store.Absent):
        result_store.publish(said)


def test_an_expired_result_makes_room(tmp_path: Path) -> None:
    result_store.publish(staged(tmp_path, b"1"))
    assert result_store.publish(staged(tmp_path, b"2", "03" * 16), expires=0)["run"] == "03" * 16
    assert looked_up(tmp_path) == b"2"
