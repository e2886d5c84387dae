"""Wait for a record, look at the data, do one thing or another, report."""

import sys

from penstock import branch, flow, get_run_logger, task

run_count = 0


@task(retries=100, retry_delay_seconds=0.05)
def wait_for_db_record(ready_after: int = 3):
    global run_count
    run_count += 1
    get_run_logger().info(f"Run number {run_count}")
    # here must be your sensor logic:
    # query to DB, check the file, etc
    condition_met = run_count >= ready_after
    if not condition_met:
        raise Exception("Oh no! Need to continue wait!")  # noqa: TRY002


@task
def get_data(rows: int):
    return list(range(rows))


@task
def process_or_skip_func(data):
    return "process" if data else "skip"


@task
def if_skip_do_something():
    get_run_logger().info(f"Task {if_skip_do_something.__name__}")
    return "skipped"


@task
def if_not_skip_do_something_func():
    get_run_logger().info(f"Task {if_not_skip_do_something_func.__name__}")
    return "processed"


@task
def report_the_finish(val):
    return f"finish: {val}"


@flow
def db_data_process_flow(rows: int = 3):
    wait_for_db_record()
    data = get_data(rows)
    status = process_or_skip_func(data)
    if status == "skip":
        val = if_skip_do_something()
        return report_the_finish(val)
    else:
        val = if_not_skip_do_something_func()
        return report_the_finish(val)


@flow
def branches_on_record(rows: int = 3):
    """The same; the arm that was not taken is in the record as SKIPPED."""
    status = process_or_skip_func.submit(get_data.submit(rows))
    val = branch(status.result() == "skip", then=if_skip_do_something, else_=if_not_skip_do_something_func)
    return report_the_finish.submit(val)


if __name__ == "__main__":
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print(db_data_process_flow(number))
    print(branches_on_record(number))
