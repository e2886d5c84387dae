"""A map whose elements map, and tasks that compute with Dask arrays on the cluster they run on."""

import dask
import dask.array as da

from penstock import flow, task, unmapped
from penstock.dask import get_dask_client


@task
def square(x: int) -> int:
    return x * x


@task
def sum_of_squares(n: int) -> int:
    return sum(square.map(range(n)).result())  # a map of its own, on the same workers


@task
def blocks(n: int, scale: int) -> int:
    with get_dask_client():
        doubled = da.arange(n, chunks=max(1, n // 4)).map_blocks(lambda block: scale * block)
        return int(doubled.sum().compute())


@dask.delayed
def add(x: int, y: int) -> int:
    return x + y


@task
def delayed(n: int) -> int:
    with get_dask_client():
        return add(n, 1).compute()


@flow
def nested(sizes: list[int]):
    inner = sum_of_squares.map(sizes)
    arrays = blocks.map(sizes, unmapped(2))
    return inner, arrays, delayed.map(sizes)


if __name__ == "__main__":
    print(nested.with_options(task_runner="dask")([2, 3, 4]))
