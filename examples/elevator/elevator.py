"""Ten stops of an elevator, asked for at once."""

import time

from penstock import flow, task
from penstock.task_runners import ConcurrentTaskRunner

SECONDS_PER_FLOOR = 0.02


@task
def stop_at_floor(floor):
    print(f"elevator moving to floor {floor}")
    time.sleep(floor * SECONDS_PER_FLOOR)
    print(f"elevator stops on floor {floor}")


@flow(task_runner=ConcurrentTaskRunner())
def elevator():
    for floor in range(10, 0, -1):
        stop_at_floor.submit(floor)


if __name__ == "__main__":
    elevator()
