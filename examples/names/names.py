"""Names and versions that people find again, and names of runs that tell what they were about."""

import datetime
import os

from penstock import flow, runtime, tags, task


@task(
    name="My Example Task",
    description="An example task for a tutorial.",
    task_run_name="hello-{name}-on-{date:%A}",
    tags=["tutorial", "tag-test"],
)
def my_task(name, date):
    return runtime.task_run.name, sorted(runtime.task_run.tags)


@flow(
    name="My Example Flow",
    description="An example flow for a tutorial.",
    version=os.getenv("GIT_COMMIT_SHA"),
    flow_run_name="{name}-on-{date:%A}",
)
def my_flow(name: str, date: datetime.datetime):
    with tags("greeting"):
        return runtime.flow_run.name, my_task(name, date)


if __name__ == "__main__":
    print(my_flow("marvin", "2021-05-07"))
