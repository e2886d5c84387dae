"""Frames and odd arrays as arguments and results."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import scipy.sparse
import xarray

from penstock import put, task
from tests.conftest import InFlow
from tests.record import Record

ROWS = 200_000


def values(kind: str, rows: int = ROWS) -> Any:
    """Make a frame or an array of a kind."""
    numbers = np.arange(rows, dtype=float)
    if kind == "structured":
        found = np.zeros(rows, dtype=[("time", "f8"), ("channel", "i4")])
        found["time"] = numbers
        return found
    makers: dict[str, Callable[[], Any]] = {
        "pandas": lambda: pd.DataFrame({"a": numbers, "b": pd.Series(["x"] * rows)}),
        "series": lambda: pd.Series(numbers, name="a"),
        "index": lambda: pd.Index(numbers, name="a"),
        "arrow": lambda: pa.table({"a": numbers, "b": ["x"] * rows}),
        "polars": lambda: pl.DataFrame({"a": numbers, "b": ["x"] * rows}),
        "polars lazy": lambda: pl.DataFrame({"a": numbers}).lazy(),
        "xarray": lambda: xarray.DataArray(numbers, dims="t", coords={"t": numbers}, name="v").to_dataset(),
        "masked": lambda: np.ma.MaskedArray(numbers, mask=numbers > 5),
        "fortran": lambda: np.asfortranarray(numbers.reshape(4, -1)),
        "strided": lambda: numbers[::3],
        "empty": lambda: np.zeros((0, 3)),
        "scalar": lambda: np.array(3.0),
        "object": lambda: np.array([{"a": 1}, None, "x"] * (rows // 1000), dtype=object),
        "datetime": lambda: numbers.astype("datetime64[s]"),
        "broadcast": lambda: np.broadcast_to(np.float64(2), (1000, 300)),
        "sparse": lambda: scipy.sparse.random(1000, 1000, 0.1, "csr", random_state=1),
        "bytes": lambda: bytearray(b"x" * rows * 8),
    }
    return makers[kind]()


KINDS = (
    *("pandas", "series", "index", "arrow", "polars", "polars lazy", "xarray", "structured", "masked"),
    *("fortran", "strided", "empty", "scalar", "object", "datetime", "broadcast", "sparse", "bytes"),
)


def alike(one: Any, other: Any) -> bool:
    if isinstance(one, pl.LazyFrame):
        one, other = one.collect(), other.collect()
    if scipy.sparse.issparse(one):
        return bool((one != other).nnz == 0)
    if isinstance(one, np.ma.MaskedArray):
        return bool((one.mask == other.mask).all() and one.sum() == other.sum())
    if isinstance(one, np.ndarray):
        same_layout = one.flags.f_contiguous == other.flags.f_contiguous or one.ndim < 2 or 0 in one.strides
        return bool(
            one.dtype == other.dtype and one.shape == other.shape and (one == other).all() and same_layout
        )
    return bool(one.equals(other)) if hasattr(one, "equals") else bool(one == other)


@task
def make(kind: str, rows: int = ROWS) -> Any:
    return values(kind, rows)


@task
def same(x: Any, *more: Any) -> Any:
    return x


@task
def kind_of(x: Any) -> str:
    return type(x).__name__


@pytest.mark.parametrize("rows", [2000, ROWS], ids=["small", "large"])
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(in_flow: InFlow, kind: str, rows: int) -> None:
    mine = values(kind, rows)

    def body() -> Any:
        made = make.submit(kind, rows)
        return [same.submit(made), same.submit(mine), same.submit(put(mine)), same.submit({"x": [mine]})]

    one, two, three, four = in_flow(body)
    for found in (one, two, three, four["x"][0]):
        assert type(found) is type(mine)
        assert alike(mine, found)


def test_a_mapped_file(in_flow: InFlow, tmp_path: Path) -> None:
    np.save(tmp_path / "plane.npy", np.arange(300_000.0))
    mapped = np.load(tmp_path / "plane.npy", mmap_mode="r")

    @task
    def total(x: Any) -> float:
        return float(x.sum())

    @task
    def open_it(path: str) -> Any:
        return np.load(path, mmap_mode="r")

    def body() -> Any:
        return [total.submit(mapped), total.submit(open_it.submit(str(tmp_path / "plane.npy")))]

    assert in_flow(body) == [np.arange(300_000.0).sum()] * 2


def test_sizes_of_frames_are_in_the_record(in_flow: InFlow, record: Record) -> None:
    in_flow(lambda: make.map(["pandas", "arrow", "polars", "xarray"]).wait())
    for row in record.tasks("make"):
        assert row.state["nbytes"] >= 8 * ROWS
