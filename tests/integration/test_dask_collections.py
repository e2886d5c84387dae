"""Dask's collections on every runner: lazy as arguments and results, computed, put, made of futures."""

import contextlib
import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import dask
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import xarray

from penstock import DaskTaskRunner, MissingContextError, flow, get_dask_client, put, task, unmapped
from penstock.runners.base import TaskRunner
from tests.conftest import InFlow
from tests.record import Record


@pytest.fixture(autouse=True)
def pool(request: pytest.FixtureRequest) -> Iterator[None]:
    """Threads for Dask where tasks share this process; its own would stay for as long as it lives."""
    for name in {"runner", "one_worker"} & set(request.fixturenames):
        request.getfixturevalue(name)  # a cluster hands its configuration on when it starts
    with ThreadPoolExecutor(2) as threads, dask.config.set(pool=threads):
        yield


@task
def same(x: Any, *more: Any) -> Any:
    return x


@task
def kind_of(x: Any) -> str:
    return type(x).__name__


@task
def summed(x: Any) -> float:
    return float(x.sum().compute())


@task
def lazy(size: int) -> Any:
    return da.ones(size, chunks=size // 4)


def test_lazy_stays_lazy(in_flow: InFlow, record: Record) -> None:
    def explode(block: Any) -> Any:
        raise AssertionError("it was computed")

    huge = da.zeros((1 << 20, 1 << 20), chunks=(1 << 14, 1 << 14)).map_blocks(explode, dtype=float)
    labelled = xarray.DataArray(huge, dims=("x", "y"), name="v")
    delayed = dask.delayed(explode)(1)

    def body() -> Any:
        return [
            kind_of.submit(same.submit(one)) for one in (huge, labelled, labelled.to_dataset(), delayed)
        ] + [kind_of.submit(one) for one in (huge, labelled)]

    assert in_flow(body) == ["Array", "DataArray", "Dataset", "Delayed", "Array", "DataArray"]
    assert all(row.state["nbytes"] < 1_000_000 for row in record.tasks("same"))


def test_collections_come_and_go(in_flow: InFlow) -> None:
    array = da.arange(1000, chunks=100)

    def body() -> Any:
        return [
            summed.submit(array),
            summed.submit(same.submit(array)),
            summed.submit(lazy.submit(1000)),
            same.submit(lazy.submit(8)),
        ]

    one, two, three, back = in_flow(body)
    assert (one, two, three) == (499_500, 499_500, 1000)
    assert isinstance(back, da.Array)
    assert back.compute(scheduler="sync").sum() == 8


def test_labelled_collections(in_flow: InFlow) -> None:
    @task
    def mean(x: Any) -> float:
        return float(x["v"].mean().compute())

    data = xarray.DataArray(da.arange(1000, chunks=100), dims="t", name="v").to_dataset()
    assert in_flow(lambda: [mean.submit(data), mean.submit(same.submit(data))]) == [499.5, 499.5]


def test_data_frames(in_flow: InFlow) -> None:
    frames = pytest.importorskip("dask.dataframe")

    @task
    def biggest(x: Any) -> float:
        return float(x["a"].max().compute())

    many = frames.from_pandas(pd.DataFrame({"a": np.arange(1000.0)}), npartitions=4)
    assert in_flow(lambda: [biggest.submit(many), kind_of.submit(same.submit(many))]) == [999.0, "DataFrame"]


def test_computing_in_a_task_needs_one_worker(one_worker: TaskRunner) -> None:
    @flow(task_runner=one_worker)
    def body() -> Any:
        return [summed.submit(lazy.submit(1000)), summed.submit(da.ones(100, chunks=10))]

    assert body() == [1000, 100]


def test_a_collection_is_put_as_its_value(in_flow: InFlow) -> None:
    @task
    def plain(x: Any) -> tuple[str, float]:
        return type(x).__name__, float(x.sum())

    @task
    def beside(i: int, x: Any) -> str:
        return type(x).__name__

    def body() -> Any:
        reference = put(da.ones(300_000, chunks=100_000))
        return [plain.submit(reference), *beside.map([1, 2], unmapped(reference))]

    assert in_flow(body) == [("ndarray", 300_000.0), "ndarray", "ndarray"]


def test_a_collection_that_fails_to_compute(in_flow: InFlow) -> None:
    def explode(block: Any) -> Any:
        raise ZeroDivisionError("in a block")

    def body() -> Any:
        reference = put(da.ones(10, chunks=5).map_blocks(explode, dtype=float, meta=np.array(())))
        return reference.exception()

    found = in_flow(body)
    assert isinstance(found, ZeroDivisionError)


def test_persisted_collections_are_held(in_flow: InFlow) -> None:
    """The caller drops what it has persisted; the consumer, which waits for another task, still finds it."""

    @task
    def persisted() -> Any:
        return da.ones(1000, chunks=100).persist()

    @task
    def after(x: Any, gate: Any) -> float:
        return float(x.sum().compute())

    def body() -> Any:
        with cluster_client():
            future = after.submit(da.ones(1000, chunks=100).persist(), same.submit(1))
        gc.collect()
        return [future, after.submit(persisted.submit(), same.submit(1))]

    assert in_flow(body) == [1000, 1000]


def cluster_client() -> Any:
    """The client of the runner if it is Dask's; else nothing, and Dask computes in this process."""
    stack = contextlib.ExitStack()
    with contextlib.suppress(MissingContextError):
        stack.enter_context(get_dask_client())
    return stack


# ------------------------------------------------------------------------------------------ to_dask, client


def test_from_a_future_to_a_collection(in_flow: InFlow) -> None:
    @task
    def plane() -> Any:
        return np.arange(1000.0)

    def body() -> Any:
        with cluster_client():
            future = plane.submit()
            value = future.to_dask()
            array = future.to_dask(shape=(1000,), dtype="f8")
            placed = put(np.ones(10)).to_dask(shape=(10,), dtype="f8")
            del future
            gc.collect()
            assert isinstance(array, da.Array)
            assert array.shape == (1000,)
            assert array.dtype == np.dtype("f8")
            found = [float((array + 1).sum().compute()), float(value.sum().compute())]
            return [*found, float(placed.sum().compute())]

    assert in_flow(body) == [500_500, 499_500, 10]


def test_a_collection_of_a_future_that_failed(in_flow: InFlow) -> None:
    @task
    def fails() -> Any:
        raise KeyError("no plane")

    with pytest.raises(KeyError, match="no plane"):
        in_flow(lambda: fails.submit().to_dask())
    with pytest.raises(Exception, match="give both"):
        in_flow(lambda: same.submit(1).to_dask(shape=(3,)))


def test_the_client_belongs_to_dask(in_flow: InFlow, runner: TaskRunner) -> None:
    @task
    def lent() -> str:
        try:
            with get_dask_client() as client:
                return str(client.submit(sum, [1, 2, 3], pure=False).result())
        except MissingContextError as error:
            return str(error)

    def body() -> Any:
        return lent.submit()

    wanted = "6" if runner.info.name == "dask" else f"this run uses the runner {runner.info.name!r}"
    assert wanted in in_flow(body)


def test_the_client_in_a_flow_and_without_one(in_flow: InFlow) -> None:
    with pytest.raises(MissingContextError, match="no flow or task around it"), get_dask_client():
        pass

    def body() -> Any:
        try:
            with get_dask_client() as client:
                return client.submit(sum, [1, 2, 3], pure=False).result()
        except MissingContextError:
            return 6

    assert in_flow(body) == 6


# ------------------------------------------------------------------------- a cluster inside this process


@pytest.mark.dask
def test_a_cluster_in_this_process_captures_what_is_put() -> None:
    """Its workers are threads, and nothing is pickled on the way to them."""
    options = {"processes": False, "n_workers": 1, "threads_per_worker": 2, "dashboard_address": None}
    runner = DaskTaskRunner(cluster_kwargs=options)

    @task
    def total(x: Any, inside: bool = False) -> float:
        return float((x[0] if inside else x).sum())

    @flow(task_runner=runner)
    def body() -> Any:
        array, box = np.ones(300_000), [np.ones(300_000)]
        reference, boxed = put(array), put(box)
        submitted = total.submit(array)
        array[:] = box[0][:] = 7
        return [submitted, total.submit(reference), total.submit(boxed, inside=True)]

    try:
        assert body() == [300_000] * 3
    finally:
        runner.shutdown()
