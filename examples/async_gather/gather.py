"""Coroutines as tasks: one awaited, two at the same time."""

import asyncio

from penstock import flow, task

PAUSE = 0.05


@task
async def print_values(values):
    for value in values:
        await asyncio.sleep(PAUSE)  # yield
        print(value, end=" ")


@flow
async def async_flow():
    await print_values([1, 2])  # runs immediately
    coros = [print_values("abcd"), print_values("6789")]

    # asynchronously gather the tasks
    await asyncio.gather(*coros)


if __name__ == "__main__":
    asyncio.run(async_flow())
