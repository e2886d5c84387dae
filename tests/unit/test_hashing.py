"""The hash of values: by type and content, the same everywhere."""

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import functools
import os
import pathlib
import subprocess
import sys
import threading
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pydantic
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.engine.hashing import Digest, Unhashable, code_of, digest, stable_hash


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass
class Point:
    x: int
    y: Any = None


class Model(pydantic.BaseModel):
    a: int
    b: list[str] = []


class Plain:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


class Adder:
    def __init__(self, by: int) -> None:
        self.by = by

    def __call__(self, x: int) -> int:
        return x + self.by


class Tokenised:
    def __init__(self, content: str) -> None:
        self.content, self.noise = content, object()

    def __dask_tokenize__(self) -> Any:
        return self.content


def iter_of_nothing() -> Any:
    yield from ()


def scaled(factor: float) -> Any:
    return lambda x: factor * x


def many() -> list[Any]:
    """Values of all kinds, no two of which are equal to a task."""
    stamp = dt.datetime(2026, 1, 2, 3, 4, 5, 6)
    zoned = stamp.replace(tzinfo=ZoneInfo("Europe/Berlin"))
    table = pa.table({"n": [1, 2, None], "s": ["a", None, "c"], "l": [[1], None, [2, 3]]})
    frame = pd.DataFrame(
        {"n": [1, 2, 3], "s": ["a", None, "c"], "t": pd.date_range("2026", periods=3, tz="UTC")}
    )
    structured = np.array([(1, "a"), (2, "b")], dtype=[("n", "i4"), ("s", "U1")])
    return [
        None, True, False, 0, 1, -1, 1 << 80, 0.0, -0.0, 1.0, float("nan"), float("inf"), 1j, "", "1", b"", b"1",
        bytearray(b"1"), (), [], {}, set(), frozenset(), [1], (1,), {1}, frozenset([1]), [[1], 2], [1, [2]], [1, 2],
        [2, 1], {1: 2}, {"a": 1, "b": [2]}, {"a": 1, "b": [3]}, collections.OrderedDict(a=1),
        collections.defaultdict(list, a=[1]), collections.Counter("aab"), range(3), slice(1, 2), Ellipsis,
        Colour.RED, Colour.BLUE, Point(1), Point(1, 2), Model(a=1), Model(a=1, b=["x"]), Plain(a=1), Plain(a=2),
        Plain(b=1), Adder(1), Adder(2), Tokenised("a"), Tokenised("b"), pathlib.Path("/a"), pathlib.Path("/b"),
        stamp, zoned, stamp.date(), stamp.time(), dt.timedelta(1), dt.timedelta(seconds=1), dt.UTC,
        decimal.Decimal("1.0"), decimal.Decimal("1.00"), len, max, int, Point, scaled(1.0), scaled(2.0), np.sum,
        functools.partial(pow, 2), functools.partial(pow, 3), Adder(1).__call__, os, str.upper,
        np.float64(1), np.float32(1), np.int64(1), np.arange(6), np.arange(6.0), np.arange(6).reshape(2, 3),
        np.arange(6).reshape(3, 2), np.arange(6)[::2], np.zeros(0), np.zeros((0, 3)), np.array(["a", "bc"]),
        np.array([1, "a", None], dtype=object), structured, structured[::-1], np.array(["2026"], "M8[D]"),
        np.ma.masked_array([1, 2], [False, True]), np.ma.masked_array([1, 2], [True, False]), np.dtype("i4"), np.dtype("f4"),
        np.random.default_rng(1), np.random.default_rng(2),
        frame, frame[["n"]], frame.iloc[:2], frame.set_index("s"), frame.n, frame.s, frame.t, frame.index,
        frame.rename(columns={"n": "m"}), pd.Index([1, 2], name="a"), pd.Index([1, 2], name="b"),
        pd.MultiIndex.from_tuples([(1, "a"), (2, "b")]), pd.Categorical(["a", "b"]), pd.Categorical(["a", "a"]),
        pd.Categorical(["a", "b"], ordered=True), pd.Series([1, None], dtype="Int64"), pd.Series([1, None]),
        pd.Series(["a", None], dtype="string"), pd.interval_range(0, 2), pd.Timestamp("2026"), pd.NaT, pd.NA,
        pl.DataFrame({"a": [1, None], "s": ["x", None]}), pl.DataFrame({"a": [1, 2], "s": ["x", None]}),
        pl.Series("a", [1, 2]), pl.Series("b", [1, 2]),
        table, table.slice(1), table["n"], table["s"], table["l"], pa.array([{"a": 1}, None]),
        pa.array([1, 2], pa.int8()), pa.array([decimal.Decimal("1.5")]), pa.array([True, None]), table.schema,
        pa.array(["a", "b"]).dictionary_encode(), pa.array([dt.date(2026, 1, 1), None]),
        xr.DataArray([1, 2], dims="x", name="a"), xr.DataArray([1, 2], dims="y", name="a"),
        xr.DataArray([1, 2], dims="x", coords={"x": [3, 4]}), xr.Dataset({"v": ("x", [1.0, 2.0])}),
        xr.Dataset({"v": ("x", [1.0, 2.0])}, attrs={"unit": "m"}),
    ]  # fmt: skip


def test_no_two_different_values_have_one_hash() -> None:
    found = [stable_hash(value) for value in many()]
    seen: dict[str, int] = {}
    for place, text in enumerate(found):
        assert text not in seen, (many()[seen[text]], many()[place])
        seen[text] = place


def test_equal_values_have_one_hash() -> None:
    assert [stable_hash(value) for value in many()] == [stable_hash(value) for value in many()]


SCRIPT = """
import sys; sys.path.insert(0, {root!r})
from tests.unit.test_hashing import many
from penstock.engine.hashing import stable_hash
print(" ".join(map(stable_hash, many())))
"""


def test_every_process_makes_the_same_hash() -> None:
    root = str(pathlib.Path(__file__).parents[2])
    lines = set()
    for seed in ("1", "4711"):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT.format(root=root)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        lines.add(done.stdout.strip())
    assert len(lines) == 1


def test_the_way_a_value_lies_in_memory_is_of_no_interest() -> None:
    square = np.arange(12).reshape(3, 4)
    assert stable_hash(square[:, ::2]) == stable_hash(square[:, ::2].copy())
    assert stable_hash(np.broadcast_to(np.arange(3), (4, 3))) == stable_hash(np.tile(np.arange(3), (4, 1)))
    gaps = np.zeros(3, dtype=np.dtype([("a", "i1"), ("b", "i8")], align=True))
    dirty = np.frombuffer(b"\xff" * gaps.nbytes, gaps.dtype).copy()
    dirty["a"], dirty["b"] = gaps["a"], gaps["b"]
    assert stable_hash(gaps) == stable_hash(dirty)
    hidden = np.ma.masked_array([1, 2, 3], [False, True, False])
    assert stable_hash(hidden) == stable_hash(np.ma.masked_array([1, 99, 3], [False, True, False]))
    frame = pd.DataFrame({"a": [1, 2], "b": ["x", "y"]})
    assert stable_hash(frame) == stable_hash(frame[["b", "a"]])
    assert stable_hash(frame) == stable_hash(pd.concat([frame[:1], frame[1:]]).reset_index(drop=True))
    array = pa.array(["a", "bc", None, "d"])
    assert stable_hash(array[1:]) == stable_hash(pa.array(["bc", None, "d"]))
    assert stable_hash(pa.chunked_array([["a"], ["b"]])) == stable_hash(pa.chunked_array([["a", "b"]]))
    nested = pa.array([[1], [2, 3], [4]])
    assert stable_hash(nested[1:]) == stable_hash(pa.array([[2, 3], [4]]))


def test_many_blocks_are_one_array() -> None:
    wide = np.arange(3_000_000, dtype="i8").reshape(1000, 3000)
    assert stable_hash(wide[:, 1::2]) == stable_hash(wide[:, 1::2].copy())


def test_functions_are_what_they_do() -> None:
    def one(x: int, y: int = 1) -> int:
        return x + y

    first = one

    def one(x: int, y: int = 1) -> int:  # type: ignore[no-redef]
        # a comment, and another line
        return x + y

    assert stable_hash(first) == stable_hash(one)

    def one(x: int, y: int = 2) -> int:  # type: ignore[no-redef]
        return x + y

    assert stable_hash(first) != stable_hash(one)
    assert stable_hash(scaled(3.0)) == stable_hash(scaled(3.0)) != stable_hash(scaled(4.0))


def test_code_may_close_over_anything() -> None:
    def made(lock: Any, factor: int) -> Any:
        def work(x: int) -> int:
            with lock:
                return factor * x

        return work

    one, other = made(threading.Lock(), 1), made(threading.Lock(), 1)
    assert code_of(one) == code_of(other) != code_of(made(threading.Lock(), 2))
    with pytest.raises(Unhashable, match=r"cannot pickle '_thread.lock' object \(at .*closure.*lock"):
        stable_hash(one)


def test_a_value_may_contain_itself() -> None:
    inside: list[Any] = [1]
    inside.append(inside)
    same: list[Any] = [1]
    same.append(same)
    assert stable_hash(inside) == stable_hash(same) != stable_hash([1, [1]])

    def again(n: int) -> int:
        return again(n - 1) if n else 0

    assert len(stable_hash(again)) == 32


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (threading.Lock(), "_thread.lock"),
        ([1, {"a": threading.Lock()}], r"at \[1\]\['a'\]"),
        (Plain(inner=Point(1, threading.Lock())), r"at .inner.y"),
        (iter_of_nothing(), "generator"),
        (np.array([threading.Lock()], dtype=object), r"\[0\]"),
    ],
    ids=["lock", "container", "object", "generator", "array"],
)
def test_what_has_no_content_is_refused_with_its_place(value: Any, where: str) -> None:
    with pytest.raises(ValueError, match=where):
        stable_hash(value)


def test_too_deep_is_refused() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="nested too deeply"):
        stable_hash(deep)


def test_a_digest_counts_as_its_value() -> None:
    for value in (1, [1], np.arange(3)):
        assert stable_hash(digest(value)) == stable_hash(value)
        assert stable_hash({"a": digest(value)}) == stable_hash({"a": value})
    assert type(digest(Digest("00" * 16))) is Digest


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(VALUES, VALUES)
def test_hashes_are_equal_if_values_are(one: Any, other: Any) -> None:
    assert (stable_hash(one) == stable_hash(other)) == (spelled(one) == spelled(other))


def spelled(value: Any) -> str:
    """Write a value down so that equal texts are equal values."""
    if isinstance(value, dict):
        return "{" + ",".join(sorted(f"{spelled(k)}:{spelled(v)}" for k, v in value.items())) + "}"
    if isinstance(value, (list, tuple)):
        return type(value).__name__ + "(" + ",".join(map(spelled, value)) + ")"
    return repr(value)
